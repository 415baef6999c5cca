"""Process groups and their collectives."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as _c10d
from torch.distributed.tensor import DTensor

from lightning_mics.core._needs import require

require(_c10d, "_process_group_name", "_coalescing_manager", "_get_default_store", "_abort_process_group", "_world")

# torch 2.13 renamed the single-tensor collectives and deprecated the old names.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_group_name = _c10d._process_group_name

# Those that take all ranks of a group.
_COLLECTIVES = frozenset(
    [
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_single",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "gather",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
        "scatter",
    ]
)

_UNUSED_TAG = 19_783


def batched(group: dist.ProcessGroup, device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context that launches the collectives inside it at once, where the backend can (gloo cannot)."""
    if device.type != "cuda" or not getattr(group._get_backend(device), "supports_coalescing", False):
        return nullcontext()
    return dist._coalescing_manager(group=group, device=device)


def is_gloo(group: dist.ProcessGroup) -> bool:
    """Returns whether CPU tensors of ``group`` travel by gloo."""
    if not dist.is_gloo_available() or not carries_cpu_tensors(group):
        return False
    return isinstance(group._get_backend(torch.device("cpu")), dist.ProcessGroupGloo)


def carries_cpu_tensors(group: dist.ProcessGroup) -> bool:
    """Returns whether CPU tensors can travel in a group."""
    return torch.device("cpu") in group._device_types


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Returns how long collectives of a group on a device may wait; ``None`` where its backend does not tell."""
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


def new_local_group(
    ranks: Sequence[int], name: str, timeout: timedelta | None, backend: str | None = None
) -> dist.ProcessGroup:
    """Makes a group by its members alone.

    PyTorch's own name for such a group counts the groups that a rank is in, which members need not agree on.

    Args:
        ranks: Its members, of which this rank is one.
        name: The same on all members, and of no other group of this world, also of none that was destroyed.
        timeout: How long its collectives may wait; ``None`` for the backend's default.
        backend: ``None`` for the world's.
    """
    _c10d._process_group_name = lambda *args, **kwargs: _c10d.GroupName(name)
    try:
        return dist.new_group(
            list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True, group_desc=name
        )
    finally:
        _c10d._process_group_name = _group_name


def new_world_group(name: str, backend: str) -> dist.ProcessGroup:
    """Makes a group of all ranks, as patient as the world; see :func:`new_local_group`. Collective."""
    world = dist.group.WORLD
    assert world is not None
    timeout = group_timeout(world, world._device_types[0])
    return new_local_group(range(world.size()), name, timeout, backend)


def before_destroying_world(action: Callable[[], None]) -> None:
    """Has ``action`` run before all process groups are destroyed."""
    original = dist.destroy_process_group

    @functools.wraps(original)
    def destroy(group: dist.ProcessGroup | None = None) -> None:
        if group is None or group is dist.group.WORLD:
            action()
        original(group)

    dist.destroy_process_group = _c10d.destroy_process_group = destroy


def default_store(kinds: tuple[type[dist.Store], ...] = (dist.TCPStore,)) -> dist.Store | None:
    """Returns the world's store if that is a server that all ranks reach, and ``None`` else.

    Nobody may keep it: the server lives as long as a reference, and a new world must not meet its keys.

    Args:
        kinds: Which stores will do. Those of files never tell that a peer, or the file, is gone.
    """
    if not dist.is_initialized():
        return None
    store = _c10d._get_default_store()
    inner: Any = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    return store if isinstance(inner, kinds) else None


def launched_by_group() -> dict[str, tuple[dist.ProcessGroup, int]]:
    """Returns all groups of this rank by name, with the number of collectives and messages that it launched in each."""
    found: dict[str, tuple[dist.ProcessGroup, int]] = {}
    for group in list(_c10d._world.pg_map):
        with suppress(RuntimeError):  # its backend does not count, or not yet
            found[group.group_name] = group, group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return found


def collective_of(frame: FrameType) -> tuple[str, dist.ProcessGroup] | None:
    """Returns the collective that a frame of Python is in, and the group that it runs in."""
    code = frame.f_code
    if code.co_name == "full_tensor" and isinstance(tensor := frame.f_locals.get("self"), DTensor):
        return ("full_tensor", tensor.device_mesh.get_group()) if tensor.device_mesh.ndim == 1 else None
    if code.co_filename != _c10d.__file__ or code.co_name not in _COLLECTIVES:
        return None
    group = frame.f_locals.get("group") or dist.group.WORLD
    return (code.co_name, group) if isinstance(group, dist.ProcessGroup) else None


def break_group(group: dist.ProcessGroup) -> None:
    """Ends, with an error, what this rank has in flight in a group and what others wait for it to do."""
    if not is_gloo(group):
        group.abort()
        return
    # A message that does not come in time takes all connections of a gloo group with it; one from a rank that is gone
    # fails at once, and takes none.
    for other in range(group.size()):
        if other != group.rank():
            with suppress(RuntimeError):
                group.recv([torch.zeros(1)], other, _UNUSED_TAG).wait(timedelta(milliseconds=1))


def abort_groups() -> None:
    """Ends all process groups without waiting for what is in flight, where the backend can."""
    _c10d._abort_process_group()


def wait_for_gloo_threads(patience: float = 2.0) -> None:
    """Waits until gloo's threads have let go of their tensors, a moment after a collective is done.

    A thread that does so while Python ends aborts the process, and the threads of a group that a mesh still holds live
    on. Three looks in a row must find them asleep, as one that waits for Python's lock sleeps as well.

    Args:
        patience: Seconds after which it gives up, as collectives whose peers are gone never end.
    """
    end, quiet = time.monotonic() + patience, 0
    while quiet < 3 and time.monotonic() < end:
        time.sleep(0.005)  # gives Python's lock to whoever wants it
        quiet = quiet + 1 if _gloo_threads_sleep() else 0


def _gloo_threads_sleep() -> bool:
    for thread in Path("/proc/self/task").glob("*"):  # empty where there is no such folder
        try:
            _, _, facts = (thread / "stat").read_text().partition("(")
        except OSError:  # it has ended
            continue
        name, _, state = facts.rpartition(")")
        if name.startswith("pt_gloo") and state.split()[0] == "R":
            return False
    return True


def is_premul_sum(op: object) -> bool:
    """Returns whether ``op`` scales its input before summing (a custom gradient divide factor on NCCL)."""
    return not isinstance(op, dist.ReduceOp.RedOpType) and op == dist.ReduceOp.PREMUL_SUM
