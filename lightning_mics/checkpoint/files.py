"""Files of a checkpoint: written aside and renamed when whole, checked before they are read.

While a checkpoint ``NAME`` is written, its data lie in a hidden sibling ``.NAME.mics-incomplete-OWNER``. Only the last
step, a rename, gives it its name; an earlier checkpoint of that name is exchanged for it in the same step where the
file system can, and otherwise set aside as ``.NAME.mics-replaced-OWNER`` for the instant between two renames. The owner
is the process that writes, so that others can tell a save that is running from one that crashed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import socket
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from lightning_mics.errors import CheckpointError

MANIFEST, META, INDEX = "mics.json", "meta.pt", ".metadata"
_FORMAT = 1
_INCOMPLETE, _REPLACED = ".mics-incomplete-", ".mics-replaced-"
_STALE_SECONDS = 3600.0
_NAME_BYTES = 100
_BLOCK_BYTES = 1 << 22
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

Kind = Literal["sharded", "full"]


def temporary_name(path: Path) -> Path:
    """Returns the hidden name under which this process writes the checkpoint ``path``."""
    return path.parent / f"{_hidden(path)}{_INCOMPLETE}{_owner()}"


def _hidden(path: Path) -> str:
    """Begins the hidden name of ``path``; long names are shortened, as the whole must fit into a folder entry."""
    encoded = os.fsencode(path.name)
    if len(encoded) <= _NAME_BYTES:
        return f".{path.name}"
    return f".{os.fsdecode(encoded[: _NAME_BYTES // 2])}-{zlib.crc32(encoded):08x}"


def _owner() -> str:
    return f"{_place()}-{os.getpid()}-{_birth(os.getpid())}"


def _place() -> str:
    """Names this host and, as containers share host names, the namespace in which its process ids count."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}-{namespace}"


def _birth(pid: int) -> str:
    """Returns when a process started, in the kernel's ticks; process ids are reused. Empty if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def commit(temporary: Path, path: Path) -> None:
    """Gives a whole checkpoint its name; one that had it is deleted afterwards."""
    if not (path.is_dir() or (temporary.is_dir() and path.exists())):
        os.replace(temporary, path)
        sync_folder(path.parent)
        return
    if _exchange(temporary, path):
        sync_folder(path.parent)
        delete(temporary)
        return
    aside = path.parent / f"{_hidden(path)}{_REPLACED}{_owner()}"
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(aside, path)
        raise
    sync_folder(path.parent)
    delete(aside)


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

    Called before every save and load. Leftovers of saves that are still running are left alone, and so is everything
    in a folder that cannot be changed.
    """
    path = Path(path)
    for aside in path.parent.glob(f".*{_REPLACED}*"):
        if aside.name.startswith(f"{_hidden(path)}{_REPLACED}"):
            with suppress(OSError):
                delete(aside) if path.exists() else os.rename(aside, path)
    for leftover in path.parent.glob(f".*{_INCOMPLETE}*"):
        if _is_abandoned(leftover):
            delete(leftover)


def _is_abandoned(leftover: Path) -> bool:
    """Returns whether nobody writes ``leftover`` any more: its process is gone or, elsewhere, nothing has happened."""
    owner = re.fullmatch(r"(.+)-(\d+)-(\d*)", leftover.name.rpartition(_INCOMPLETE)[2])
    if owner is None:
        return False
    place, pid, birth = owner.groups()
    if place == _place() and birth:
        # A process saves one checkpoint at a time: its own leftover is of a save that failed.
        return _birth(int(pid)) != birth or int(pid) == os.getpid()
    return time.time() - _newest_change(leftover) > _STALE_SECONDS


def _newest_change(path: Path) -> float:
    try:
        return max(entry.stat().st_mtime for entry in [path, *path.glob("*")])
    except FileNotFoundError:  # somebody is deleting it
        return time.time()


def delete(path: Path) -> None:
    """Deletes a file or a folder as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


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


def describe(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Returns size in bytes and CRC-32 of files, by their names in ``folder``."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in files
    }


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


def write_manifest(folder: Path, files: dict[str, dict[str, int]], world_size: int, model: dict[str, str]) -> None:
    """Writes what a whole checkpoint consists of; the last file to be written.

    Args:
        folder: The checkpoint.
        files: Size and checksum of its files.
        world_size: Number of ranks that wrote it.
        model: What is to be known of the model without unpickling anything.
    """
    content = {"format": _FORMAT, "world_size": world_size, "model": model, "files": files}
    path = folder / MANIFEST
    path.write_text(json.dumps(content, indent=1))
    sync_file(path)
    sync_folder(folder)


def find_kind(path: Path) -> Kind:
    """Tells a sharded checkpoint from a full one by a glance.

    Raises:
        CheckpointError: If ``path`` is missing, or a folder that lacks what every checkpoint has.
    """
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
    return "sharded"


def check_content(
    path: Path, kind: Kind, rank: int = 0, world_size: int = 1, progress: Callable[[int], None] = lambda size: None
) -> None:
    """Compares this rank's part of a checkpoint with its checksums.

    Args:
        path: The checkpoint.
        kind: Its kind.
        rank: Which of the parts to check.
        world_size: Number of parts.
        progress: Told the size of what was checked, in bytes.

    Raises:
        CheckpointError: Naming a file that is missing or whose content changed.
    """
    part = slice(rank, None, world_size)
    if kind == "full":
        _check_records(path, part)
        return
    for name, expected in sorted(_expected_files(path).items())[part]:
        _check_size(path, name, expected)
        if "crc32" in expected and _crc32(path / name) != expected["crc32"]:
            raise CheckpointError(
                f"{path / name} is damaged: its content does not match its checksum. Copy it again from where it is "
                f"whole.{_others(path)}"
            )
        progress(expected["bytes"])


def is_archive(path: Path) -> bool:
    """Returns whether ``path`` is a zip file, as ``torch.save`` writes."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # damage can make it look like one of several volumes
        return False


def _check_records(path: Path, part: slice) -> None:
    """Compares records of a file that ``torch.save`` wrote with the checksums that it left there."""
    if not is_archive(path):
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint.{_others(path)}")
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch writes 0 where it was told to skip checksums (torch.serialization.set_crc32_options).
            for record in [record for record in archive.infolist() if record.CRC][part]:
                with archive.open(record) as content:
                    while content.read(_BLOCK_BYTES):
                        pass
    except Exception as error:  # a damaged archive makes zipfile raise almost anything
        raise CheckpointError(f"{path} is damaged ({error}).{_others(path)}") from error


def _check_size(folder: Path, name: str, expected: dict[str, int]) -> None:
    file = folder / name
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is incomplete: {name} is missing. If you copied the checkpoint, copy it again; on several "
            f"nodes, keep it on storage that all of them share.{_others(folder)}"
        )
    size = file.stat().st_size
    if size < expected["bytes"] or ("crc32" in expected and size != expected["bytes"]):
        raise CheckpointError(
            f"{file} is damaged: it has {size} bytes instead of {expected['bytes']}. Copy it again from where it is "
            f"whole.{_others(folder)}"
        )


def _expected_files(folder: Path) -> dict[str, dict[str, int]]:
    """Returns what a sharded checkpoint consists of; without a manifest, how far its index reaches into each file."""
    if listed := manifest_files(folder):
        return listed
    reaches: dict[str, int] = {}
    for place in read_metadata(folder).storage_data.values():
        reaches[place.relative_path] = max(reaches.get(place.relative_path, 0), place.offset + place.length)
    return {name: {"bytes": reach} for name, reach in reaches.items()}


def total_bytes(folder: Path) -> int:
    """Returns the size of a sharded checkpoint."""
    return sum(expected["bytes"] for expected in _expected_files(folder).values())


def read_metadata(folder: Path) -> Metadata:
    """Reads the index of a sharded checkpoint.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        return dcp.FileSystemReader(folder).read_metadata()
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{folder / INDEX} is damaged ({error}).{_others(folder)}") from error


def manifest_files(folder: Path) -> dict[str, dict[str, int]]:
    """Returns the files that the manifest lists; none for a checkpoint that another program wrote.

    Raises:
        CheckpointError: If the manifest cannot be read.
    """
    content = _manifest(folder)
    listed: dict[str, dict[str, int]] = content["files"] if content else {}
    return listed


def manifest_model(folder: Path) -> dict[str, str]:
    """Returns what :func:`write_manifest` was told of the model; nothing if another program wrote the checkpoint.

    Raises:
        CheckpointError: If the manifest cannot be read.
    """
    content = _manifest(folder)
    model: dict[str, str] = content.get("model", {})
    return model


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        version = int(content["format"])
        for facts in content["files"].values() if version <= _FORMAT else ():
            int(facts["bytes"]), int(facts["crc32"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.{_others(folder)}") from error
    if version > _FORMAT:
        raise CheckpointError(f"{folder} was written by a newer lightning-mics. Update the package to read it.")
    return content


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
