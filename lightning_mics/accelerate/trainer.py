"""What makes the Trainer of transformers ours: methods for a class before it, in the order of resolution.

Nothing of ``transformers`` is imported here before a Trainer is used: :mod:`lightning_mics.run` puts these methods into
``transformers.trainer`` while that is being imported.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_mics import checkpoint as checkpoints
from lightning_mics.accelerate.accelerator import MiCSAccelerator
from lightning_mics.accelerate.plugin import MiCSPlugin
from lightning_mics.accelerate.resuming import (
    OPTIMIZER,
    OPTIMIZER_FOLDER,
    SCHEDULER,
    STATE,
    check_listed,
    fill_model,
    find_checkpoint,
    keep_additions,
)
from lightning_mics.checkpoint import ranks
from lightning_mics.checkpoint.savers import given
from lightning_mics.core._torch import is_unread
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.buffers import broadcast_buffers
from lightning_mics.core.log import inform
from lightning_mics.core.runtime import is_sharded

_CHECKPOINT = "checkpoint-{}"


class TrainerMethods:
    """The methods; a class that has them needs a Trainer behind it, and ``mics_plugin``."""

    accelerator: MiCSAccelerator
    accelerator_class: type[MiCSAccelerator] = MiCSAccelerator
    mics_plugin: MiCSPlugin | None = None
    _aside: Path | None = None  # the checkpoint that is being written, under its name in a hidden folder
    _shared: Path | None = None  # the same where all ranks see it, if it is written in the background
    _weights_only: bool | None = None
    _strict = True
    _fills_later = False  # a model without values has no memory before it is prepared

    def create_accelerator_and_postprocess(self: Any) -> None:
        """Gives the Trainer a :class:`~lightning_mics.accelerate.MiCSAccelerator`."""
        checkpoints.local_place(self.args.output_dir, "the Trainer of transformers")
        with _accelerator_is(functools.partial(self.accelerator_class, mics_plugin=self.mics_plugin)):
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator.joins_loaders = False  # it fetches the batches of a window at once, as many on all ranks
        if self.accelerator.mics_plugin.config.uneven_inputs != "error":
            inform("uneven_inputs does nothing here: the Trainer of transformers gives all ranks as many batches.")

    def _move_model_to_device(self: Any, model: nn.Module, device: torch.device) -> None:
        if self.accelerator.topology is None:
            super()._move_model_to_device(model, device)  # type: ignore[misc]
        # Otherwise sharding places the parameters; the whole model may not fit.

    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates or predicts, on every rank with the buffers (running statistics) of rank 0."""
        if is_sharded(self.model):
            broadcast_buffers(self.model)
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole weights for ``from_pretrained``, from the main process. Collective over the world."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        broadcast_buffers(self.model)
        with on_all_ranks("trainer.save_model"):
            weights = self.accelerator.get_state_dict(self.model)
        folder = output_dir or self.args.output_dir
        with given(self.model, weights):  # for a Trainer whose models save by themselves
            ranks.on_each_rank(lambda: self._save(folder, state_dict=_each_once(self.model, weights)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _get_output_dir(self: Any, trial: Any) -> str:
        if self._aside is not None:
            return str(self._aside.parent)
        return str(super()._get_output_dir(trial))  # type: ignore[misc]

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        if self._aside is None:  # it has its name
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint, which appears under its name when it is whole. Collective over the world."""
        step, run_dir = self.state.global_step, self._get_output_dir(trial)
        folder, save = Path(run_dir) / _CHECKPOINT.format(step), super()._save_checkpoint  # type: ignore[misc]
        background = self._saves_in_background()

        def write(aside: Path, shared: Path) -> None:
            self._aside, self._shared = aside, shared if background else None
            try:
                save(model, trial)
            finally:
                self._aside = self._shared = None
            self._name_best(run_dir)
            if self.args.should_save:
                self.state.save_to_json(str(aside / STATE))
                keep_additions(folder, aside)

        layout = self.accelerator.layout
        shard_size = 1 if layout is None else layout.shard_size
        with on_all_ranks("saving a checkpoint of the Trainer"):
            checkpoints.save_folder(folder, write, step=step, shard_size=shard_size, background=background)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            from transformers.trainer_utils import rotate_checkpoints

            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            checkpoints.afterwards(
                lambda: rotate_checkpoints(run_dir, limit, best_model_checkpoint=best, use_mtime=True)
            )

    def _saves_in_background(self: Any) -> bool:
        return self.accelerator.mics_plugin.config.async_checkpoint and not self.args.push_to_hub

    def _finalize_training(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Ends the training when its last checkpoint is whole: the best is loaded, and others are deleted."""
        checkpoints.wait_for_checkpoints()
        return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]

    def _name_best(self: Any, run_dir: str) -> None:
        """Notes where the best checkpoint is going to be: the Trainer saw none but the one that is being written."""
        best = self.state.best_global_step
        if best and self.args.save_strategy != "no":
            folder = Path(run_dir) / _CHECKPOINT.format(best)
            if best == self.state.global_step or folder.exists():
                self.state.best_model_checkpoint = str(folder)

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        inner = self.optimizer.optimizer
        state = {"optimizer_0": checkpoints.optimizer_state(self.model, inner)}
        folder = (self._shared or Path(output_dir)) / OPTIMIZER_FOLDER
        checkpoints.save_sharded(folder, state, {}, background=self._shared is not None)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def train(
        self: Any,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        weights_only: bool | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Trains.

        Args:
            resume_from_checkpoint: A checkpoint, which must be whole; ``True`` for the newest that is.
            *args: As in the Trainer.
            weights_only: ``False`` trusts a checkpoint of ours that cannot be checked.
            strict: Whether saved states that do not fit the optimizer are an error.
            **kwargs: As in the Trainer.

        Raises:
            CheckpointError: On every rank, if a checkpoint is damaged or does not fit.
        """
        self._weights_only, self._strict = weights_only, strict
        checkpoints.wait_for_checkpoints()
        if self._saves_in_background() and (early := _that_act_on_saves(self.callback_handler.callbacks)):
            inform(f"async_checkpoint=True: on_save of {', '.join(early)} is called before the checkpoint is there.")
        found = find_checkpoint(self.args.output_dir, resume_from_checkpoint, weights_only)
        return super().train(found, *args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, inner = Path(checkpoint), self.optimizer.optimizer
        if self._fills_later:
            ranks.on_each_rank(lambda: fill_model(self.model, folder))
        if (folder / OPTIMIZER_FOLDER).exists():
            checkpoints.load_into(
                folder / OPTIMIZER_FOLDER,
                self.model,
                {"optimizer_0": inner},
                model_key=None,
                strict=self._strict,
                weights_only=self._weights_only,
            )
        elif (folder / OPTIMIZER).is_file():
            saved = folder / OPTIMIZER
            ranks.on_each_rank(
                lambda: checkpoints.fill_optimizer(
                    saved, self.model, inner, checkpoints.read_file(saved, True), strict=self._strict
                )
            )
        if (folder / SCHEDULER).is_file():
            self.lr_scheduler.load_state_dict(checkpoints.read_file(folder / SCHEDULER, True))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._fills_later = any(param.is_meta or is_unread(param) for param in self.model.parameters())
        if not self._fills_later:
            ranks.on_each_rank(lambda: fill_model(self.model, Path(resume_from_checkpoint)))

    def _load_best_model(self: Any) -> None:
        best = Path(self.state.best_model_checkpoint)
        check_listed(best, self._weights_only)
        ranks.on_each_rank(lambda: fill_model(self.model, best))


@contextmanager
def _accelerator_is(factory: Any) -> Iterator[None]:
    """Makes the Trainer's module build its accelerator with ``factory``."""
    trainer_module: Any = sys.modules["transformers.trainer"]
    original = trainer_module.Accelerator
    trainer_module.Accelerator = factory
    try:
        yield
    finally:
        trainer_module.Accelerator = original


def _that_act_on_saves(callbacks: Iterable[Any]) -> list[str]:
    from transformers import TrainerCallback

    return [type(callback).__name__ for callback in callbacks if type(callback).on_save is not TrainerCallback.on_save]


def _each_once(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Leaves out further names of tied weights, where the Trainer itself writes the file and cannot."""
    if hasattr(model, "save_pretrained"):
        return weights
    first = {id(tensor): name for name, tensor in reversed(weights.items())}
    return {name: tensor for name, tensor in weights.items() if first[id(tensor)] == name}
