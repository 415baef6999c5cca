"""Clipping gradients by their global norm, which no rank can tell alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_mics.core._torch import clip_mixed_gradients, local_tensor
from lightning_mics.core.gradients.step import shards_of
from lightning_mics.core.mesh import communication_device
from lightning_mics.core.runtime import runtimes_in


def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clips the gradients of a sharded model by their global norm, the same as on one process.

    Call it after the window's last backward pass. Collective over the partition group.

    Args:
        model: A sharded model.
        max_norm: Largest norm allowed.
        norm_type: Order of the norm; ``inf`` for the largest magnitude.

    Returns:
        The norm before clipping, a plain scalar tensor, equal on all ranks.
    """
    runtimes_in(model)
    return clip_parameters_(list(model.parameters()), max_norm, norm_type)


def clip_parameters_(
    params: list[nn.Parameter], max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Does the work of :func:`clip_grad_norm_` for some parameters; for those that are gathered, their shards count."""
    params = shards_of(params)
    norm = _total_norm([param.grad for param in params if param.grad is not None], norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"The total norm of the gradients is {norm.item()}, so it cannot be clipped.")
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def clip_whole_beside_shards() -> None:
    """Lets PyTorch's own functions clip the gradients of whole parameters beside those of shards."""
    clip_mixed_gradients(_total_norm)


def clip_parameters_by_value_(params: list[nn.Parameter], max_value: float) -> None:
    """Clips each value of the gradients of some parameters; for those that are gathered, their shards count."""
    torch.nn.utils.clip_grad_value_(shards_of(params), max_value)


def _total_norm(grads: Iterable[Tensor], norm_type: float) -> Tensor:
    """Returns the norm of all gradients together, from one number a rank.

    Not left to DTensor: the largest magnitude of an empty shard is no number to it, and it would send offloaded norms
    through the host.
    """
    locals_by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for grad in grads:
        mesh = grad.device_mesh if isinstance(grad, DTensor) else None
        locals_by_mesh.setdefault(mesh, []).append(local_tensor(grad))
    is_max = math.isinf(norm_type)
    parts = []
    for mesh, locals_ in locals_by_mesh.items():
        norm = torch.nn.utils.get_total_norm([local for local in locals_ if local.numel()], norm_type).double()
        part = norm if is_max else norm**norm_type
        if mesh is not None:
            part = part.to(communication_device(mesh.device_type))
            for group in mesh.get_all_groups():
                dist.all_reduce(part, op=dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=group)
        parts.append(part)
    if not parts:
        return torch.zeros(())
    together = torch.stack([part.to(parts[0].device) for part in parts])
    return (together.max() if is_max else together.sum() ** (1 / norm_type)).float()
