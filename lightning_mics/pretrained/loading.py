"""``load_pretrained``: safetensors files into a model that is sharded, or is going to be."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.checkpoint import ranks, storage
from lightning_mics.checkpoint.state import model_state, parameters_by_name
from lightning_mics.checkpoint.storage import Place
from lightning_mics.core._torch import become, is_unread, source_of, uncompiled
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.class_names import class_of
from lightning_mics.core.log import inform
from lightning_mics.core.runtime import adopt_masters, is_sharded
from lightning_mics.errors import CheckpointError
from lightning_mics.pretrained.files import SINGLE, find_files, tensors_of
from lightning_mics.pretrained.filling import read_into
from lightning_mics.pretrained.huggingface import reading_on_demand
from lightning_mics.text import first_of

_NAMED = 5
_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


@on_all_ranks("load_pretrained")
def load_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    ignore_mismatched_sizes: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, set[Any]]:
    """Loads weights from safetensors files, of which each rank reads its own rows. Collective over the world.

    A sharded model is filled at once. Otherwise nothing is read before :func:`~lightning_mics.mics_shard`, which then
    initialises nothing that is read; whoever asks for a value before that gets it. Values are cast to the model's
    dtypes. A model of transformers takes names, conversions, ties and new heads as ``from_pretrained`` does, which
    reports what was missing; in any other model names are its own, but for a prefix that all have, and what is missing
    keeps its values, or gets those of ``reset_parameters`` on the meta device.

    Args:
        model: A sharded or plain model, also on the meta device.
        folder: A folder with ``model.safetensors``, or with an index and parts; one safetensors file; a URL that fsspec
            knows, such as ``s3://bucket/model``; or the name of a repository of the hub.
        ignore_mismatched_sizes: Whether tensors of other shapes count as missing. Otherwise they are an error.
        storage_options: What the file system of a URL takes, such as credentials or an endpoint.
        **options: More for ``from_pretrained``, such as ``revision``, ``subfolder``, ``variant`` or ``key_mapping``.

    Returns:
        ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``, as ``output_loading_info`` has them.

    Raises:
        CheckpointError: On every rank, if files are missing, damaged or do not fit.

    Example::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        load_pretrained(model, "folder")
        model = mics_shard(model, MiCSConfig(shard_size=8))
    """
    model = uncompiled(model)
    place = _place(folder, storage_options)
    storage.check_shared(place) if not isinstance(place, str) else None
    find = _by_transformers if _is_of_transformers(model) else _by_name
    sharded = is_sharded(model)
    found, told = ranks.on_each_rank(lambda: find(model, place, sharded, ignore_mismatched_sizes, options))
    ranks.on_each_rank(lambda: _fill(model, found) if sharded else _set(model, found))
    if sharded:
        adopt_masters(model)
    return told


def _place(folder: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Place | str:
    """Returns where files lie; a text is the name of a repository."""
    place = storage.place(folder, options)
    if not isinstance(place, Path) or place.exists():
        return place
    if isinstance(folder, str) and _REPOSITORY.fullmatch(folder):
        return folder
    raise CheckpointError(f"There is no {place}. Name a folder with {SINGLE}, a URL, or a repository of the hub.")


def _is_of_transformers(model: nn.Module) -> bool:
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


class _Found:
    """What a model gets.

    Attributes:
        read: Tensors of files by name, unread; values of buffers.
        fresh: Values of what files lack, for a model that has none of its own.
    """

    def __init__(self, read: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
        self.read, self.fresh = dict(read), dict(fresh)


def _by_transformers(
    model: Any, place: Place | str, sharded: bool, ignore_mismatched_sizes: bool, options: Mapping[str, Any]
) -> tuple[_Found, dict[str, set[Any]]]:
    """Has ``from_pretrained`` build another model like this one, whose weights are unread."""
    # A shard's master may keep more digits than the shard.
    dtype = torch.promote_types(model.dtype, torch.float32) if sharded else model.dtype
    arguments = dict(options, config=model.config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    cls: Any = class_of(model)
    with reading_on_demand(), _speaking_once(), torch.device("cpu"):
        if isinstance(place, storage.Remote) or (isinstance(place, Path) and place.is_file()):
            twin, told = cls.from_pretrained(None, state_dict=tensors_of(find_files(place)), **arguments)
        else:
            twin, told = cls.from_pretrained(place, use_safetensors=True, **arguments)
    for name, there, here in sorted(told["mismatched_keys"]) if not ignore_mismatched_sizes else ():
        _refuse_shape(place, name, there, here)
    own, theirs = parameters_by_name(model), parameters_by_name(twin)
    if own.keys() != theirs.keys():
        (name, *_) = sorted(own.keys() ^ theirs.keys())
        raise CheckpointError(
            f"{cls.__name__} is not as its class builds it: {name} is on one side only. Load the weights first, and "
            "add adapters, or take layers away, afterwards."
        )
    _check_ties(own, theirs)
    read = {name: param for name, param in theirs.items() if is_unread(param)}
    fresh = {name: param for name, param in theirs.items() if name not in read}
    read.update(twin.named_buffers())
    return _Found(read, fresh), {key: set(told[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def _check_ties(own: Mapping[str, nn.Parameter], theirs: Mapping[str, nn.Parameter]) -> None:
    first: dict[nn.Parameter, str] = {}
    for name, param in own.items():
        other = first.setdefault(param, name)
        if theirs[other] is not theirs[name]:
            raise CheckpointError(
                f"{other} and {name} are one parameter of the model, and two with other values in the files. Build the "
                "model with tie_word_embeddings=False in its configuration."
            )


def _by_name(
    model: nn.Module, place: Place | str, sharded: bool, ignore_mismatched_sizes: bool, options: Mapping[str, Any]
) -> tuple[_Found, dict[str, set[Any]]]:
    """Finds tensors by the names that the model itself has."""
    if isinstance(place, str):
        from huggingface_hub import snapshot_download

        place = Path(snapshot_download(place, allow_patterns=["*.safetensors", "*.safetensors.index.json"], **options))
    elif options:
        raise CheckpointError(f"{', '.join(options)}= is for models of transformers and for repositories of the hub.")
    saved, own = tensors_of(find_files(place)), model_state(model)
    own = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    saved = _named_as(own, saved, place)
    shared = own.keys() & saved.keys()
    mismatched = {
        (name, tuple(saved[name].shape), tuple(own[name].shape))
        for name in shared
        if saved[name].shape != own[name].shape
    }
    for name, there, here in sorted(mismatched) if not ignore_mismatched_sizes else ():
        _refuse_shape(place, name, there, here)
    params = parameters_by_name(model)
    read = {name: saved[name] for name in shared - {name for name, *_ in mismatched}}
    there_by_another_name = {params[name] for name in read if name in params}
    missing = {name for name in own.keys() - saved.keys() if params.get(name) not in there_by_another_name}
    told: dict[str, set[Any]] = {
        "missing_keys": missing,
        "unexpected_keys": saved.keys() - own.keys(),
        "mismatched_keys": mismatched,
    }
    for what, entries in told.items():
        if entries:
            shown = sorted(entry if isinstance(entry, str) else entry[0] for entry in entries)
            inform(f"{place}: {len(shown)} {what.partition('_')[0]} ({first_of(shown, _NAMED)}).")
    return _Found(read, {}), told


def _named_as(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    """Names tensors as a model does, whose names have a prefix more or less than theirs, such as ``model.``.

    Raises:
        CheckpointError: If no name fits, or several prefixes do as well.
    """
    if own.keys() & saved.keys():
        return dict(saved)
    rated = sorted([*_prefixes(own, saved, True), *_prefixes(saved, own, False)], reverse=True)
    count, prefix, is_own = rated[0] if rated else (0, "", True)
    if 2 * count < min(len(own), len(saved)) or [other for other, *_ in rated].count(count) > 1:
        raise CheckpointError(f"{place} has other names than the model: there is {min(saved)}, and here {min(own)}.")
    if is_own:
        return {prefix + name: tensor for name, tensor in saved.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items()}


def _prefixes(long: Iterable[str], short: Container[str], is_own: bool) -> list[tuple[int, str, bool]]:
    """Returns how many names are others with something before them, by what that is."""
    dots = [(name, index + 1) for name in long for index, letter in enumerate(name) if letter == "."]
    counts = Counter(name[:end] for name, end in dots if name[end:] in short)
    return [(count, prefix, is_own) for prefix, count in counts.items()]


def _refuse_shape(place: Place | str, name: str, there: Iterable[int], here: Iterable[int]) -> None:
    raise CheckpointError(
        f"{place} does not fit the model: {name} has shape {tuple(there)} there and {tuple(here)} here. Build the "
        "model with the sizes of the files; ignore_mismatched_sizes=True leaves such weights out."
    )


@contextmanager
def _speaking_once() -> Iterator[None]:
    """Has transformers report on rank 0 only."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if ranks.rank() != 0:
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _fill(model: nn.Module, found: _Found) -> None:
    """Reads this rank's part of a sharded model; what files lack stays as it is."""
    targets = {name: tensor for name, tensor in model_state(model).items() if name in found.read}
    buffers = dict(model.named_buffers())
    targets.update({name: buffers[name] for name in found.read.keys() & buffers.keys()})
    unread = {name: source_of(found.read[name]) for name in targets if is_unread(found.read[name])}
    read_into({name: targets[name] for name in unread}, unread)
    with torch.no_grad():
        for name in targets.keys() - unread.keys():
            targets[name].copy_(found.read[name])


@torch.no_grad()
def _set(model: nn.Module, found: _Found) -> None:
    """Makes parameters unread; those that files lack get new values where they have none."""
    for name, param in parameters_by_name(model).items():
        value = found.read.get(name, found.fresh.get(name) if param.is_meta else None)
        if value is not None:
            become(param, value.to("cpu" if param.is_meta else param.device, param.dtype))
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, buffer in list(module.named_buffers(recurse=False)):
            value = found.read.get(prefix + name)
            if value is not None:
                setattr(module, name, value.to("cpu" if buffer.is_meta else buffer.device, buffer.dtype, copy=True))
