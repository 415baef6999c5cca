"""Running a step so that a failure on one rank is a failure on all of them, and nobody waits for ever."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lightning_mics.errors import CheckpointError
from lightning_mics.text import first_of

_NAMED = 4
_OF_CONTENT = (AttributeError, TypeError, pickle.PicklingError)  # what pickle and JSON raise

T = TypeVar("T")

_group: ContextVar[dist.ProcessGroup | None] = ContextVar("_group", default=None)


@contextmanager
def meeting_in(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Has this thread meet the other ranks in a group of all of them; ``None`` is the world."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def meeting_place() -> dist.ProcessGroup | None:
    """Returns the group in which this thread meets the other ranks; ``None`` is the world."""
    return _group.get()


def is_distributed() -> bool:
    """Returns whether there may be other ranks."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns this process's rank, 0 if it is alone."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


@contextmanager
def quiet_dcp(alone: bool) -> Iterator[None]:
    """Silences DCP's remark that it runs in a single process, where that is wanted."""
    if not alone:
        yield
        return
    with warnings.catch_warnings():
        remark = "torch.distributed is disabled, unavailable or uninitialized"
        warnings.filterwarnings("ignore", message=remark, category=UserWarning)
        yield


def describe_error(error: BaseException) -> str:
    """Returns an error in one line; of DCP's collected errors, the first."""
    error = _behind(error)
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _behind(error: BaseException) -> BaseException:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    # What PyTorch cannot finish after the file system's error hides that one.
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return error


def _told(error: BaseException, where: str) -> CheckpointError:
    """Returns what all ranks are told of an error; it may be one that they were told of. Alone, ``where`` is empty."""
    error = _behind(error)
    if isinstance(error, CheckpointError) and error.rank is not None:
        return error
    told = CheckpointError(describe_error(error) + where)
    told.rank, told.is_content = rank() if where else None, isinstance(error, _OF_CONTENT)
    return told


def together(step: Callable[[], T], *, alone: bool = False) -> list[T]:
    """Runs ``step`` on every rank. Collective over the world, unless ``alone``.

    Returns:
        The results of all ranks, in rank order; only this one's if it is alone.

    Raises:
        CheckpointError: On every rank, with the first rank's error, if ``step`` raised anywhere.
    """
    error, result = None, None
    is_alone = alone or world_size() == 1
    try:
        result = step()
    except (Exception, CheckpointException) as problem:
        error = _told(problem, "" if is_alone else f" (on rank {rank()})")
    outcomes: list[Any] = [(error, result)]
    if is_distributed() and not alone:
        outcomes = [None] * world_size()
        dist.all_gather_object(outcomes, (error, result), group=meeting_place())
    for failure, _ in outcomes:
        if failure is not None:
            raise failure
    return [value for _, value in outcomes]


def agree(call: str, **arguments: object) -> None:
    """Checks that all ranks give a call the same arguments. Collective over the world.

    Args:
        call: The call, as users write it.
        **arguments: What is to be the same, in a form that can be compared as text.

    Raises:
        CheckpointError: On every rank, naming an argument, its values and the ranks that gave them.
    """
    given = together(lambda: {name: str(value) for name, value in arguments.items()})
    for name in arguments:
        by_value: dict[str, list[int]] = {}
        for source, said in enumerate(given):
            by_value.setdefault(said[name], []).append(source)
        if len(by_value) > 1:
            told = "; ".join(f"{value} on rank(s) {first_of(sources, _NAMED)}" for value, sources in by_value.items())
            raise CheckpointError(f"{call} was given another {name} on some ranks: {told}. Give all ranks the same.")


def on_each_rank(step: Callable[[], T]) -> T:
    """Runs ``step`` on every rank, and sends nothing but its failures around. Collective over the world.

    Returns:
        This rank's result.

    Raises:
        CheckpointError: On every rank, if ``step`` raised anywhere.
    """
    results: list[T] = []
    together(lambda: results.append(step()))
    return results[0]


def on_first_rank(step: Callable[[], T]) -> T | None:
    """Runs ``step`` on rank 0 while the others wait. Collective over the world.

    Returns:
        The result, on every rank.

    Raises:
        CheckpointError: On every rank, if ``step`` raised.
    """
    return together(lambda: step() if rank() == 0 else None)[0]
