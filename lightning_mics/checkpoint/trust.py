"""What a file from elsewhere may be made of: tensors and plain values, and no more unless a user trusts it."""

from __future__ import annotations

import os
import pathlib
import pickle
import re
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lightning_mics.checkpoint.storage import Place
from lightning_mics.errors import CheckpointError

_lock = threading.Lock()  # the names that PyTorch's unpickler knows are those of the process


def is_trusted(weights_only: bool | None) -> bool:
    """Returns whether a user trusts a file: by ``weights_only=False``, or where nobody asked by PyTorch's variable."""
    if weights_only is None:
        forced = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
        return forced.lower() in ("1", "y", "yes", "true")
    return not weights_only


def is_archive(file: BinaryIO) -> bool:
    """Returns whether a file is a zip file, as ``torch.save`` writes."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # damage can make it look like one of several volumes
        return False


def forbidden(name: str) -> CheckpointError:
    """Returns the error for a file that asks for something else than tensors and plain values."""
    return CheckpointError(
        f"holds objects other than tensors and plain values ({name}), and reading those can run code. If you trust it, "
        "load it with weights_only=False (mics consolidate: --trust)."
    )


def unpickle(file: BinaryIO, where: str, weights_only: bool | None) -> Any:
    """Reads what ``torch.save`` wrote, into the host's memory; of a large file, tensors stay on disk until used.

    Args:
        file: The open file. What is read is its content, whatever lies under its name by now.
        where: What it is, for messages.
        weights_only: ``False`` if it is trusted.

    Raises:
        CheckpointError: If it is damaged, or holds objects that ``weights_only`` forbids.
    """
    mapped = _path_of(file) if is_archive(file) else None
    file.seek(0)
    weights_only = not is_trusted(weights_only)
    try:
        with _lock, torch.serialization.safe_globals(_plain_names()):
            return torch.load(mapped or file, map_location="cpu", weights_only=weights_only, mmap=mapped is not None)
    except pickle.UnpicklingError as error:
        if weights_only and (asked := re.search(r"GLOBAL (\S+)|(?:class|function|global) (\S+)", str(error))):
            raise CheckpointError(f"{where} {forbidden(asked[1] or asked[2])}") from error
        raise CheckpointError(f"{where} is damaged or not a PyTorch checkpoint ({error}).") from error
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{where} holds an object whose class cannot be imported ({error}). Run this where it can, for example "
            "with the folder of the training script in PYTHONPATH."
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{where} is damaged or not a PyTorch checkpoint ({error}).") from error


def read_file(path: Place, weights_only: bool | None) -> Any:
    """Reads a file that ``torch.save`` wrote; see :func:`unpickle`.

    Raises:
        CheckpointError: As :func:`unpickle`, or if there is no such file.
    """
    try:
        with path.open("rb") if isinstance(path, Path) else path.fetch() as file:
            return unpickle(file, str(path), weights_only)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _path_of(file: BinaryIO) -> str | None:
    """Returns a path that leads to an open file even when its name leads elsewhere, where the system has one."""
    try:
        path = f"/proc/self/fd/{file.fileno()}"
    except OSError:  # it lies in memory
        return None
    return path if os.path.exists(path) else None


def _plain_names() -> list[Any]:
    """Returns what plain values are pickled with beside what PyTorch allows: numbers and arrays of NumPy, and paths."""
    names: list[Any] = [pathlib.PosixPath, pathlib.PurePosixPath]
    try:
        import numpy
        from numpy._core import multiarray
    except ImportError:
        return names
    for name in ("_reconstruct", "scalar"):
        function = getattr(multiarray, name)
        names += [(function, f"numpy.{core}.multiarray.{name}") for core in ("_core", "core")]
    kinds = ("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
    dtypes = [getattr(numpy.dtypes, f"{kind}DType") for kind in (*kinds, "Float16", "Float32", "Float64")]
    return [*names, numpy.ndarray, numpy.dtype, *dtypes]
