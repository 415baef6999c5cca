"""What makes the Trainer of transformers ours: methods for a class before it, in the order of resolution.

Nothing of ``transformers`` is imported here before a Trainer is used: :mod:`lightning_mics.run` puts these methods into
``transformers.trainer`` while that is being imported.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lightning_mics import checkpoint as checkpoints
from lightning_mics.accelerate.accelerator import MiCSAccelerator
from lightning_mics.accelerate.plugin import MiCSPlugin
from lightning_mics.accelerate.whole import given
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.buffers import broadcast_buffers
from lightning_mics.core.log import inform
from lightning_mics.core.runtime import is_sharded
from lightning_mics.errors import CheckpointError

OPTIMIZER_FOLDER = "optimizer_mics"
_SCHEDULER = "scheduler.pt"
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"


class TrainerMethods:
    """The methods; a class that has them needs a Trainer behind it, and ``mics_plugin``."""

    accelerator: MiCSAccelerator
    accelerator_class: type[MiCSAccelerator] = MiCSAccelerator
    mics_plugin: MiCSPlugin | None = None

    def create_accelerator_and_postprocess(self: Any) -> None:
        """Gives the Trainer a :class:`~lightning_mics.accelerate.MiCSAccelerator`."""
        with _accelerator_is(functools.partial(self.accelerator_class, mics_plugin=self.mics_plugin)):
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.accelerator.mics_plugin.config.async_checkpoint:
            inform("async_checkpoint=True does nothing here: the Trainer of transformers waits for its checkpoints.")

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
        with given(self.model, weights):  # for a Trainer whose models save by themselves
            self._save(output_dir or self.args.output_dir, state_dict=_each_once(self.model, weights))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        inner = self.optimizer.optimizer
        state = {"optimizer_0": checkpoints.optimizer_state(self.model, inner)}
        checkpoints.save_sharded(Path(output_dir) / OPTIMIZER_FOLDER, state, {})
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, _SCHEDULER))

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        folder = None if checkpoint is None else Path(checkpoint) / OPTIMIZER_FOLDER
        if folder is None or not folder.exists():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        checkpoints.load_into(folder, self.model, {"optimizer_0": self.optimizer.optimizer}, model_key=None)
        self.lr_scheduler.load_state_dict(torch.load(folder.parent / _SCHEDULER, weights_only=True))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_sharded(self.model):
            _fill(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self: Any) -> None:
        if is_sharded(self.model):
            _fill(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()  # type: ignore[misc]


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


def _each_once(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Leaves out further names of tied weights, where the Trainer itself writes the file and cannot."""
    if hasattr(model, "save_pretrained"):
        return weights
    first = {id(tensor): name for name, tensor in reversed(weights.items())}
    return {name: tensor for name, tensor in weights.items() if first[id(tensor)] == name}


def _fill(model: nn.Module, folder: Path) -> None:
    """Loads the weights that ``save_model`` wrote into a sharded model."""
    adapters = {name: file for name, file in _adapter_files(model, folder).items() if file.is_file()}
    if (folder / _WEIGHTS_INDEX).is_file():
        parts = sorted(set(json.loads((folder / _WEIGHTS_INDEX).read_text())["weight_map"].values()))
    else:
        parts = [_WEIGHTS] if (folder / _WEIGHTS).is_file() else []
    if parts:
        weights = {name: tensor for part in parts for name, tensor in load_file(folder / part).items()}
    elif adapters:
        weights = {}
        for name, file in adapters.items():
            weights |= _with_adapter_name(model, load_file(file), name)
    else:
        wanted = [str(file.relative_to(folder)) for file in _adapter_files(model, folder).values()] or [_WEIGHTS]
        raise CheckpointError(f"{folder} holds no {' and no '.join(wanted)}. Name a folder that the Trainer saved.")
    checkpoints.fill_weights(folder, model, weights, strict=False)


def _adapter_files(model: Any, folder: Path) -> dict[str, Path]:
    """Returns where each adapter of a model would be: only one of the name ``default`` lies in the folder itself."""
    names = getattr(model, "peft_config", None) or ()
    if not hasattr(model, "get_base_model"):  # adapters of a model of transformers, which saves the active one
        return {name: folder / _ADAPTER for name in names if name in model.active_adapters()}
    return {name: (folder if name == "default" else folder / name) / _ADAPTER for name in names}


def _with_adapter_name(model: Any, weights: dict[str, Any], adapter: str) -> dict[str, Any]:
    """Turns the names in an adapter's file, which lack the adapter's own name, into those of the model."""
    from peft.utils import get_peft_model_state_dict

    names = dict(checkpoints.model_state(model))
    short = get_peft_model_state_dict(model, state_dict=dict(names), adapter_name=adapter)
    if not hasattr(model, "get_base_model"):
        short = {f"base_model.model.{name}": tensor for name, tensor in short.items()}
    by_identity = {id(tensor): name for name, tensor in names.items()}
    return {by_identity[id(tensor)]: weights[name] for name, tensor in short.items() if name in weights}
