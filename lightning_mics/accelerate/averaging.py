"""Averaging of weights over ranks, which shards do not allow: refused in words."""

from __future__ import annotations

import functools
from typing import Any

from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch.distributed.tensor import DTensor

from lightning_mics.core._torch import tree_leaves
from lightning_mics.errors import MiCSError


def check_no_shards(call: str, tensors: Any) -> None:
    """Checks that nobody combines shards over ranks: each rank of a partition holds another part.

    Raises:
        MiCSError: If there is one among ``tensors``.
    """
    if any(isinstance(leaf, DTensor) for leaf in tree_leaves(tensors)):
        raise MiCSError(
            f"{call} was given shards, of which each rank of a partition holds another. Replicas stay equal by "
            "themselves, so weights need no averaging; of one tensor, tensor.full_tensor() is the whole."
        )


def refuse_local_sgd(accelerator_class: type[Accelerator]) -> None:
    """Makes ``LocalSGD`` refuse accelerators of a class: it would average shards of different parts."""
    initialize = LocalSGD.__init__

    @functools.wraps(initialize)
    def check_and_initialize(
        self: Any, accelerator: Any, model: Any, local_sgd_steps: int, enabled: bool = True
    ) -> None:
        if enabled and isinstance(accelerator, accelerator_class) and accelerator.use_distributed:
            raise MiCSError(
                "LocalSGD averages whole parameters over all ranks, which hold shards under MiCS. Leave it out, or set "
                "enabled=False; with gradient_accumulation_steps and accelerator.accumulate(model), replicas meet "
                "once a window."
            )
        initialize(self, accelerator, model, local_sgd_steps, enabled)

    LocalSGD.__init__ = check_and_initialize
