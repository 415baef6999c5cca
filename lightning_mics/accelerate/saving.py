"""The folders of ``save_state`` and ``load_state``: what they hold, and how they are named."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.checkpointing import (
    load_accelerator_state,
    save_accelerator_state,
    save_custom_state,
)
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.constants import RNG_STATE_NAME as _RANDOM
from torch import nn
from torch.optim import Optimizer

from lightning_mics import checkpoint as checkpoints
from lightning_mics.checkpoint.savers import given
from lightning_mics.core._torch import uncompiled
from lightning_mics.core.buffers import broadcast_buffers
from lightning_mics.core.runtime import is_sharded
from lightning_mics.errors import CheckpointError

if TYPE_CHECKING:
    from lightning_mics.accelerate.accelerator import MiCSAccelerator


def save_state(
    accelerator: MiCSAccelerator,
    output_dir: str | os.PathLike[str] | None,
    safe_serialization: bool,
    options: Mapping[str, Any] | None,
) -> checkpoints.Place:
    """Saves everything that was prepared or registered; see :meth:`MiCSAccelerator.save_state`."""
    names_itself = output_dir is None or _names_checkpoints(accelerator)
    parent = _parent(accelerator, options)
    folder = _next_folder(accelerator, parent) if names_itself else checkpoints.place(output_dir, options)  # type: ignore[arg-type]
    models, optimizers = accelerator._models, accelerator._optimizers
    for model in filter(is_sharded, models):
        broadcast_buffers(model)
    full, hooks = accelerator.mics_plugin.full_checkpoint, list(accelerator._save_model_state_pre_hook.values())
    # Hooks may save models on the main process alone, as scripts for diffusion models do.
    whole = [checkpoints.model_state(model, full=True) for model in (models if hooks else models[:1] if full else [])]
    objects = [_Registered(obj) for obj in accelerator._custom_objects]
    weights = [checkpoints.model_state(model) for model in models]
    state: dict[str, Any] = {_model_key(index): entry for index, entry in enumerate(weights)}
    listed = dict(state)

    def add_files(temporary: Path) -> list[str]:
        with ExitStack() as stack:
            for model, entries in zip(list(models), whole, strict=False):
                stack.enter_context(given(model, entries))
            for hook in hooks:
                hook(models, weights, str(temporary))
        _write_rest(accelerator, objects, temporary, safe_serialization)
        if full and whole and whole[0]:
            write_weights(models[0], whole[0], temporary, "10GB", safe_serialization)
        left = {id(entry) for entry in weights}  # a hook takes off what it has saved itself
        return [key for key, entry in listed.items() if id(entry) not in left]

    for index, optimizer in enumerate(optimizers):
        inner = _inner(optimizer)
        state[f"optimizer_{index}"] = checkpoints.optimizer_state(_owner(models, inner), inner)
    facts = checkpoints.huggingface_metadata(models[0]) if models else {}
    meta = {
        "mics": {**facts, **checkpoints.states_of_ranks(_stateful(accelerator))},
        "accelerate": {"step": accelerator.step, "shards": [obj.shards for obj in objects]},
    }
    background = accelerator.mics_plugin.config.async_checkpoint
    checkpoints.save_sharded(folder, state, meta, add_files, background=background)
    accelerator.project_configuration.iteration += 1
    _delete_oldest(accelerator, folder.parent)
    return folder


def load_state(
    accelerator: MiCSAccelerator,
    input_dir: str | os.PathLike[str] | None,
    load_kwargs: dict[str, Any] | None,
    *,
    strict: bool,
    options: Mapping[str, Any] | None,
) -> None:
    """Loads what was saved; see :meth:`MiCSAccelerator.load_state`."""
    checkpoints.wait_for_checkpoints()
    parent = _parent(accelerator, options)
    folder = checkpoints.place(input_dir, options) if input_dir is not None else _newest_folder(accelerator, parent)
    models = list(accelerator._models)
    for hook in accelerator._load_model_state_pre_hook.values():
        hook(models, folder.url if isinstance(folder, checkpoints.Remote) else str(folder))
    inner = [_inner(optimizer) for optimizer in accelerator._optimizers]
    meta: dict[str, Any] = {}
    weights_only = (load_kwargs or {}).get("weights_only")
    for index, model in enumerate(accelerator._models):
        optimizers = {
            f"optimizer_{place}": optimizer
            for place, optimizer in enumerate(inner)
            if _owner(accelerator._models, optimizer) is model
        }
        # A hook that has loaded a model takes it off the list; its optimizer is still ours to load.
        key = _model_key(index) if model in models else None
        others = {f"optimizer_{place}" for place in range(len(inner))}
        meta = checkpoints.load_into(
            folder, model, optimizers, model_key=key, elsewhere=others, strict=strict, weights_only=weights_only
        )
    if "accelerate" in meta:
        if checkpoints.own_states(meta) is not None:
            checkpoints.load_states(meta, _stateful(accelerator))
        with checkpoints.local_copy(folder, weights_only, functools.partial(_is_read_by, accelerator)) as local:
            _read_rest(accelerator, local, load_kwargs, weights_only, meta["accelerate"].get("shards", []))
        accelerator.step = meta["accelerate"]["step"]  # of all ranks, also of those that the saving world did not have


def write_weights(
    model: Any, weights: dict[str, Any], folder: Path, max_shard_size: int | str, safe_serialization: bool
) -> None:
    """Writes whole weights, and a Hugging Face model's configuration, for ``from_pretrained``."""
    from huggingface_hub import save_torch_state_dict

    model = uncompiled(model)
    folder.mkdir(parents=True, exist_ok=True)
    if safe_serialization and _is_of_transformers(model):
        # It knows which of its tied names to write, writes weights as the hub has them, and what it generates with.
        type(model).save_pretrained(model, folder, state_dict=weights, max_shard_size=max_shard_size)
        return
    save_torch_state_dict(
        weights, folder, max_shard_size=max_shard_size, safe_serialization=safe_serialization, metadata={"format": "pt"}
    )
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        model.config.save_pretrained(folder)


def _is_of_transformers(model: Any) -> bool:
    """Returns whether a model saves all of its weights by the ``save_pretrained`` of transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return (
        module is not None
        and isinstance(model, module.PreTrainedModel)
        and not getattr(model, "_hf_peft_config_loaded", False)
    )


def _model_key(index: int) -> str:
    return f"state_dict_{index}" if index else "state_dict"


def _inner(optimizer: Any) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _owner(models: list[nn.Module], optimizer: Optimizer) -> nn.Module:
    params = {param for group in optimizer.param_groups for param in group["params"]}
    for model in models:
        if params.issubset(model.parameters()):
            return model
    raise CheckpointError(
        f"{type(optimizer).__name__} trains parameters of several models, or of one that was not prepared. Pass its "
        "model to prepare, and give each model an optimizer of its own."
    )


# Names.


def _names_checkpoints(accelerator: MiCSAccelerator) -> bool:
    return bool(accelerator.project_configuration.automatic_checkpoint_naming)


def _parent(accelerator: MiCSAccelerator, options: Mapping[str, Any] | None) -> checkpoints.Place:
    return checkpoints.place(accelerator.project_dir or "", options) / "checkpoints"


def _next_folder(accelerator: MiCSAccelerator, parent: checkpoints.Place) -> checkpoints.Place:
    if not _names_checkpoints(accelerator):
        raise CheckpointError(
            "save_state needs a folder: save_state('checkpoints/step_100'), or "
            "ProjectConfiguration(automatic_checkpoint_naming=True, project_dir=...)."
        )
    folder = parent / f"checkpoint_{accelerator.save_iteration}"
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists already. Set accelerator.project_configuration.iteration to the number to go on with."
        )
    return folder


def _named_folders(parent: checkpoints.Place) -> list[checkpoints.Place]:
    entries = parent.iterdir() if parent.is_dir() else ()
    found = [folder for folder in entries if re.fullmatch(r"checkpoint_\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("_")[2]))


def _newest_folder(accelerator: MiCSAccelerator, parent: checkpoints.Place) -> checkpoints.Place:
    folders = _named_folders(parent) if _names_checkpoints(accelerator) else []
    if not folders:
        raise CheckpointError("load_state needs a folder: there are no automatically named checkpoints.")
    return folders[-1]


def _delete_oldest(accelerator: MiCSAccelerator, parent: checkpoints.Place) -> None:
    """Keeps to ``total_limit``; only when the new checkpoint is whole."""
    limit = accelerator.project_configuration.total_limit

    def delete() -> None:
        for folder in _named_folders(parent)[: -max(limit, 1)]:
            checkpoints.remove(folder)

    if _names_checkpoints(accelerator) and limit is not None and accelerator.is_main_process:
        checkpoints.afterwards(delete)
    accelerator.wait_for_everyone()


# What is beside weights and optimizers.


class _Registered:
    """The state of a registered object, with whole tensors in place of shards, as one process would save it.

    Attributes:
        shards: Where there were shards.
    """

    def __init__(self, registered: Any) -> None:
        self._state, self.shards = checkpoints.made_whole(registered.state_dict())

    def state_dict(self) -> Any:
        return self._state


def _stateful(accelerator: MiCSAccelerator) -> dict[str, Any]:
    """Returns the loaders that keep their place (``use_stateful_dataloader``), by their number."""
    return {
        str(index): loader
        for index, loader in enumerate(accelerator._dataloaders)
        if getattr(loader, "use_stateful_dataloader", False)
    }


class _Stateless:
    """A loader whose place is kept elsewhere: Accelerate has all ranks write theirs into one file."""

    use_stateful_dataloader = False

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _write_rest(
    accelerator: MiCSAccelerator, objects: Sequence[_Registered], folder: Path, safe_serialization: bool
) -> None:
    save_accelerator_state(
        str(folder),
        [],
        [],
        accelerator._schedulers,
        [_Stateless(loader) for loader in accelerator._dataloaders],
        accelerator.process_index,
        accelerator.step,
        accelerator.scaler,
        safe_serialization=safe_serialization,
    )
    for index, obj in enumerate(objects):
        save_custom_state(obj, str(folder), index)


def _is_read_by(accelerator: MiCSAccelerator, name: str) -> bool:
    """Returns whether this process reads one of the files beside weights and optimizers."""
    if name.startswith(_RANDOM):
        return name == f"{_RANDOM}_{accelerator.process_index}.pkl"
    return not name.endswith((".distcp", ".safetensors")) and not name.startswith(".")


def _read_rest(
    accelerator: MiCSAccelerator,
    folder: Path,
    load_kwargs: dict[str, Any] | None,
    weights_only: bool | None,
    shards: list[list[str]],
) -> None:
    load_accelerator_state(
        str(folder),
        [],
        [],
        accelerator._schedulers,
        accelerator._dataloaders,
        accelerator.process_index,
        accelerator.scaler,
        "cpu",
        load_kwargs,
    )
    objects = accelerator._custom_objects
    saved = len(list(folder.glob("custom_checkpoint_*.pkl")))
    if saved != len(objects):
        raise CheckpointError(
            f"{folder} holds {saved} registered object(s), and {len(objects)} are registered. Call "
            "register_for_checkpointing with the same objects as when it was saved."
        )
    for index, obj in enumerate(objects):
        state = checkpoints.read_file(folder / f"custom_checkpoint_{index}.pkl", weights_only)
        params = [param for model in accelerator._models for param in model.parameters()]
        obj.load_state_dict(checkpoints.sharded_again(state, shards[index] if shards else (), params))
