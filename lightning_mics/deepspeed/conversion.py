"""The result: settings of MiCS, what belongs into the training script, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lightning_mics.config import MiCSConfig
from lightning_mics.precision import PRECISIONS

Outcome = Literal["kept", "replaced", "dropped", "unknown"]


@dataclass(frozen=True)
class Field:
    """One leaf field of the JSON, and what became of it.

    Attributes:
        key: Its place, with dots: ``"zero_optimization.stage"``.
        value: Its value in the file.
        outcome: ``"kept"`` (the same here, or in the script), ``"replaced"`` (became something else, or is not needed),
            ``"dropped"`` (has no counterpart), or ``"unknown"``.
        note: What became of it, or what to do instead.
    """

    key: str
    value: Any
    outcome: Outcome
    note: str

    def __str__(self) -> str:
        return f"{self.key} = {json.dumps(self.value)}: {self.outcome}. {self.note}"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer to create in the training script.

    Attributes:
        name: Its name in ``torch.optim``.
        arguments: Keyword arguments.
        open: Names of the arguments that the file leaves to the script (``"auto"``).
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    open: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a DeepSpeed configuration becomes.

    Attributes:
        config: The settings of MiCS.
        source: Name of the file, or a word for what was given instead.
        gradient_accumulation_steps: Microsteps of a window; ``None`` where the file leaves it open.
        micro_batch_size: Samples a rank sees in a microstep.
        global_batch_size: Samples of an optimizer step, over all ranks.
        world_size: Number of ranks: the one given, or what the batch sizes imply.
        clip_norm: Norm at which gradients are clipped; ``None`` for no clipping.
        precision: Lightning's ``precision``; ``None`` for its default.
        optimizer: The optimizer to create; ``None`` if the file names none that PyTorch has.
        hints: What the file does not say, and DeepSpeed does by default.
        report: Every leaf field of the file, once, in the file's order.
    """

    config: MiCSConfig
    source: str
    gradient_accumulation_steps: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    world_size: int | None = None
    clip_norm: float | None = None
    precision: str | None = None
    optimizer: Optimizer | None = None
    hints: tuple[str, ...] = ()
    report: tuple[Field, ...] = ()

    @property
    def mixed_precision(self) -> str | None:
        """Accelerate's ``mixed_precision``; ``None`` for its default."""
        return None if self.precision is None else PRECISIONS[self.precision].accelerate or "no"

    def settings(self) -> dict[str, Any]:
        """Returns the shard size and the settings of ``config`` that differ from the defaults, as plain values."""
        values = {name: getattr(self.config, name) for name in MiCSConfig.setting_names()}
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in values.items()
            if name == "shard_size" or value != getattr(MiCSConfig(), name)
        }
