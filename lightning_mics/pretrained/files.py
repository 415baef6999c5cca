"""Files of weights in the format of safetensors: what is in them, and parts of it, each read where it is needed.

Files are read, not mapped: pages of a mapped file count as memory of every process that has touched them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mics.checkpoint import storage
from lightning_mics.checkpoint.storage import Place
from lightning_mics.core._torch import Unread, tree_leaves, tree_map_only
from lightning_mics.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_HEADER_BYTES = 100_000_000  # as safetensors has it
_SAMPLE_BYTES = 32
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
# Functions whose results can be told from shapes: those of which transformers makes its conversions.
_OF_WHOLE = {
    *("stack", "cat", "concat", "chunk", "split", "unbind", "narrow", "__getitem__", "view", "reshape", "flatten"),
    *("transpose", "permute", "t", "unsqueeze", "squeeze"),
}


class WeightsFile:
    """A file that stays open, so that what is in it can be read when it has lost its name.

    Args:
        place: Where it lies.

    Raises:
        CheckpointError: If it is missing, damaged or of another format.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        try:
            self._handle = place.open("rb")
        except OSError as error:
            raise CheckpointError(f"{place} cannot be read ({error}).") from error
        self._identity, self._size = storage.identity_of(self._handle), storage.size_of(self._handle)
        self._header = self._read_header()
        self.entries = {name: self._entry(name, told) for name, told in self._parse().items() if name != "__metadata__"}

    def _read_header(self) -> bytes:
        length = int.from_bytes(self.bytes(0, 8), "little") if self._size >= 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER_BYTES, self._size - 8):
            raise self._damaged("its header does not fit into it")
        return self.bytes(8, length)

    def _parse(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._header))
        except ValueError as error:
            raise self._damaged(f"its header cannot be read: {error}") from error

    def _entry(self, name: str, told: Mapping[str, Any]) -> Stored:
        try:
            dtype, shape, (start, end) = _DTYPES[told["dtype"]], tuple(told["shape"]), told["data_offsets"]
        except (KeyError, ValueError, TypeError) as error:
            raise self._damaged(f"{name} has an entry that is not known: {told}") from error
        first = 8 + len(self._header)
        if end - start != math.prod(shape) * dtype.itemsize or start < 0 or first + end > self._size:
            raise self._damaged(f"{name} does not fit into it")
        return Stored(self, name, dtype, shape, first + start)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.place} is damaged or not a safetensors file: {why}. Fetch it again.")

    @property
    def is_remote(self) -> bool:
        """Whether it lies in object storage."""
        return isinstance(self.place, storage.Remote)

    def read(self, start: int, length: int, into: Tensor | None = None) -> Tensor:
        """Reads bytes, of shape ``[length]``.

        Args:
            start: Where they begin.
            length: How many.
            into: Memory for them, on the CPU.

        Raises:
            CheckpointError: If that fails, or the file has been written to since it was opened.
        """
        content = torch.empty(length, dtype=torch.uint8, device="cpu") if into is None else into
        if isinstance(self.place, storage.Remote):
            if length:
                content.copy_(
                    torch.frombuffer(bytearray(self.place.read_part(start, start + length)), dtype=torch.uint8)
                )
            return content
        if storage.identity_of(self._handle) != self._identity:
            raise CheckpointError(
                f"{self.place} has changed since the model was made of it. Keep the file, or write to another one."
            )
        view, done = memoryview(content.numpy().data), 0
        while done < length:
            count = os.preadv(self._handle.fileno(), [view[done:]], start + done)
            if count == 0:
                raise self._damaged("it ends too early")
            done += count
        return content

    def bytes(self, start: int, length: int) -> bytes:
        """Reads bytes."""
        return self.read(start, length).numpy().tobytes()

    @functools.cached_property
    def digest(self) -> str:
        """Tells files apart: all of the header, and a few bytes of each tensor, or what object storage tells of it."""
        found = hashlib.blake2b(self._header, digest_size=8)
        if self.is_remote:
            found.update(repr(self._identity).encode())
        else:
            for entry in self.entries.values():
                middle = entry.start + entry.num_bytes // 2
                found.update(self.bytes(middle, min(_SAMPLE_BYTES, entry.start + entry.num_bytes - middle)))
        return found.hexdigest()


class _Made:
    """What any source can do."""

    def read(self, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Reads a part, on the CPU."""
        raise NotImplementedError

    def fill(self, target: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """Reads a part into a tensor of any dtype and device."""
        target.copy_(self.read(offsets, lengths))

    def cast(self, dtype: torch.dtype) -> Cast:
        """Returns the same in another dtype, rounded as ``Tensor.to`` does."""
        return Cast(self, dtype)

    def result(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Returns what a function makes of tensors of files, unread; ``NotImplemented`` if that is not known of it."""
        return _result(function, args, kwargs)


@dataclass(frozen=True)
class Stored(_Made):
    """A tensor in a file."""

    file: WeightsFile
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fill(self, target: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """Reads a part into memory of its own, if that is laid out as the file is."""
        is_alike = target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()
        if is_alike and self.shape and tuple(lengths[1:]) == self.shape[1:]:
            self._rows(offsets[0], lengths[0], target.view(-1).view(torch.uint8))
        else:
            super().fill(target, offsets, lengths)

    def _rows(self, first: int, count: int, into: Tensor | None = None) -> Tensor:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self.file.read(self.start + first * row_bytes, count * row_bytes, into)

    def read(self, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Reads some of its rows, and cuts them to the part that is asked for."""
        first, count = (offsets[0], lengths[0]) if self.shape else (0, 1)
        content = self._rows(first, count).view(self.dtype)
        return (
            _cut(content.view(count, *self.shape[1:]), (0, *offsets[1:]), lengths) if self.shape else content.view(())
        )

    def files(self) -> set[WeightsFile]:
        """Returns the files that it is read from."""
        return {self.file}


@dataclass(frozen=True)
class Cast(_Made):
    """A tensor in another dtype."""

    source: Any
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(self.source.shape)

    def read(self, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Reads a part, rounded."""
        return self.source.read(offsets, lengths).to(self.dtype)

    def files(self) -> set[WeightsFile]:
        """Returns the files that it is read from."""
        return self.source.files()


@dataclass(frozen=True, eq=False)
class Result(_Made):
    """What a function makes of tensors, or one of several that it makes of them."""

    function: Callable[..., Any]
    args: Any  # with sources in the place of tensors
    index: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Reads a part: of tensors in a row only those that it needs, otherwise all of them."""
        args, kwargs = self.args
        name = self.function.__name__
        if name in ("stack", "cat"):
            listed = list(args[0]) if args else list(kwargs["tensors"])
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            dim = dim % len(self.shape)
            if name == "stack" and dim == 0:
                rows = listed[offsets[0] : offsets[0] + lengths[0]]
                parts = [source.read(offsets[1:], lengths[1:]) for source in rows]
                return torch.stack(parts) if parts else torch.empty(tuple(lengths), dtype=self.dtype, device="cpu")
            if name == "cat":
                return torch.cat(_parts(listed, dim, offsets, lengths), dim)
        args, kwargs = tree_map_only((Stored, Cast, Result), _whole, self.args)
        made = self.function(*args, **kwargs)
        return _cut(made if self.index is None else made[self.index], offsets, lengths).contiguous()

    def files(self) -> set[WeightsFile]:
        """Returns the files that it is read from."""
        leaves = [leaf for leaf in tree_leaves(self.args) if isinstance(leaf, Stored | Cast | Result)]
        return set().union(*(leaf.files() for leaf in leaves))


def _whole(source: Any) -> Tensor:
    return source.read([0] * len(source.shape), source.shape)


def _cut(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, offset, length)
    return tensor


def _parts(sources: Sequence[Any], dim: int, offsets: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
    """Reads those parts of tensors that lie one after another along a dimension."""
    parts: list[Tensor] = []
    begin = 0
    for source in sources:
        first = max(offsets[dim] - begin, 0)
        last = min(offsets[dim] + lengths[dim] - begin, source.shape[dim])
        begin += source.shape[dim]
        if first < last or (not parts and source is sources[-1]):
            where, size = list(offsets), list(lengths)
            where[dim], size[dim] = min(first, source.shape[dim]), max(last - first, 0)
            parts.append(source.read(where, size))
    return parts


def _result(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = getattr(function, "__name__", "")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name not in _OF_WHOLE or not all(isinstance(tensor, Unread) and tensor.source for tensor in tensors):
        return NotImplemented
    if kwargs.get("out") is not None:
        return NotImplemented
    if name == "__getitem__" and args[1] is Ellipsis:
        return args[0]
    shown = tree_map_only(
        Unread, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), (args, kwargs)
    )
    made = function(*shown[0], **shown[1])
    sources = tree_map_only(Unread, lambda tensor: tensor.source, (args, kwargs))

    def unread(meta: Tensor, index: int | None) -> Unread:
        source = Result(function, sources, index, tuple(meta.shape), meta.dtype)
        return Unread(source, tensors[0].device, is_fixed=True)

    if isinstance(made, Tensor):
        return unread(made, None)
    return type(made)([unread(meta, index) for index, meta in enumerate(made)])


def tensors_of(files: Sequence[Place]) -> dict[str, Tensor]:
    """Returns all tensors of files, unread; of several with one name the last, as transformers has it.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    return {name: Unread(entry, is_fixed=True) for place in files for name, entry in WeightsFile(place).entries.items()}


def find_files(place: Place) -> list[Place]:
    """Returns the files of weights in a folder, or the one that is named.

    Raises:
        CheckpointError: If there are none, or parts of an index are missing.
    """
    if place.suffix == ".safetensors":
        return [place]
    if (place / SINGLE).is_file():
        return [place / SINGLE]
    if (place / INDEX).is_file():
        try:
            listed = sorted(set(json.loads((place / INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{place / INDEX} is damaged ({error}). Fetch it again.") from error
        if missing := [name for name in listed if not (place / name).is_file()]:
            raise CheckpointError(f"{place} is not whole: {INDEX} lists {', '.join(missing)}. Fetch what is missing.")
        return [place / name for name in listed]
    found = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
    others = [name for name in found if name.endswith(".safetensors")]
    if len(others) == 1:
        return [place / others[0]]
    there = f"It holds {', '.join(found[:8])}." if found else "There is nothing."
    raise CheckpointError(f"{place} holds no {SINGLE} and no {INDEX}. {there}")
