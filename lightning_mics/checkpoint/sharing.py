"""Who writes what: each shard once, the shards of a partition spread over its replicas.

DCP can find duplicates itself, but only when rank 0 has gathered the plans of all ranks, each with all shards of its
partition. Here each rank leaves out what others write before it plans or copies anything.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from torch.distributed.tensor import DTensor

from lightning_mics.checkpoint import ranks
from lightning_mics.core._torch import local_tensor

_Path = tuple[Any, ...]


def own_part(state: dict[str, Any]) -> dict[str, Any]:
    """Returns what this rank is to write of a state; rank 0 has all that is not sharded. Collective over the world.

    Ranks that hold the same shards share them; what only some of them hold is left to DCP.

    Args:
        state: Nested dictionaries of tensors.
    """
    shards = _shards(state)
    held = ranks.together(lambda: _digest(shards))
    twins = [rank for rank, digest in enumerate(held) if digest == held[ranks.rank()]]
    writers = spread([local_tensor(shard).nbytes for shard in shards.values()], len(twins))
    others = {path for path, writer in zip(shards, writers, strict=True) if twins[writer] != ranks.rank()}
    return _without(state, others)


def spread(sizes: Sequence[int], num_writers: int) -> list[int]:
    """Returns a writer for each size, so that all have about the same to write."""
    loads = [(0, writer) for writer in range(num_writers)]
    writers = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, writers[index] = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], writers[index]))
    return writers


def _shards(state: dict[str, Any], path: _Path = ()) -> dict[_Path, DTensor]:
    found: dict[_Path, DTensor] = {}
    for key, value in state.items():
        place = (*path, key)
        if isinstance(value, DTensor):
            found[place] = value
        elif isinstance(value, dict):
            found |= _shards(value, place)
    return found


def _digest(shards: dict[_Path, DTensor]) -> bytes:
    """Says which part of which tensors this rank holds."""
    told = hashlib.sha256()
    for path, shard in shards.items():
        mesh = shard.device_mesh
        held = (path, *shard.shape, shard.dtype, shard.placements, mesh.shape, mesh.get_coordinate())
        told.update(repr(held).encode())
    return told.digest()


def _without(state: dict[str, Any], others: Iterable[_Path], path: _Path = ()) -> dict[str, Any]:
    part: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            part[key] = _without(value, others, (*path, key))
        elif (*path, key) not in others and (ranks.rank() == 0 or _is_sharded(value)):
            part[key] = value
    return part


def _is_sharded(value: Any) -> bool:
    return isinstance(value, DTensor) or (isinstance(value, list) and any(map(_is_sharded, value)))
