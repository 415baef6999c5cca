"""Checkpoints that are written while training goes on.

What is to be saved is copied to host memory at the call, and written by a thread of each rank; those threads meet in a
group of their own. One checkpoint at a time is in flight: the next save, loading, the end of the world's process groups
and that of the process wait for it.
"""

from __future__ import annotations

import copy
import functools
import io
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mics.checkpoint import drafts, ranks
from lightning_mics.checkpoint.storage import Place, Remote, place
from lightning_mics.core._torch import (
    before_destroying_world,
    local_tensor,
    new_world_group,
    tree_map_only,
    with_local,
)
from lightning_mics.core.failures import has_failed
from lightning_mics.errors import CheckpointError

_LAST_SECONDS = 10.0  # that a process which failed has for a checkpoint; peers may never come


class PendingCheckpoint:
    """A checkpoint that is being written, or was.

    Attributes:
        path: Its name; an earlier checkpoint has it until this one is whole.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._afterwards: list[Callable[[], None]] = []
        self._takes_more = True
        self._error: CheckpointError | None = None
        self._is_told = False

    @property
    def is_written(self) -> bool:
        """Whether it is whole under its name."""
        return self._over.is_set() and self._error is None

    def wait(self) -> None:
        """Waits until the checkpoint is there. Each rank by itself: the writing is what takes all of them.

        Raises:
            CheckpointError: On every rank that waits, if writing failed on any; the earlier checkpoint is untouched.
        """
        self._over.wait()
        if self._error is not None:
            self._is_told = True
            raise CheckpointError(str(self._error)) from self._error

    def _write(self, finish: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
        try:
            with ranks.meeting_in(group):
                finish()
                ranks.on_each_rank(self._go_on)
        except BaseException as error:
            known = error if isinstance(error, CheckpointError) else None
            self._error = known or CheckpointError(f"Saving {self.path} failed: {ranks.describe_error(error)}")
        finally:
            self._over.set()

    def _go_on(self) -> None:
        while True:
            with self._lock:
                if not self._afterwards:
                    self._takes_more = False
                    return
                action = self._afterwards.pop(0)
            try:
                action()
            except OSError as error:
                raise CheckpointError(f"{self.path} was saved, but what was to follow failed: {error}") from error

    def _then(self, action: Callable[[], None]) -> None:
        with self._lock:
            if self._takes_more:
                self._afterwards.append(action)
                return
        self._over.wait()
        action()


class _Process:
    """What this process knows of its checkpoints."""

    pending: PendingCheckpoint | None = None


_groups: weakref.WeakKeyDictionary[Any, dist.ProcessGroup] = weakref.WeakKeyDictionary()  # by their worlds


def carry_out(path: Place, finish: Callable[[], None], *, background: bool) -> PendingCheckpoint:
    """Writes a checkpoint, now or while training goes on. Collective over the world.

    Args:
        path: Its name.
        finish: Writes it, and raises on all ranks or on none; touches nothing that training changes.
        background: Whether a thread runs ``finish``.
    """
    pending = PendingCheckpoint(path)
    if not background:
        finish()
        pending._over.set()
        return pending
    group = _own_group()
    _wait_before_the_end()
    _Process.pending = pending
    threading.Thread(target=pending._write, args=(finish, group), name="mics-checkpoint", daemon=True).start()
    return pending


def wait_for_checkpoints() -> None:
    """Waits until the checkpoint that is being written in the background, if any, is whole.

    Raises:
        CheckpointError: On every rank, if writing failed on any and nobody was told; the earlier checkpoint is
            untouched.
    """
    pending = in_flight()
    if pending is not None:
        pending.wait()


def settle() -> PendingCheckpoint | None:
    """Waits until nothing is written; returns what was written last."""
    pending = _Process.pending
    if pending is not None:
        pending._over.wait()
    return pending


def in_flight() -> PendingCheckpoint | None:
    """Returns the checkpoint that is being written, or was and nobody was told that it failed."""
    pending = _Process.pending
    return None if pending is None or pending._is_told else pending


def afterwards(action: Callable[[], None]) -> None:
    """Runs what may only happen when the checkpoint in flight is whole: by the thread that writes it, or at once.

    Args:
        action: Such as deleting an older checkpoint. Left out if writing fails.
    """
    pending = in_flight()
    if pending is None:
        action()
    else:
        pending._then(action)


def was_saved_last(path: str | os.PathLike[str]) -> bool:
    """Returns whether the last checkpoint that was begun in the background has this name; it may not be there yet."""
    return _Process.pending is not None and _Process.pending.path == place(path)


def remove(path: str | os.PathLike[str] | Remote, storage_options: Mapping[str, Any] | None = None) -> None:
    """Deletes a checkpoint, behind the one that is being written. It loses its name first."""
    afterwards(functools.partial(drafts.remove, place(path, storage_options)))


def _own_group() -> dist.ProcessGroup | None:
    """Returns a group for threads alone, made at first use: what training sends must not meet it. Collective then."""
    world = dist.group.WORLD if ranks.is_distributed() else None
    if world is None:
        return None
    if world not in _groups:
        _groups[world] = new_world_group("mics_checkpoints", "gloo")
    return _groups[world]


@functools.cache
def _wait_before_the_end() -> None:
    before_destroying_world(wait_for_checkpoints)
    # As early as there is: pools of threads, which uploads need, are shut before other functions at exit.
    threading._register_atexit(_end)  # type: ignore[attr-defined]
    os.register_at_fork(after_in_child=_forget)  # which does not have the thread


def _forget() -> None:
    _Process.pending = None


def _end() -> None:
    pending = _Process.pending
    if pending is None:
        return
    pending._over.wait(_LAST_SECONDS if has_failed() else None)
    if pending._error is not None and not pending._is_told:
        pending._is_told = True
        print(f"lightning-mics: {pending._error}", file=sys.__stderr__, flush=True)


# Copies.


class HostCopies:
    """Copies of tensors in host memory, pinned if they come from CUDA; the memory is kept for the next save."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns a copy of a nested state; it holds until the next one is made."""
        taken: list[Tensor] = []
        known: dict[Any, Tensor] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return copy.deepcopy(value)
            local = local_tensor(value).detach()
            # What one memory holds under several names is copied once.
            key = (local.data_ptr(), local.shape, local.stride(), local.dtype) if local.numel() else object()
            if key not in known:
                known[key] = self._memory(len(taken), local).copy_(local, non_blocking=True)
                taken.append(known[key])
            return with_local(value, known[key]) if isinstance(value, DTensor) else known[key]

        copies: dict[str, Any] = tree_map_only(object, copied, state)
        self._kept = taken
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _memory(self, index: int, like: Tensor) -> Tensor:
        if index < len(self._kept):
            kept = self._kept[index]
            if (kept.shape, kept.stride(), kept.dtype) == (like.shape, like.stride(), like.dtype):
                return kept
        return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)


host_copies = HostCopies()


def pickled(content: Any) -> memoryview:
    """Returns what ``torch.save`` would write."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()
