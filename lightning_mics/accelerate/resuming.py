"""Checkpoints of the Trainer of transformers: which of them can be resumed from, and their weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_mics import checkpoint as checkpoints
from lightning_mics.checkpoint import files, ranks
from lightning_mics.checkpoint.generation import Generation, read_generation
from lightning_mics.checkpoint.load import check_names
from lightning_mics.checkpoint.manifest import MANIFEST
from lightning_mics.checkpoint.trust import is_trusted
from lightning_mics.core.class_names import class_of
from lightning_mics.core.log import inform
from lightning_mics.errors import CheckpointError

OPTIMIZER_FOLDER = "optimizer_mics"
OPTIMIZER, SCHEDULER, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
_WEIGHTS, _ADAPTER = ("model", "pytorch_model"), ("adapter_model", "adapter_model")  # by safetensors, and by torch.save
_NAMED = re.compile(r"checkpoint-(\d+)")
# What every save writes anew, so that it must not outlive the checkpoint of which it is.
_OF_ONE_SAVE = re.compile(
    r"(pytorch_model|model|adapter_model)[-.].*|optimizer.*|rng_state.*|(scheduler|scaler)\.pt|global_step.*|latest"
)


def find_checkpoint(output_dir: str, asked: str | bool | None, weights_only: bool | None) -> str | bool | None:
    """Returns what to resume from: a checkpoint that is whole. Collective over the world.

    Args:
        output_dir: Where the Trainer saves.
        asked: A checkpoint, or ``True`` for the newest that is whole.
        weights_only: ``False`` trusts checkpoints that cannot be checked.

    Raises:
        CheckpointError: On every rank, if there is none.
    """
    if not asked:
        return None
    if asked is not True:
        _check(Path(asked), weights_only)
        return asked
    passed: list[str] = []
    for folder in ranks.on_first_rank(lambda: _newest_first(Path(output_dir))) or []:
        try:
            _check(folder, weights_only)
        except CheckpointError as error:
            passed.append(f"{folder.name} ({error})")
            continue
        if passed:
            inform(f"Resuming from {folder}, passing over {'; '.join(passed)}")
        return str(folder)
    if passed:
        raise CheckpointError(f"{output_dir} holds no checkpoint that is whole: {'; '.join(passed)}")
    return True  # the Trainer says that there are none


def _newest_first(output_dir: Path) -> list[Path]:
    numbers = {
        folder: int(match[1])
        for folder in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := _NAMED.fullmatch(folder.name)) and folder.is_dir()
    }
    return sorted(numbers, key=lambda folder: numbers[folder], reverse=True)


def _check(folder: Path, weights_only: bool | None) -> None:
    if not check_listed(folder, weights_only):
        ranks.on_first_rank(lambda: _check_unlisted(folder, weights_only))
        inform(f"{folder} has no manifest (mics.json), as transformers alone saves: damage to it would not be seen.")
    if not (folder / OPTIMIZER_FOLDER).is_dir() and not (folder / OPTIMIZER).is_file():
        inform(f"{folder} was saved without the optimizer, which begins anew.")


def check_listed(folder: Path, weights_only: bool | None) -> bool:
    """Checks that a checkpoint is whole, if it has a manifest; returns whether it has. Collective over the world.

    Raises:
        CheckpointError: On every rank, if it is not whole.
    """
    has_manifest = ranks.on_first_rank(lambda: (folder / MANIFEST).is_file())
    if has_manifest:
        read_generation(folder, weights_only, _check_files)
    return bool(has_manifest)


def _check_files(generation: Generation) -> None:
    """Checks all files, and those of the checkpoint inside. Raises on all ranks or on none."""
    generation.check()
    if STATE not in generation.listed:
        raise CheckpointError(f"{generation.path} is no checkpoint of a Trainer: it has no {STATE}.")
    if f"{OPTIMIZER_FOLDER}/{MANIFEST}" in generation.listed:
        inner = ranks.on_each_rank(lambda: Generation(generation.path / OPTIMIZER_FOLDER, generation.weights_only))
        try:
            inner.check()
        finally:
            inner.close()


def _check_unlisted(folder: Path, weights_only: bool | None) -> None:
    others = files.others(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint at {folder}.{others}")
    if not (folder / STATE).is_file():
        raise CheckpointError(
            f"{folder} is half-written, or no checkpoint of a Trainer: {STATE} is missing. To start from weights, give "
            f"the model of from_pretrained to the Trainer, and leave out resume_from_checkpoint.{others}"
        )
    if is_trusted(weights_only):
        return
    trust = f"train(resume_from_checkpoint=..., weights_only=False) trusts it as it is.{others}"
    if (folder / OPTIMIZER_FOLDER).exists():
        raise CheckpointError(
            f"{folder} lacks its manifest (mics.json), which shows damage, unless an earlier lightning-mics saved it. "
            f"{trust}"
        )
    if missing := [name for name in (OPTIMIZER, SCHEDULER) if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} cannot be resumed from: it has no {' and no '.join(missing)}. To start from its weights, give "
            f"the model of from_pretrained to the Trainer, and leave out resume_from_checkpoint; {trust}"
        )


def keep_additions(before: Path, folder: Path) -> None:
    """Copies to a checkpoint what others have put into the one that it replaces."""
    for entry in before.iterdir() if before.is_dir() else ():
        if entry.name == MANIFEST or _OF_ONE_SAVE.fullmatch(entry.name) or (folder / entry.name).exists():
            continue
        copy: Any = shutil.copytree if entry.is_dir() else shutil.copy2
        copy(entry, folder / entry.name)


def fill_model(model: nn.Module, folder: Path) -> None:
    """Loads the weights that a Trainer saved into a sharded or plain model; communicates nothing.

    Raises:
        CheckpointError: If there are none, or they are not the model's.
    """
    adapters = {name: place for name, place in _adapter_places(model, folder).items() if _parts(place, _ADAPTER)}
    if weights := _read(folder, _WEIGHTS):
        _fill_whole(model, folder, weights)
    elif adapters:
        filled: dict[str, Any] = {}
        for name, place in adapters.items():
            filled |= _with_adapter_name(model, _read(place, _ADAPTER), name, place)
        checkpoints.fill_weights(folder, model, filled, strict=True, optional=checkpoints.model_state(model))
    else:
        wanted = [str((place / _ADAPTER[0]).relative_to(folder)) for place in _adapter_places(model, folder).values()]
        names = " and no ".join(f"{name}.safetensors" for name in wanted or _WEIGHTS[:1])
        raise CheckpointError(f"{folder} holds no {names}. Name a folder that the Trainer saved.")


def _fill_whole(model: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    try:
        checkpoints.fill_weights(folder, model, weights, strict=True, optional=ignored)
    except CheckpointError:
        if (converted := _as_named_here(model, folder)) is None:
            raise
        checkpoints.fill_weights(folder, model, converted, strict=True)


def _as_named_here(model: Any, folder: Path) -> Mapping[str, Tensor] | None:
    """Reads weights under other names than the model's, as transformers saves those of experts; if they fit."""
    if not hasattr(model, "save_pretrained") or not (folder / "config.json").is_file():
        return None
    cls: Any = class_of(model)
    own, told = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return None if any(told.values()) else own.state_dict()


def _parts(folder: Path, stems: tuple[str, str]) -> list[Path]:
    """Returns the files that hold weights, in the first format of which there are any."""
    for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if single.is_file():
            return [single]
    return []


def _read(folder: Path, stems: tuple[str, str]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for part in _parts(folder, stems):
        try:
            weights |= load_file(part) if part.suffix == ".safetensors" else checkpoints.read_file(part, True)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{part} is damaged or not a file of weights ({error}).") from error
    return weights


def _adapter_places(model: Any, folder: Path) -> dict[str, Path]:
    """Returns where each adapter of a model would be: only one of the name ``default`` lies in the folder itself."""
    names = getattr(model, "peft_config", None) or ()
    if not hasattr(model, "get_base_model"):  # adapters of a model of transformers, which saves the active one
        return {name: folder for name in names if name in model.active_adapters()}
    return {name: folder if name == "default" else folder / name for name in names}


def _with_adapter_name(model: Any, weights: dict[str, Any], adapter: str, place: Path) -> dict[str, Any]:
    """Turns the names in an adapter's file, which lack the adapter's own name, into those of the model."""
    from peft.utils import get_peft_model_state_dict

    names = dict(checkpoints.model_state(model))
    short = get_peft_model_state_dict(model, state_dict=dict(names), adapter_name=adapter)
    if not hasattr(model, "get_base_model"):
        short = {f"base_model.model.{name}": tensor for name, tensor in short.items()}
    check_names(place, short.keys() - weights.keys(), weights.keys() - short.keys())
    by_identity = {id(tensor): name for name, tensor in names.items()}
    return {by_identity[id(tensor)]: weights[name] for name, tensor in short.items()}
