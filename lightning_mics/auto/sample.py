"""Samples: what a rank computes with in a microstep."""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_mics.core._torch import tree_map_only
from lightning_mics.trace.steps import tensors_in

_FETCH_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a rank computes with in a microstep.

    Attributes:
        batch: A batch of one sample or more, as the model's step takes it.
        micro_batch: Number of samples in a microstep.
        through_forward: Whether it is for the model's ``forward``, also where the model has a ``training_step``.
    """

    batch: Any = field(repr=False)
    micro_batch: int
    through_forward: bool = False

    @classmethod
    def of(cls, batch: Any, *, through_forward: bool = False) -> Sample:
        """Takes a whole micro-batch; how many samples it has is the first dimension of its first tensor."""
        sizes = [tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()]
        return cls(batch=batch, micro_batch=max(1, *sizes[:1], 1), through_forward=through_forward)


def sample_of(loader: object) -> Sample | None:
    """Returns the first sample of a training DataLoader, with its batch size.

    A worker process fetches it: a dataset may open files, or draw numbers, when it is first asked, and that must not
    happen here. ``None`` where the sample cannot be had like this: of datasets without indices, or if anything goes
    wrong.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    try:
        with random_states_kept():
            if loader.batch_sampler is None:
                return Sample.of(_fetch(loader, batch_size=None))
            micro_batch = getattr(loader.batch_sampler, "batch_size", None)
            if not isinstance(micro_batch, int) or micro_batch < 1:
                return None
            return Sample(batch=_fetch(loader, batch_size=1), micro_batch=micro_batch)
    except Exception as error:
        # What a worker raises is part of a cycle that holds the loader, and with it the worker.
        traceback.clear_frames(error.__traceback__)
        return None


def _fetch(loader: DataLoader[Any], batch_size: int | None) -> Any:
    """Returns what the loader makes of the first index of its dataset, from a worker of its own kind."""
    first: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=[0],
        num_workers=1,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=_FETCH_SECONDS,
    )
    batches = iter(first)
    try:
        return tree_map_only(Tensor, Tensor.clone, next(batches))
    finally:
        del batches  # ends the worker


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restores the states of Python's, NumPy's and PyTorch's generators."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
