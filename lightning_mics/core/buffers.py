"""Buffers, which every rank holds whole, and which its own data may change: the running statistics of batch norms."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from lightning_mics.core._torch import persistent_buffers
from lightning_mics.core.mesh import communication_device
from lightning_mics.core.replicas import differing, equalize_replicas
from lightning_mics.core.runtime import runtimes_in


def broadcast_buffers(model: nn.Module) -> None:
    """Makes the buffers of a sharded model rank 0's on every rank, as DDP does. Collective over the world.

    Ranks see other data, so that the running statistics of their batch norms drift apart, and a checkpoint holds those
    of rank 0. Strategies, ``MiCSTrainer`` and everything that saves a training state call this; a loop of your own
    calls it before it evaluates. Buffers that are equal already cost only their fingerprint. Buffers that are not saved
    (``persistent=False``), and those whose shapes differ between ranks, stay as they are.

    Args:
        model: A sharded model, or a module with sharded models in it.

    Raises:
        MiCSError: If nothing in ``model`` is sharded by MiCS.
    """
    device = communication_device(runtimes_in(model)[0].mesh.device_mesh.device_type)
    buffers = persistent_buffers(model)
    if not buffers or torch.distributed.get_world_size() == 1:
        return
    kinds = torch.tensor([_kind(buffer) for buffer in buffers.values()], dtype=torch.int64, device=device)
    alike = [not differs for differs in differing(kinds)]
    equalize_replicas([entry for entry, is_alike in zip(buffers.items(), alike, strict=True) if is_alike], device)


def _kind(buffer: Tensor) -> int:
    digest = hashlib.blake2b(f"{tuple(buffer.shape)} {buffer.dtype}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
