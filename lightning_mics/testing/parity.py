"""Whole weights of sharded models, shares of a batch, and whether two sets of tensors agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the whole parameters and buffers of a sharded model, on every rank. Collective over the partition.

    Returns:
        Tensors on the CPU that share no memory with the model, under the names of ``model.state_dict()``.
    """

    def whole(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):  # offloaded shards travel through the mesh's device
            tensor = cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()
        return tensor.detach().cpu().clone()

    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def shard_batch(batch: Any, rank: int, world_size: int, *, strided: bool = False) -> Any:
    """Returns a rank's equal share of a global batch.

    Args:
        batch: A tensor, or tensors in mappings, lists and tuples; split along the first dimension.
        rank: The rank, from 0.
        world_size: Number of shares.
        strided: Take every ``world_size``-th row, as ``DistributedSampler`` does, instead of adjacent rows.

    Raises:
        ValueError: If the rows cannot be shared equally.
    """
    if isinstance(batch, Tensor):
        if len(batch) % world_size:
            raise ValueError(f"{len(batch)} rows cannot be shared equally by {world_size} ranks.")
        return batch[rank::world_size] if strided else batch.tensor_split(world_size)[rank]
    if isinstance(batch, Mapping):
        return {key: shard_batch(part, rank, world_size, strided=strided) for key, part in batch.items()}
    return type(batch)(shard_batch(part, rank, world_size, strided=strided) for part in batch)


def relative_difference(actual: float, expected: float) -> float:
    """Returns ``|actual - expected| / |expected|``; see :func:`weight_differences` for when it is infinite."""
    return _share(abs(actual - expected), abs(expected))


def weight_differences(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns each tensor's largest difference, as a share of the expected tensor's largest magnitude.

    Infinity, which no bound lets pass, stands for NaN on either side and for any difference from zeros.
    """

    def difference(ours: Tensor, theirs: Tensor) -> float:
        if not theirs.numel():
            return 0.0
        ours, theirs = ours.double(), theirs.double()
        return _share((ours - theirs).abs().max().item(), theirs.abs().max().item())

    return {name: difference(actual[name], tensor) for name, tensor in expected.items()}


def _share(difference: float, magnitude: float) -> float:
    if difference == 0:
        return 0.0
    share = difference / magnitude if magnitude else math.inf
    return math.inf if math.isnan(share) else share


def assert_parity(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Checks that weights or gradients agree.

    Args:
        actual: Whole tensors by name.
        expected: What they should be.
        tolerance: Largest difference allowed, as a share of the tensor's largest magnitude.

    Raises:
        AssertionError: Naming the tensor that differs most, or those that are missing, unexpected or misshapen.
    """
    missing, unexpected = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    assert not missing and not unexpected, f"missing tensors: {missing}; unexpected: {unexpected}"
    shapes = {name: (tuple(actual[name].shape), tuple(tensor.shape)) for name, tensor in expected.items()}
    misshapen = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    assert not misshapen, f"shapes (actual, expected): {misshapen}"
    differences = weight_differences(actual, expected)
    beyond = [name for name, difference in differences.items() if not difference <= tolerance]
    worst = max(beyond, key=differences.__getitem__, default="")
    assert not beyond, (
        f"{len(beyond)} of {len(differences)} tensors differ by more than {tolerance:g} of their largest magnitude; "
        f"the worst is {worst}: {differences[worst]:.2e}"
    )
