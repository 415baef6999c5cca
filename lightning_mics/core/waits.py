"""What the main thread of a rank waits for in collectives, on devices whose collectives hold it up: CPUs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist

from lightning_mics.core import collectives
from lightning_mics.core._torch import fsdp_collectives
from lightning_mics.core.cpu.collectives import RingAllGather, RingReduceScatter
from lightning_mics.core.cpu.rings import ThreadedWork
from lightning_mics.core.gradients.agreement import Agreement
from lightning_mics.core.gradients.unit import UnitGradients
from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.metrics import Hop


@contextmanager
def timed_waits(note: Callable[[str, float], None]) -> Iterator[None]:
    """Tells how long the main thread waits in collectives of FSDP2 and of ours, inside this context.

    Args:
        note: Told a hop's name and seconds, after each wait.
    """
    gather, reduce = Hop.PARTITION_GATHER.value, Hop.PARTITION_REDUCE.value
    replicate = Hop.REPLICATION_REDUCE.value
    fsdp = fsdp_collectives()
    fsdp_dist = SimpleNamespace(**vars(dist))  # FSDP2's own, so that its all-reduce is told apart
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(fsdp, "dist", fsdp_dist))
        for owner, name, hop in (
            (fsdp.DefaultAllGather, "__call__", gather),
            (fsdp.DefaultReduceScatter, "__call__", reduce),
            (collectives.FlatAllGather, "__call__", gather),
            (collectives.HierarchicalAllGather, "__call__", gather),
            (collectives.FlatReduceScatter, "__call__", reduce),
            (collectives.HierarchicalReduceScatter, "__call__", reduce),
            (RingAllGather, "__call__", gather),
            (RingReduceScatter, "__call__", reduce),
            (ThreadedWork, "wait", gather),
            (UnitGradients, "finish_reduction", reduce),
            (UnitGradients, "wait", replicate),
            (AccumulationWindow, "put_rows", replicate),
            (Agreement, "reach", replicate),
            (fsdp_dist, "all_reduce", replicate),
        ):
            stack.enter_context(_timed(owner, name, functools.partial(note, hop)))
        yield


_running: list[str] = []  # timed calls of the main thread


@contextmanager
def _timed(owner: Any, name: str, note: Callable[[float], None]) -> Iterator[None]:
    original = owner.__dict__[name]

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if _running:  # what is inside of another counts with that
            return original(*args, **kwargs)
        _running.append(name)
        begin = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            note(time.perf_counter() - begin)
            _running.pop()

    with mock.patch.object(owner, name, timed):
        yield
