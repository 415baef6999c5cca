"""DCP's index of a sharded checkpoint as data: which tensors there are, and where in which file their parts lie."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_mics.checkpoint.manifest import Facts
from lightning_mics.checkpoint.trust import forbidden, is_trusted
from lightning_mics.errors import CheckpointError

NAME = "index.json"

# What DCP pickles into its own index, and nothing else.
_METADATA = "torch.distributed.checkpoint.metadata"
_PICKLED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
}


@dataclass(frozen=True)
class _Place:
    """Where a part lies, as DCP's reader asks for it."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def encode(metadata: Metadata) -> str:
    """Returns an index as text, from which :func:`decode` makes it again.

    Raises:
        CheckpointError: If a state has a key that cannot be written.
    """
    entries = metadata.state_dict_metadata
    paths = {name: list(path) for name, path in (metadata.planner_data or {}).items()}
    odd = [key for path in paths.values() for key in path if not isinstance(key, str | int)]
    if odd:
        raise CheckpointError(f"a state has the key {odd[0]!r} ({type(odd[0]).__name__}). Use names or numbers")
    tensors = {
        name: {
            "dtype": str(entry.properties.dtype).removeprefix("torch."),
            "size": list(entry.size),
            "chunks": [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks],
        }
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    places = [
        [part.fqn, part.offset and list(part.offset), place.relative_path, place.offset, place.length]
        for part, place in (metadata.storage_data or {}).items()
    ]
    values = [name for name in entries if name not in tensors]
    return json.dumps({"tensors": tensors, "values": values, "paths": paths, "places": places})


def decode(text: bytes, where: str) -> Metadata:
    """Makes an index of what :func:`encode` wrote.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        content = json.loads(text)
        entries: dict[str, Any] = {name: _tensor(entry) for name, entry in content["tensors"].items()}
        entries |= {name: BytesStorageMetadata() for name in content["values"]}
        places = {
            MetadataIndex(name, part): _Place(file, offset, length)
            for name, part, file, offset, length in content["places"]
        }
        paths = {name: tuple(path) for name, path in content["paths"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged: {error}.") from error
    return Metadata(entries, planner_data=paths, storage_data=places)


def _tensor(entry: dict[str, Any]) -> TensorStorageMetadata:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{entry['dtype']} is no dtype")
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in entry["chunks"]]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["size"]), chunks)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED and not (module == "torch" and _is_dtype(name)):
            raise forbidden(f"{module}.{name}")
        return super().find_class(module, name)


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def unpickle_index(file: BinaryIO, where: str, weights_only: bool | None) -> Metadata:
    """Reads DCP's own index, of a checkpoint that has none of ours.

    Raises:
        CheckpointError: If it is damaged, or holds anything but an index and is not trusted.
    """
    try:
        metadata = (pickle.Unpickler if is_trusted(weights_only) else _Unpickler)(file).load()
        reaches(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{where} {error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{where} is damaged ({error}).") from error
    return metadata


def reaches(metadata: Metadata) -> dict[str, Facts]:
    """Returns how far an index reaches into each file, in bytes."""
    found: dict[str, Facts] = {}
    for place in metadata.storage_data.values():
        before = found.get(place.relative_path, {"bytes": 0})["bytes"]
        found[place.relative_path] = {"bytes": max(before, place.offset + place.length)}
    return found
