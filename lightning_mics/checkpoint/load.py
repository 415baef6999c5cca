"""Reading checkpoints into models of any shard size."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.optim import Optimizer

from lightning_mics.checkpoint import files, ranks, storage
from lightning_mics.checkpoint.background import wait_for_checkpoints
from lightning_mics.checkpoint.beside import with_shards
from lightning_mics.checkpoint.each_rank import load_states, numbered
from lightning_mics.checkpoint.generation import Generation, read_generation
from lightning_mics.checkpoint.moments import (
    Moments,
    fill_by_position,
    fill_optimizer,
    first_names,
    is_lossy,
    tell_rounding,
)
from lightning_mics.checkpoint.state import (
    empty_like,
    is_extra_state,
    model_state,
    parameters_by_name,
    shard_like,
    trained_parameters,
)
from lightning_mics.checkpoint.storage import Place
from lightning_mics.checkpoint.trust import read_file, unpickle
from lightning_mics.core._torch import load_own_entries, local_tensor, plain_name
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.log import inform
from lightning_mics.core.masters import has_master, tell_of_16_bits, write_master
from lightning_mics.core.runtime import adopt_masters
from lightning_mics.core.slices import is_slice
from lightning_mics.errors import CheckpointError

_NAMED = 5  # how many names of missing or unexpected entries a message lists


@on_all_ranks("load_checkpoint")
def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    *,
    strict: bool = True,
    weights_only: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    dataloaders: Any = (),
) -> dict[str, Any]:
    """Loads what :func:`save_checkpoint` saved, at any shard size and world size. Collective over the world.

    Args:
        path: A sharded or full checkpoint: a local path, or a URL that fsspec knows, such as ``s3://bucket/run``.
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a plain one.
        optimizers: Optimizers over its parameters, in the order in which they were saved.
        strict: Whether what does not fit is an error; see :func:`load_into`.
        weights_only: ``False`` trusts the checkpoint: what it holds beside tensors may be any object, and it may be of
            a version whose manifest cannot be checked, or lack it.
        storage_options: What the file system of a URL takes, such as credentials or an endpoint.
        dataloaders: A loader, or a list of them, to be taken to the places where they were saved; the world must have
            as many ranks as then.

    Returns:
        The checkpoint's ``meta``.

    Raises:
        CheckpointError: On every rank, if the checkpoint is missing, damaged or does not fit.
    """
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    named = {f"optimizer_{index}": optimizer for index, optimizer in enumerate(listed)}
    meta = load_into(storage.place(path, storage_options), model, named, strict=strict, weights_only=weights_only)
    loaders = numbered(dataloaders)
    if loaders:
        load_states(meta, loaders)
    meta.pop("mics", None)
    return meta


@on_all_ranks("load_into")
def load_into(
    path: str | os.PathLike[str] | storage.Remote,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer] | None = None,
    *,
    model_key: str | None = "state_dict",
    strict: bool = True,
    elsewhere: Collection[str] = (),
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint into a model and its optimizers. Collective over the world.

    Args:
        path: A sharded checkpoint (ours, or one of Lightning's ``ModelParallelStrategy``), or a full file.
        model: A sharded or plain model; filled in place.
        optimizers: Optimizers by their names in the checkpoint.
        model_key: The model's name in the checkpoint; ``None`` leaves its weights as they are.
        strict: Whether names of parameters must match, and with optimizers also their number, kinds and dtypes. A
            prefix that all names on one side have is no difference: in a checkpoint of a LightningModule, a model that
            it holds as ``self.model`` is called ``model.``.
        elsewhere: Optimizers of the checkpoint that another call loads.
        weights_only: As in ``torch.load``, for the part that is not tensors; see :func:`load_checkpoint`.

    Returns:
        What else the checkpoint holds.

    Raises:
        CheckpointError: On every rank, if the checkpoint is missing, damaged or does not fit.
    """
    ranks.agree("load_checkpoint", optimizers=[*(optimizers or {})], model=model_key, strict=strict)
    wanted = _Wanted(model, dict(optimizers or {}), model_key, strict, {*elsewhere})
    return read_generation(path, weights_only, wanted.load)


@dataclass(frozen=True)
class _Wanted:
    """What is to be filled from a checkpoint."""

    model: nn.Module
    optimizers: dict[str, Optimizer]
    model_key: str | None
    strict: bool
    elsewhere: set[str]

    def load(self, generation: Generation) -> dict[str, Any]:
        """Fills everything, and returns the rest. Raises on all ranks or on none."""
        generation.check()
        if generation.kind == "full":
            return with_shards(ranks.on_each_rank(lambda: self._fill(generation)), self.model)
        weights = {} if self.model_key is None else model_state(self.model)
        metadata, meta = ranks.on_each_rank(lambda: (generation.metadata(), generation.meta()))
        targets = _Targets(generation.path, metadata)
        if self.model_key is not None:
            exact = self.strict and bool(self.optimizers)
            ranks.on_each_rank(lambda: targets.add_weights(weights, str(self.model_key), self.strict, exact=exact))
        ranks.on_each_rank(lambda: self._check_surplus(generation, targets.optimizers()))
        for key, optimizer in self.optimizers.items():
            ranks.on_each_rank(lambda key=key, optimizer=optimizer: targets.add_optimizer(key, self.model, optimizer))  # type: ignore[misc]
        read(generation, targets.flat, metadata)
        if self.model_key is not None:
            adopt_masters(self.model)
        ranks.on_each_rank(lambda: self._set(targets, weights, meta))
        return with_shards(meta, self.model)

    def _check_surplus(self, generation: Generation, saved: set[str]) -> None:
        """Sees that no optimizer is left out, where any is loaded."""
        left = saved - self.optimizers.keys() - self.elsewhere
        if left and self.optimizers:
            problem = (
                f"{generation.path} holds {len(left)} optimizer(s) more than it is loaded into: {first_names(left)}."
            )
            if self.strict:
                raise CheckpointError(f"{problem} Give all of them, in the order in which they were saved, or none.")
            inform(problem)

    def _set(self, targets: _Targets, weights: dict[str, Any], meta: dict[str, Any]) -> None:
        """Hands over what could not be filled in place."""
        extra_states = meta.get("mics", {}).pop("extra_states", {})
        for name, tensor in weights.items():
            saved_name = f"{self.model_key}.{targets.names.to_saved(name)}"
            if not isinstance(tensor, Tensor):
                weights[name] = extra_states.get(saved_name, targets.flat.get(saved_name, tensor))
        _hand_over(self.model, weights)
        for key, optimizer in self.optimizers.items():
            moments = targets.optimizer_parts(key)
            moments.put(optimizer, trained_parameters(self.model, optimizer), strict=self.strict)

    def _fill(self, generation: Generation) -> dict[str, Any]:
        path, checkpoint, names = generation.path, generation.meta(), _Names()
        if self.model_key is not None:
            if self.model_key not in checkpoint:
                raise CheckpointError(f"{path} holds no {self.model_key!r}, only {', '.join(map(str, checkpoint))}.")
            weights = checkpoint.pop(self.model_key)
            names = _Names.match(model_state(self.model).keys(), weights.keys())
            fill_weights(path, self.model, weights, self.strict, exact=self.strict and bool(self.optimizers))
        numbered = checkpoint.pop("optimizer_states", [])
        named = {
            key
            for key, entry in checkpoint.items()
            if isinstance(entry, dict) and {"state", "param_groups"} <= entry.keys()
        }
        self._check_surplus(
            generation, named | {f"optimizer_{index}" for index in range(len(self.optimizers), len(numbered))}
        )
        for index, (key, optimizer) in enumerate(self.optimizers.items()):
            state = checkpoint.pop(key, numbered[index] if index < len(numbered) else None)
            if state is None:
                raise _no_states(path, key)
            fill_optimizer(path, self.model, optimizer, state, names.to_own, strict=self.strict)
        return checkpoint


def _hand_over(model: nn.Module, weights: dict[str, Any]) -> None:
    """Hands entries that are neither parameters nor buffers, and so were not filled in place, back to their modules.

    Those are extra states and, for example, the counts of a metric.
    """
    filled = {plain_name(name) for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    by_module: dict[str, dict[str, Any]] = {}
    for name, value in weights.items():
        if name not in filled:
            by_module.setdefault(name.rpartition(".")[0], {})[name] = value
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, entries in by_module.items():
        if name in modules:
            load_own_entries(modules[name], entries, f"{name}." if name else "")


@dataclass(frozen=True)
class _Names:
    """Names of one model, in a checkpoint and here, that differ by a prefix on one side."""

    saved_prefix: str = ""
    own_prefix: str = ""

    @classmethod
    def match(cls, own: Collection[str], saved: Collection[str]) -> _Names:
        """Finds the prefix; none where names agree already, or where no prefix makes them."""
        if not own or not saved or not set(own).isdisjoint(saved):
            return cls()
        for prefix in _prefixes(own, saved):
            if all(prefix + name in saved for name in own):
                return cls(saved_prefix=prefix)
        for prefix in _prefixes(saved, own):
            if all(prefix + name in own for name in saved):
                return cls(own_prefix=prefix)
        return cls()

    def to_saved(self, own: str) -> str:
        return self.saved_prefix + own.removeprefix(self.own_prefix)

    def to_own(self, saved: str) -> str:
        return self.own_prefix + saved.removeprefix(self.saved_prefix)


def _prefixes(short: Collection[str], long: Collection[str]) -> list[str]:
    first = min(short)  # on every rank the same, and in the same order
    return sorted(name.removesuffix(first) for name in long if name.endswith(f".{first}"))


class _Targets:
    """What to read from a sharded checkpoint, and where to put it: tensors by DCP's flat names."""

    def __init__(self, path: Place, metadata: Metadata) -> None:
        self.flat: dict[str, Any] = {}
        self.names = _Names()
        self._path = path
        self._entries = metadata.state_dict_metadata
        self._paths: dict[str, tuple[Any, ...]] = dict(metadata.planner_data or {})

    def optimizers(self) -> set[str]:
        """Returns the names of all optimizers of the checkpoint."""
        return {str(path[0]) for path in self._paths.values() if path[1:2] == ("param_groups",)}

    def add_weights(self, weights: dict[str, Any], key: str, strict: bool, *, exact: bool) -> None:
        saved = {name.removeprefix(f"{key}.") for name in self._entries if name.startswith(f"{key}.")}
        if not saved:
            tops = sorted({str(path[0]) for path in self._paths.values()})
            raise CheckpointError(f"{self._path} holds no {key!r}, only {', '.join(tops)}. Use those names.")
        # Extra states lie beside the shards.
        weights = {name: value for name, value in weights.items() if not is_extra_state(name, value) or name in saved}
        self.names = _Names.match(weights.keys(), saved)
        wanted = {self.names.to_saved(name): target for name, target in weights.items()}
        if strict:
            check_names(self._path, wanted.keys() - saved, saved - wanted.keys())
        rounded: dict[str, tuple[torch.dtype, torch.dtype]] = {}
        for name in wanted.keys() & saved:
            target, entry = wanted[name], self._entries[f"{key}.{name}"]
            if isinstance(target, Tensor) and isinstance(entry, TensorStorageMetadata):
                check_shape(self._path, name, entry.size, target.shape)
                if is_lossy(entry.properties.dtype, target.dtype):
                    rounded[name] = (entry.properties.dtype, target.dtype)
                if is_slice(target):
                    tell_of_16_bits(entry.properties.dtype)
            self.flat[f"{key}.{name}"] = target
        tell_rounding(self._path, "weights", rounded, exact)

    def add_optimizer(self, key: str, model: nn.Module, optimizer: Optimizer) -> None:
        params = trained_parameters(model, optimizer)
        mine = [name for name, path in self._paths.items() if path[0] == key]
        if not mine:
            raise _no_states(self._path, key)
        for flat_name in mine:
            _, part, owner, *_ = self._paths[flat_name]
            entry = self._entries[flat_name]
            if part == "state":
                owner = self.names.to_own(owner)
                if owner not in params:
                    continue
            if isinstance(entry, TensorStorageMetadata):
                like = params[owner] if part == "state" else torch.empty(())
                self.flat[flat_name] = empty_like(like, entry.size, entry.properties.dtype)
            else:
                self.flat[flat_name] = None

    def optimizer_parts(self, key: str) -> Moments:
        """Returns what was read for an optimizer."""
        states: dict[str, Any] = {}
        members: dict[int, list[str]] = {}
        groups: dict[int, dict[str, Any]] = {}
        for flat_name, value in self.flat.items():
            path = self._paths.get(flat_name, ())
            if path[:1] != (key,):
                continue
            if path[1] == "state":
                place = states.setdefault(self.names.to_own(path[2]), {})
                for step in path[3:-1]:
                    place = place.setdefault(step, {})
                place[path[-1]] = value
            elif path[3] == "params":
                names = [value] if isinstance(value, str) else value
                members.setdefault(int(path[2]), []).extend(map(self.names.to_own, names))
            else:
                groups.setdefault(int(path[2]), {})[path[3]] = value
        in_order = sorted(groups)
        return Moments(
            self._path, [members.get(index, []) for index in in_order], states, [groups[index] for index in in_order]
        )


def _no_states(path: Place, key: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds no states for {key!r}: it was saved without its optimizers, or there were fewer. Load the "
        "weights alone."
    )


def check_names(path: Place, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Checks that model and checkpoint have the same names.

    Raises:
        CheckpointError: If they do not.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        lines = [f"{path} does not fit the model."]
        if missing:
            lines.append(f"Missing in the checkpoint ({len(missing)}): {', '.join(missing[:_NAMED])}.")
        if unexpected:
            lines.append(f"Unknown to the model ({len(unexpected)}): {', '.join(unexpected[:_NAMED])}.")
        raise CheckpointError(" ".join([*lines, "Build the model as it was saved, or load with strict=False."]))


def check_shape(path: Place, name: str, saved: Iterable[int], wanted: Iterable[int]) -> None:
    """Checks that a saved tensor has the model's shape.

    Raises:
        CheckpointError: If it has not.
    """
    if tuple(saved) != tuple(wanted):
        raise CheckpointError(
            f"{path} does not fit the model: {name} has shape {tuple(saved)} there and {tuple(wanted)} here. Build the "
            "model with the sizes it was saved with."
        )


def read(generation: Generation, targets: dict[str, Any], metadata: Metadata, *, alone: bool = False) -> None:
    """Reads entries of a sharded checkpoint by their flat names: tensors in place, the rest into the dictionary.

    Args:
        generation: The checkpoint.
        targets: Where to put the entries, by name.
        metadata: Its index.
        alone: Whether other ranks, if there are any, do not take part.

    Raises:
        CheckpointError: On every rank, if it cannot be read.
    """
    alone = alone or not ranks.is_distributed()
    try:
        with ranks.quiet_dcp(alone):
            dcp.load(targets, storage_reader=_Reader(generation, metadata), planner=_Planner(generation), no_dist=alone)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{generation.path} cannot be read: {ranks.describe_error(error)}") from error


class _Reader(dcp.FileSystemReader):
    """DCP's reader, with the index and the files of one generation."""

    def __init__(self, generation: Generation, metadata: Metadata) -> None:
        super().__init__(str(generation.path))
        self.fs = _Files(generation)
        self._index = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _Files(FileSystem):
    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return suffix

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        yield self._generation.open(str(path))


class _Planner(DefaultLoadPlanner):
    """DCP's planner, for flat names, which reads nothing but plain values beside tensors."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._generation = generation

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        where = f"{self._generation.path}: {name}"
        self.state_dict[name] = unpickle(value, where, self._generation.weights_only)


def load_rest(path: str | os.PathLike[str] | storage.Remote, *, weights_only: bool | None = None) -> dict[str, Any]:
    """Loads what a checkpoint holds beside the tensors of models and optimizers. Collective over the world.

    Args:
        path: A sharded checkpoint, or a full file, of which everything is loaded.
        weights_only: As in ``torch.load``.

    Raises:
        CheckpointError: On every rank, if the checkpoint is missing or damaged.
    """
    return read_generation(path, weights_only, lambda generation: ranks.on_each_rank(generation.meta))


def load_raw(
    path: str | os.PathLike[str] | storage.Remote,
    target: nn.Module | Optimizer,
    *,
    strict: bool = True,
    weights_only: bool | None = None,
) -> None:
    """Loads a file that holds nothing but one ``state_dict``, of whole tensors. Collective over the world.

    Args:
        path: What ``torch.save(model.state_dict(), path)`` wrote.
        target: A sharded or plain model, or an optimizer over its parameters; filled in place.
        strict: Whether names of parameters must match; see :func:`load_into`.
        weights_only: As in ``torch.load``.

    Raises:
        CheckpointError: On every rank, if the file is missing, damaged or does not fit.
    """
    wait_for_checkpoints()
    ranks.agree("load_raw", path=path, target=type(target).__name__, strict=strict)
    path = storage.place(path)
    storage.check_shared(path)
    ranks.agree("load_raw", content=_digest(path, weights_only))

    def fill() -> None:
        if files.find_kind(path) == "sharded":
            raise CheckpointError(f"{path} is a folder of shards, not a single state. Load it as a checkpoint.")
        state = _read_raw(path, weights_only)
        if isinstance(target, Optimizer):
            fill_by_position(path, target, state, strict=strict)
        else:
            _check_flat(path, state)
            fill_weights(path, target, state, strict)

    ranks.on_each_rank(fill)


def _digest(path: Place, weights_only: bool | None) -> str | None:
    """Tells one file from another, if PyTorch 1.6 or a later one wrote it."""
    try:
        generation = Generation(path, weights_only)
    except (CheckpointError, OSError):  # whoever reads it says so
        return None
    generation.close()
    return generation.digest


def _read_raw(path: Place, weights_only: bool | None) -> dict[str, Any]:
    """Reads a file of ``torch.save``, also of a PyTorch older than 1.6, as public weights are."""
    content = read_file(path, weights_only)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state_dict.")
    return content


def _check_flat(path: Place, state: dict[str, Any]) -> None:
    inner = [key for key, value in state.items() if isinstance(value, dict) and not is_extra_state(key, value)]
    if inner:
        raise CheckpointError(
            f"{path} holds a checkpoint with entries such as {inner[0]!r}, not a single state_dict. Load it with "
            f"fabric.load(path, {{{inner[0]!r}: model}})."
        )


@torch.no_grad()
def fill_weights(
    path: Place,
    model: nn.Module,
    saved: Mapping[str, Any],
    strict: bool,
    optional: Collection[str] = (),
    *,
    exact: bool = False,
) -> None:
    """Copies whole tensors into a sharded or plain model; communicates nothing.

    Args:
        path: Where they come from, for messages.
        model: The model.
        saved: Tensors by name, the same on every rank. One name is enough for a parameter that has several.
        strict: Whether names must match; see :func:`load_into`.
        optional: Names that may be missing, by which the model keeps what it has.
        exact: Whether rounding to another dtype is an error.

    Raises:
        CheckpointError: If names or shapes do not fit.
    """
    weights, owners = model_state(model), parameters_by_name(model)
    names = _Names.match(weights.keys(), saved.keys())
    saved = {names.to_own(name): value for name, value in saved.items()}
    if strict:
        missing = weights.keys() - saved.keys() - set(optional) - _other_names(owners, saved)
        check_names(path, missing, saved.keys() - weights.keys())
    rounded: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name in weights.keys() & saved.keys():
        target = weights[name]
        if not isinstance(target, Tensor):
            weights[name] = saved[name]
            continue
        check_shape(path, name, saved[name].shape, target.shape)
        if is_lossy(saved[name].dtype, target.dtype):
            rounded[name] = (saved[name].dtype, target.dtype)
        if name in owners and has_master(owners[name]):
            write_master(owners[name], saved[name])
        else:
            local_tensor(target).copy_(local_tensor(shard_like(saved[name], target)))
    tell_rounding(path, "weights", rounded, exact)
    _hand_over(model, weights)


def _other_names(owners: Mapping[str, nn.Parameter], names: Collection[str]) -> set[str]:
    """Returns all names of those parameters of which one is among ``names``."""
    there = {owners[name] for name in names if name in owners}
    return {name for name, param in owners.items() if param in there}
