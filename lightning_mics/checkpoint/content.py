"""What is in checkpoints: which lie in a folder, what one holds, whether every byte is right, and how two differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_mics.checkpoint import files
from lightning_mics.checkpoint.generation import Generation, read_generation
from lightning_mics.checkpoint.load import read
from lightning_mics.checkpoint.manifest import MANIFEST
from lightning_mics.checkpoint.storage import Place, place
from lightning_mics.errors import CheckpointError

Progress = Callable[[int, int], None]

_BATCH_BYTES = 64 * 2**20
_LONGEST_VALUE = 60
_FULL_ENDINGS = (".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Listed:
    """A checkpoint in a folder, or what is left of one.

    Attributes:
        path: Where it is.
        kind: ``"sharded"``, ``"full"``, ``"folder"`` (of a Trainer of transformers), ``"link"`` or ``"unfinished"``.
        step: The step of training, if known.
        world_size: Number of ranks that wrote it, if known.
        shard_size: Number of ranks that a model was spread over, if known.
        bytes: Size of its files.
        modified: When it was written, in seconds since 1970.
        problem: What is wrong with it at a glance; content is not read. ``None`` if it is whole.
    """

    path: str
    kind: str
    step: int | None = None
    world_size: int | None = None
    shard_size: int | None = None
    bytes: int = 0
    modified: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class TensorFacts:
    """Type and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """The size in memory."""
        return self.numel * getattr(torch, self.dtype).itemsize

    def empty(self) -> Tensor:
        """Returns such a tensor, of any content."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Described:
    """What a checkpoint holds.

    Attributes:
        listed: The checkpoint.
        tensors: Type and shape of each tensor, by name.
        values: Everything else, as text, by name.
    """

    listed: Listed
    tensors: dict[str, TensorFacts]
    values: dict[str, str]


@dataclass(frozen=True)
class Difference:
    """One entry that two checkpoints do not share.

    Attributes:
        name: Its name.
        first: What it is in the first; ``None`` if it is not there.
        second: What it is in the second.
        largest: The largest absolute difference of an element, of tensors of one shape.
        count: How many elements differ.
    """

    name: str
    first: str | None
    second: str | None
    largest: float | None = None
    count: int | None = None


@dataclass
class Comparison:
    """How two checkpoints differ, and how many entries are the same to the bit."""

    equal_tensors: int = 0
    equal_values: int = 0
    differences: list[Difference] = field(default_factory=list)


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Listed]:
    """Returns the checkpoints in a folder and below it, and what crashes left there; newest last.

    Args:
        folder: A folder, or a checkpoint, which then is the only one.

    Raises:
        CheckpointError: If there is no such folder.
    """
    where = place(folder)
    if not where.exists():
        raise CheckpointError(f"There is no folder {where}.{files.others(where)}")
    found = [where] if _is_checkpoint(where) else _find(where)
    return sorted((_look(path) for path in found), key=lambda listed: (listed.modified, listed.path))


def _find(folder: Place) -> Iterator[Place]:
    entries: list[Place] = []
    with suppress(OSError):  # no rights, or somebody deletes it
        entries = sorted(folder.iterdir(), key=str)
    for entry in entries:
        if files.is_unfinished(entry) or _is_checkpoint(entry):
            yield entry
        elif entry.is_dir() and not _is_link(entry):
            yield from _find(entry)


def _is_link(path: Place) -> bool:
    return isinstance(path, Path) and path.is_symlink()


def _is_checkpoint(path: Place) -> bool:
    if _is_link(path) and path.suffix in _FULL_ENDINGS:
        return True
    if path.is_dir():
        return any((path / name).is_file() for name in (files.INDEX, MANIFEST))
    return path.is_file() and path.suffix in _FULL_ENDINGS and path.name != files.META


def _look(path: Place) -> Listed:
    size, modified = _size(path)
    seen = Listed(str(path), "sharded" if path.is_dir() else "full", bytes=size, modified=modified)
    if files.is_unfinished(path):
        state = "left by a crash; the next save here deletes it" if files.is_leftover(path) else "being written"
        return replace(seen, kind="unfinished", problem=state)
    if _is_link(path):
        problem = None if path.exists() else f"leads to {os.readlink(str(path))}, which is not there"
        return replace(seen, kind="link", problem=problem)
    try:
        generation = Generation(path, None)
    except (CheckpointError, OSError) as error:
        return replace(seen, problem=str(error))
    try:
        seen = replace(seen, kind=generation.kind)
        if (manifest := generation.manifest) is not None:
            shard_size = manifest.shard_size
            seen = replace(seen, step=manifest.step, world_size=manifest.world_size, shard_size=shard_size)
        generation.glance()
        return replace(seen, step=generation.step())
    except (CheckpointError, OSError) as error:
        return replace(seen, problem=str(error))
    finally:
        generation.close()


def _size(path: Place) -> tuple[int, float]:
    if not isinstance(path, Path):
        return path.usage()
    sizes, times = [0], [0.0]
    for entry in [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]:
        with suppress(FileNotFoundError):
            state = entry.lstat()
            times.append(state.st_mtime)
            sizes.append(0 if entry.is_dir() else state.st_size)
    return sum(sizes), max(times)


def describe_checkpoint(path: str | os.PathLike[str], *, weights_only: bool | None = None) -> Described:
    """Returns what a checkpoint holds, without reading its tensors.

    Args:
        path: A sharded checkpoint, or a full file.
        weights_only: ``False`` trusts the checkpoint; see :func:`load_checkpoint`.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """

    def describe(generation: Generation) -> Described:
        content = _Content(generation)
        return Described(_look(place(path)), content.tensors, {name: _text(v) for name, v in content.values().items()})

    return read_generation(path, weights_only, describe, alone=True)


def verify_checkpoint(
    path: str | os.PathLike[str], *, weights_only: bool | None = None, progress: Progress = lambda done, total: None
) -> dict[str, str | None]:
    """Reads every byte of a checkpoint and compares it with the checksums that were written with it.

    Args:
        path: A sharded checkpoint, or a full file.
        weights_only: ``False`` trusts the checkpoint; see :func:`load_checkpoint`.
        progress: Told the bytes that were read so far, and how many there will be.

    Returns:
        What is wrong with each file, by name; ``None`` for those that are right.

    Raises:
        CheckpointError: If there is no checkpoint, or what lists its files is damaged.
    """

    def verify(generation: Generation) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        done, total = 0, generation.total_bytes()
        for name, facts in generation.listed.items():
            found[name or generation.path.name] = _problem(lambda name=name: generation.open(name))  # type: ignore[misc]
            done += facts.get("bytes", 0)
            progress(done, total)
        if generation.kind != "folder" and not any(found.values()):
            index = files.INDEX if generation.kind == "sharded" else generation.path.name
            found[index] = _problem(lambda: _Content(generation))
        return found

    return read_generation(path, weights_only, verify, alone=True)


def _problem(action: Callable[[], object]) -> str | None:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None


def compare_checkpoints(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    weights_only: bool | None = None,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Compares two checkpoints entry by entry, whatever their kinds, shard sizes and numbers of ranks.

    Args:
        first: A sharded checkpoint, or a full file.
        second: Another.
        weights_only: ``False`` trusts them; see :func:`load_checkpoint`.
        progress: Told the bytes of tensors that were compared so far, and how many there will be.

    Raises:
        CheckpointError: If one of them is missing or damaged.
    """

    def compare(one: Generation, other: Generation) -> Comparison:
        one.check(alone=True)
        other.check(alone=True)
        return _compare(_Content(one), _Content(other), progress)

    return read_generation(
        first,
        weights_only,
        lambda one: read_generation(second, weights_only, lambda other: compare(one, other), alone=True),
        alone=True,
    )


def _compare(one: _Content, other: _Content, progress: Progress) -> Comparison:
    result = Comparison()
    for name in one.tensors.keys() ^ other.tensors.keys():
        result.differences.append(Difference(name, _fact(one, name), _fact(other, name)))
    common = [name for name in one.tensors if name in other.tensors]
    done, total = 0, sum(one.tensors[name].bytes for name in common)
    for batch in batches(common, lambda name: one.tensors[name].bytes, _BATCH_BYTES):
        mine, theirs = one.read(batch), other.read(batch)
        for name in batch:
            difference = _tensor_difference(name, mine[name], theirs[name])
            result.equal_tensors += difference is None
            result.differences += [] if difference is None else [difference]
        done += sum(one.tensors[name].bytes for name in batch)
        progress(done, total)
    values, others = one.values(), other.values()
    for name in values.keys() | others.keys():
        if name in values and name in others and repr(values[name]) == repr(others[name]):
            result.equal_values += 1
        else:
            result.differences.append(Difference(name, _text_of(values, name), _text_of(others, name)))
    result.differences.sort(key=_weight)
    return result


def _weight(difference: Difference) -> tuple[bool, float, str]:
    """Sorts by the largest difference; numbers such as counts of steps come last."""
    return (difference.count or 0) <= 1, -(difference.largest or 0.0), difference.name


def _fact(content: _Content, name: str) -> str | None:
    return str(content.tensors[name]) if name in content.tensors else None


def _text_of(values: dict[str, Any], name: str) -> str | None:
    return _text(values[name]) if name in values else None


def _tensor_difference(name: str, one: Tensor, other: Tensor) -> Difference | None:
    bare = Difference(name, str(_facts_of(one)), str(_facts_of(other)))
    if one.shape != other.shape:
        return bare
    wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    first, second = one.to(wide), other.to(wide)
    differs = (first != second) & ~(first.isnan() & second.isnan())
    count = int(differs.sum())
    if count == 0 and one.dtype == other.dtype:
        return None
    # Between a number and none, or infinities, there is no distance but the largest.
    distances = (first - second)[differs].abs().nan_to_num(nan=float("inf"))
    return replace(bare, largest=distances.max().item() if count else 0.0, count=count)


class _Content:
    """Tensors and values of a checkpoint by name; the same names for sharded and for full ones."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._metadata: Metadata | None = None
        self._names: dict[str, str] = {}  # those of DCP, by ours
        flat = flatten(_named_optimizers(generation.meta()))
        self._tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        self._values = {name: value for name, value in flat.items() if not isinstance(value, Tensor)}
        self.tensors = {name: _facts_of(tensor) for name, tensor in self._tensors.items()}
        if generation.kind == "sharded":
            self._metadata = generation.metadata()
            self._add_shards(self._metadata)

    def _add_shards(self, metadata: Metadata) -> None:
        entries, paths = metadata.state_dict_metadata, metadata.planner_data or {}
        self._names = {".".join(map(str, paths.get(name, (name,)))): name for name in entries}
        for own, name in self._names.items():
            if isinstance(entry := entries[name], TensorStorageMetadata):
                self.tensors[own] = TensorFacts(_dtype(entry.properties.dtype), tuple(entry.size))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns some of the tensors, whole and in the host's memory."""
        names = list(names)
        found = {name: self._tensors[name] for name in names if name in self._tensors}
        if self._metadata is not None:
            flat = {self._names[name]: self.tensors[name].empty() for name in names if name not in found}
            read(self._generation, flat, self._metadata, alone=True)
            found |= {name: flat[self._names[name]] for name in names if name not in found}
        return found

    def values(self) -> dict[str, Any]:
        """Returns what is not tensors."""
        if self._metadata is None:
            return self._values
        wanted: dict[str, Any] = {name: None for own, name in self._names.items() if own not in self.tensors}
        if wanted:
            read(self._generation, wanted, self._metadata, alone=True)
        return {**self._values, **flatten({own: wanted[name] for own, name in self._names.items() if name in wanted})}


def _named_optimizers(content: dict[str, Any]) -> dict[str, Any]:
    """Calls optimizers and their parameters as sharded checkpoints do."""
    numbered = content.get("optimizer_states")
    if not isinstance(numbered, list):
        return content
    rest = {key: value for key, value in content.items() if key != "optimizer_states"}
    return {**rest, **{f"optimizer_{index}": _by_name(state) for index, state in enumerate(numbered)}}


def _by_name(optimizer: Any) -> Any:
    if not isinstance(optimizer, dict) or "names" not in optimizer:
        return optimizer
    names = optimizer["names"]
    order = [index for group in optimizer["param_groups"] for index in group["params"]]
    name_of = dict(zip(order, names, strict=True))
    states = {name_of[index]: state for index, state in optimizer["state"].items()}
    groups = [{**group, "params": [name_of[i] for i in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": states, "param_groups": groups}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries and lists by dotted names; lists of plain values are leaves."""
    if isinstance(value, dict) and value:
        entries: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(entry, dict | list | tuple | Tensor) for entry in value):
        entries = enumerate(value)
    else:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, entry in entries:
        flat |= flatten(entry, f"{prefix}.{key}" if prefix else str(key))
    return flat


def batches(names: Iterable[str], size_of: Callable[[str], int], limit: int) -> list[list[str]]:
    """Splits names into lists of which each, but for one large entry, has at most about ``limit`` bytes."""
    found: list[list[str]] = [[]]
    size = 0
    for name in names:
        size += size_of(name)
        found[-1].append(name)
        if size >= limit:
            found.append([])
            size = 0
    return [batch for batch in found if batch]


def _facts_of(tensor: Tensor) -> TensorFacts:
    return TensorFacts(_dtype(tensor.dtype), tuple(tensor.shape))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(value: Any) -> str:
    """Returns a value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
