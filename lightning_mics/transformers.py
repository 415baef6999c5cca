"""The way in for the Trainer of Hugging Face transformers.

::

    from lightning_mics.transformers import MiCSTrainer as Trainer

Importing this module makes a launch by ``accelerate launch`` or ``torchrun`` ours, so it must come before
``TrainingArguments`` are made. ``python -m lightning_mics.run`` does the same for scripts that do not know MiCS.
"""

from __future__ import annotations

from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.accelerate.plugin import take_over_launch
from lightning_mics.accelerate.trainer import TrainerMethods

take_over_launch()


class MiCSTrainerMixin(TrainerMethods):
    """Makes a subclass of ``transformers.Trainer`` train with MiCS: ``class Mine(MiCSTrainerMixin, TheirTrainer)``.

    ``gradient_accumulation_steps`` makes windows: the reduce-scatter inside a partition group runs in each microstep,
    the all-reduce between replicas in the last. Checkpoints hold the weights as ``from_pretrained`` reads them, and the
    optimizer in shards that can be loaded at another shard size; they are checked, and named when they are whole.

    Args:
        *args: Those of the Trainer.
        mics_plugin: The settings; by default those of the launch file and the environment.
        **kwargs: Those of the Trainer.
    """

    def __init__(self, *args: Any, mics_plugin: MiCSPlugin | None = None, **kwargs: Any) -> None:
        self.mics_plugin = mics_plugin
        super().__init__(*args, **kwargs)


class MiCSTrainer(MiCSTrainerMixin, Trainer):
    """``transformers.Trainer`` with MiCS; see :class:`MiCSTrainerMixin`."""


class MiCSSeq2SeqTrainer(MiCSTrainerMixin, Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` with MiCS; see :class:`MiCSTrainerMixin`."""
