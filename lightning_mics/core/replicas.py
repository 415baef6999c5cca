"""Replicas that are equal: fingerprints of tensors, making them equal, and problems that are raised on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.core._torch import local_tensor
from lightning_mics.errors import SelfCheckError

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22


def fingerprint(tensor: Tensor) -> int:
    """Returns a 64-bit fingerprint of a tensor's bits (of the local shard, for a DTensor).

    Equal tensors have equal fingerprints; the position of each value counts.
    """
    local = local_tensor(tensor)
    words = local.detach().contiguous().view(-1).view(_WORDS.get(local.element_size(), torch.uint8))
    total = 0
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64)
        weights = torch.arange(2 * start + 1, 2 * (start + chunk.numel()) + 1, 2, device=words.device)
        total += int((chunk * weights).sum())
    return (total + 2**63) % 2**64 - 2**63


def raise_together(problems: Sequence[str], advice: str) -> None:
    """Raises on every rank if any rank has a problem. Collective over the world.

    Raises:
        SelfCheckError: Listing the first few problems, with their ranks.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(problems))
    by_problem: dict[str, list[int]] = {}
    for rank, found in enumerate(gathered):
        for problem in found:
            by_problem.setdefault(problem, []).append(rank)
    if by_problem:
        listed = [f"  rank {', '.join(map(str, ranks))}: {problem}" for problem, ranks in by_problem.items()]
        more = [f"  ... and {len(listed) - 8} more"] if len(listed) > 8 else []
        raise SelfCheckError("\n".join(["MiCS self-check failed:", *listed[:8], *more, advice]))


def equalize_replicas(named_tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> int:
    """Makes full (not yet sharded) tensors equal on all ranks: those that differ become rank 0's.

    Collective over the world. Tensors that are equal already cost only their fingerprint.

    Args:
        named_tensors: Names and tensors, the same on every rank.
        device: Where this rank communicates.

    Returns:
        The number of tensors that differed.

    Raises:
        SelfCheckError: On every rank, if tensors still differ afterwards.
    """
    tensors = dict(named_tensors)
    different = _different(tensors, device)
    for name in different:
        source = tensors[name].detach()
        staged = source.to(device).contiguous()
        dist.broadcast(staged, src=0)
        if staged.data_ptr() != source.data_ptr():
            source.copy_(staged)
    if different:
        left = _different({name: tensors[name] for name in different}, device)
        raise_together([f"{name} differs from rank 0 after the broadcast" for name in left], "Check the network.")
    return len(different)


def _different(tensors: dict[str, Tensor], device: torch.device) -> list[str]:
    if not tensors:
        return []
    prints = torch.tensor([fingerprint(tensor) for tensor in tensors.values()], dtype=torch.int64, device=device)
    low, high = prints.clone(), prints
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return [name for name, differs in zip(tensors, (low != high).tolist(), strict=True) if differs]
