"""Files of a checkpoint: written aside and renamed when whole, checked before they are read.

While a checkpoint ``NAME`` is written, its data lie in a hidden sibling ``.NAME.incomplete-HOST-PID``. Only the last
step, a rename, gives it its name; an earlier checkpoint of that name is exchanged for it in the same step where the
file system can, and otherwise set aside as ``.NAME.replaced-HOST-PID`` for the instant between two renames.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from lightning_mics.errors import CheckpointError

MANIFEST, META, INDEX = "mics.json", "meta.pt", ".metadata"
_FORMAT = 1
_INCOMPLETE, _REPLACED = ".incomplete-", ".replaced-"
_STALE_SECONDS = 3600.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

Kind = Literal["sharded", "full"]


def temporary_name(path: Path) -> Path:
    """Returns the hidden name under which this process writes the checkpoint ``path``."""
    return path.parent / f".{path.name}{_INCOMPLETE}{_owner()}"


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def commit(temporary: Path, path: Path) -> None:
    """Gives a whole checkpoint its name; one that had it is deleted afterwards."""
    if path.is_dir() or (temporary.is_dir() and path.exists()):
        if _exchange(temporary, path):
            sync_folder(path.parent)
            delete(temporary)
            return
        aside = path.parent / f".{path.name}{_REPLACED}{_owner()}"
        os.rename(path, aside)
        os.rename(temporary, path)
        sync_folder(path.parent)
        delete(aside)
        return
    os.replace(temporary, path)
    sync_folder(path.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; returns ``False`` where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if done != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return done == 0


def recover(path: str | os.PathLike[str]) -> None:
    """Finishes or undoes what a crash interrupted at ``path``, and deletes leftovers beside it.

    Called before every save and load. Leftovers of saves that are still running are left alone.
    """
    path = Path(path)
    for aside in path.parent.glob(".*"):
        if aside.name.startswith(f".{path.name}{_REPLACED}"):
            delete(aside) if path.exists() else os.rename(aside, path)
    for leftover in path.parent.glob(f".*{_INCOMPLETE}*"):
        if _is_abandoned(leftover):
            delete(leftover)


def _is_abandoned(leftover: Path) -> bool:
    """Returns whether the process that writes ``leftover`` is gone, as far as this host can tell."""
    host, _, pid = leftover.name.rpartition(_INCOMPLETE)[2].rpartition("-")
    if not pid.isdigit():
        return False
    if host != socket.gethostname():
        return time.time() - _newest_change(leftover) > _STALE_SECONDS
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _newest_change(path: Path) -> float:
    entries = [path, *path.iterdir()] if path.is_dir() else [path]
    return max(entry.stat().st_mtime for entry in entries)


def delete(path: Path) -> None:
    """Deletes a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove(path: str | os.PathLike[str]) -> None:
    """Deletes a checkpoint. It loses its name first, so that half of it never carries the name."""
    path = Path(path)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        condemned = temporary_name(path)
        delete(condemned)
        os.rename(path, condemned)
        delete(condemned)


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Makes a file's content last through a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def describe(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Returns size in bytes and CRC-32 of files, by name."""
    return {file.name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in files}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def write_manifest(folder: Path, files: dict[str, dict[str, int]], world_size: int) -> None:
    """Writes what a whole checkpoint consists of; the last file to be written."""
    content = {"format": _FORMAT, "world_size": world_size, "files": files}
    path = folder / MANIFEST
    path.write_text(json.dumps(content, indent=1))
    sync_file(path)
    sync_folder(folder)


def inspect(path: str | os.PathLike[str]) -> Kind:
    """Tells a sharded checkpoint from a full one, and checks that nothing of it is missing.

    Raises:
        CheckpointError: If ``path`` is missing, half of a checkpoint, or none; the message names the file and what to
            do.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}.{_others(path)}")
    if path.is_file():
        return "full"
    if not (path / INDEX).is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {INDEX} file, so it is half-written or belongs to something else."
            f"{_others(path)}"
        )
    if not (path / META).is_file():
        raise CheckpointError(f"{path} is incomplete: {META} is missing.{_others(path)}")
    for name, expected in manifest_files(path).items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(
                f"{path} is incomplete: {name} is missing. If you copied the checkpoint, copy it again; on several "
                f"nodes, keep it on storage that all of them share.{_others(path)}"
            )
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{file} is damaged: it has {file.stat().st_size} bytes instead of {expected['bytes']}. Copy it again "
                f"from where it is whole.{_others(path)}"
            )
    return "sharded"


def check_content(path: Path, rank: int, world_size: int) -> None:
    """Compares this rank's part of the files with their checksums.

    Raises:
        CheckpointError: Naming a file whose content changed.
    """
    for index, (name, expected) in enumerate(sorted(manifest_files(path).items())):
        if index % world_size == rank and _crc32(path / name) != expected["crc32"]:
            raise CheckpointError(
                f"{path / name} is damaged: its content does not match its checksum. Copy it again from where it is "
                f"whole.{_others(path)}"
            )


def manifest_files(folder: Path) -> dict[str, Any]:
    """Returns the files that the manifest lists; none for a checkpoint that another program wrote.

    Raises:
        CheckpointError: If the manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        files: dict[str, Any] = content["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.{_others(folder)}") from error
    if content["format"] > _FORMAT:
        raise CheckpointError(f"{folder} was written by a newer lightning-mics. Update the package to read it.")
    return files


def _others(path: Path) -> str:
    """Names whole checkpoints beside ``path``, newest first."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist, either."
    found = [
        entry
        for entry in path.parent.iterdir()
        if entry != path and not entry.name.startswith(".") and ((entry / INDEX).is_file() or entry.suffix == ".ckpt")
    ]
    if not found:
        return ""
    newest = sorted(found, key=lambda entry: entry.stat().st_mtime, reverse=True)[:3]
    return f" Checkpoints beside it: {', '.join(entry.name for entry in newest)}."
