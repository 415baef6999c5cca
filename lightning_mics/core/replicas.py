"""Replicas that are equal: telling by fingerprints, making them so, and problems that are raised on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.core.fingerprints import fingerprints
from lightning_mics.errors import MiCSConfigError, MiCSError, SelfCheckError
from lightning_mics.text import first_of

_MOST_TOLD = 3


def differing(values: Tensor, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Tells which of some integers differ between ranks. Collective over the group: one message, read once.

    Args:
        values: Integers, as many on every rank, where ranks communicate.
        group: The ranks; by default the world.
    """
    lowest = torch.stack([values, ~values])  # the highest is the complement of the complement's lowest
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    return (lowest[0] != ~lowest[1]).tolist()


def require_agreement(values: Mapping[str, object], device: torch.device, beside: object = None) -> bool:
    """Checks that all ranks hold the same values, so that a difference is an error on every rank and not a hang.

    Collective over the world. Values travel only where their digests differ.

    Args:
        values: By what is compared, for the message: picklable values that print as what they are.
        device: Where this rank communicates.
        beside: What may differ, compared in the same message.

    Returns:
        Whether all ranks have the same ``beside``.

    Raises:
        MiCSConfigError: On every rank, if two ranks differ.
    """
    digests = [hashlib.blake2b(repr(value).encode(), digest_size=8).digest() for value in (*values.values(), beside)]
    numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    *different, differs_beside = differing(torch.tensor(numbers, dtype=torch.int64, device=device))
    for (what, value), differs in zip(values.items(), different, strict=True):
        if differs:
            _raise_difference(what, value)
    return not differs_beside


def _raise_difference(what: str, value: object) -> None:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    rank = next(rank for rank, other in enumerate(values) if repr(other) != repr(values[0]))
    first, other = values[0], values[rank]
    if isinstance(first, list) and isinstance(other, list):
        first, other = _what_differs(first, other)
    raise MiCSConfigError(
        f"Ranks differ in {what}: rank 0 has {first}, rank {rank} has {other}. "
        "Give every rank the same arguments and environment."
    )


def _what_differs(first: list[Any], other: list[Any]) -> tuple[str, str]:
    """Returns the first few entries that one list has and the other has not, or where their order differs."""
    if len(first) == len(other):
        pairs = [pair for pair in zip(first, other, strict=True) if pair[0] != pair[1]]
        return first_of([pair[0] for pair in pairs], _MOST_TOLD), first_of([pair[1] for pair in pairs], _MOST_TOLD)
    return _with_surplus(first, other), _with_surplus(other, first)


def _with_surplus(entries: list[Any], others: list[Any]) -> str:
    known = set(others)
    surplus = [entry for entry in entries if entry not in known]
    return f"{len(entries)} entries" + (f" ({first_of(surplus, _MOST_TOLD)} on it alone)" if surplus else "")


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
        listed = [f"  {_name_ranks(ranks)}: {problem}" for problem, ranks in by_problem.items()]
        more = [f"  ... and {len(listed) - 8} more"] if len(listed) > 8 else []
        raise SelfCheckError("\n".join(["MiCS self-check failed:", *listed[:8], *more, advice]))


def _name_ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank {shown}" if len(ranks) <= 8 else f"{len(ranks)} ranks ({shown}, ...)"


def equalize_replicas(
    named_tensors: Iterable[tuple[str, Tensor]], device: torch.device, error: Exception | None = None
) -> int:
    """Makes full (not yet sharded) tensors equal on all ranks: those that differ become rank 0's.

    Collective over the world. Tensors that are equal already cost only their fingerprint.

    Args:
        named_tensors: Names and tensors, the same on every rank.
        device: Where this rank communicates.
        error: What kept this rank from giving them their values.

    Returns:
        The number of tensors that differed.

    Raises:
        MiCSError: On the other ranks, if one has an error, which that one raises.
        SelfCheckError: On every rank, if tensors still differ afterwards.
    """
    tensors = dict(named_tensors)
    different = _different(tensors, device, error)
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


def _different(tensors: dict[str, Tensor], device: torch.device, error: Exception | None = None) -> list[str]:
    if not tensors:
        return []
    values = torch.zeros(1 + len(tensors), dtype=torch.int64, device=device)
    if error is None:
        values[0], values[1:] = 1, fingerprints(list(tensors.values()), device)
    somebody_failed, *differ = differing(values)
    if somebody_failed or error is not None:
        _raise_somebodys(error)
    return [name for name, differs in zip(tensors, differ, strict=True) if differs]


def _raise_somebodys(error: Exception | None) -> None:
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    rank = next(rank for rank, other in enumerate(errors) if other is not None)
    raise MiCSError(f"Rank {rank} could not build its part of the model: {errors[rank]}")
