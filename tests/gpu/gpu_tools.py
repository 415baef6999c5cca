"""What the tests on a card share.

All ranks share one card: the worker pool tells NCCL that each is a host of its own. ``REHEARSE_GPU=1`` runs the same
tests on CPUs and gloo, to see that they run at all.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import extract_stack
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_mics.testing import WorkerPool, worker_device

REHEARSES = os.environ.get("REHEARSE_GPU") == "1"
HAS_CARD = torch.cuda.is_available() and dist.is_nccl_available()
NCCL = "gloo" if REHEARSES else "nccl"
NCCL_AND_GLOO = "gloo" if REHEARSES else "cpu:gloo,cuda:nccl"
NEEDS_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_CARD or REHEARSES), reason="needs a CUDA device and NCCL"),
]


def on_cards(pool: WorkerPool, function: Any, *args: Any, world_size: int = 4, backend: str = NCCL) -> list[Any]:
    """Runs a function on NCCL ranks."""
    return pool.run(function, *args, world_size=world_size, timeout=120, backend=backend)


def synchronize() -> None:
    if worker_device().type == "cuda":
        torch.cuda.synchronize()


def keep_busy() -> None:
    """Gives the compute stream about a tenth of a second of work."""
    if worker_device().type == "cuda":
        torch.cuda._sleep(200_000_000)


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Counts where the host waits for the device, by the innermost line outside of PyTorch, while this is entered."""
    waits: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            frames = [frame for frame in extract_stack() if "/torch/" not in frame.filename]
            frames = [frame for frame in frames if not frame.filename.endswith(("gpu_tools.py", "warnings.py"))]
            parts = frames[-1].filename.split(os.sep)
            waits[f"{'/'.join(parts[-3:])}:{frames[-1].lineno} ({frames[-1].name})"] += 1

    if worker_device().type == "cpu":
        yield waits
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
