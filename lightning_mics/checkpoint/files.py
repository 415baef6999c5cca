"""Files of a checkpoint: written aside and renamed when whole, checked before they are read.

While a checkpoint ``NAME`` is written, its data lie in a hidden sibling ``.NAME.mics-incomplete-OWNER``. Only the last
step, a rename, gives it its name; an earlier checkpoint of that name is exchanged for it in the same step where the
file system can, and otherwise set aside as ``.NAME.mics-replaced-OWNER`` for the instant between two renames. The owner
is one save of one process, so that others, in that process too, can tell a save that is running from one that crashed.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from lightning_mics.checkpoint.manifest import GENERATION, INDEX, MANIFEST, META, Facts, Manifest
from lightning_mics.checkpoint.storage import Place, Remote
from lightning_mics.errors import CheckpointError
from lightning_mics.processes import start_time

_INCOMPLETE, _REPLACED = ".mics-incomplete-", ".mics-replaced-"
_STALE_SECONDS = 3600.0
# How long the two renames of a save on another machine may take, and how long a reader waits for them.
_REPLACING_SECONDS, _PATIENCE_SECONDS = 10.0, 15.0
_NAME_BYTES = 100
_BLOCK_BYTES = 1 << 22
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

Kind = Literal["sharded", "full", "folder"]  # the last holds files of other libraries


_counter = itertools.count()
_running: set[str] = set()  # owners: the saves of this process that are under way

P = TypeVar("P", Path, Remote)


def temporary_name(path: P) -> P:
    """Returns a hidden name under which to write the checkpoint ``path``; it is the caller's until :func:`release`."""
    owner = f"{_place()}-{os.getpid()}-{start_time(os.getpid()) or ''}.{next(_counter)}"
    _running.add(owner)
    return path.parent / f"{_hidden(path)}{_INCOMPLETE}{owner}"


def release(temporary: Place) -> None:
    """Says that nobody writes under this hidden name any more; what is left there may be deleted."""
    _running.discard(owner_of(temporary))


def owner_of(temporary: Place) -> str:
    """Returns which save of which process writes under this hidden name, or in this generation of objects."""
    return re.split(f"{_INCOMPLETE}|{_REPLACED}|^{GENERATION}", temporary.name)[-1]


def _hidden(path: Place) -> str:
    """Begins the hidden name of ``path``; long names are shortened, as the whole must fit into a folder entry."""
    encoded = os.fsencode(path.name)
    if len(encoded) <= _NAME_BYTES:
        return f".{path.name}"
    return f".{os.fsdecode(encoded[: _NAME_BYTES // 2])}-{zlib.crc32(encoded):08x}"


def _place() -> str:
    """Names this host and, as containers share host names, the namespace in which its process ids count."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}-{namespace}"


def commit(temporary: Path, path: Path) -> None:
    """Gives a whole checkpoint its name; what had it is deleted afterwards.

    A link of that name is replaced; what it leads to stays as it is.
    """
    if temporary.is_dir() and not path.exists():
        path.unlink(missing_ok=True)  # a link to nowhere
    if not (path.is_dir() or (temporary.is_dir() and path.exists())):
        os.replace(temporary, path)
        sync_folder(path.parent)
        return
    if _exchange(temporary, path):
        sync_folder(path.parent)
        delete(temporary)
        return
    aside = path.parent / f"{_hidden(path)}{_REPLACED}{owner_of(temporary)}"
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
    in a folder that cannot be changed. Where a running save has just set the earlier checkpoint aside, this waits.
    """
    path = Path(path)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not _settle(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    for leftover in path.parent.glob(f".*{_INCOMPLETE}*"):
        if is_leftover(leftover):
            delete(leftover)


def is_unfinished(path: Place) -> bool:
    """Returns whether this is the hidden name of a checkpoint that is, or was, being written or replaced."""
    return path.name.startswith(".") and any(mark in path.name for mark in (_INCOMPLETE, _REPLACED))


def is_leftover(path: Place) -> bool:
    """Returns whether nobody works on what is unfinished any more."""
    if isinstance(path, Remote):
        return is_abandoned(path, path.modified)
    if _REPLACED in path.name:
        return _is_abandoned(path, lambda: _renamed(path), _REPLACING_SECONDS)
    return is_abandoned(path, lambda: _newest_change(path))


def is_abandoned(temporary: Place, last_change: Callable[[], float]) -> bool:
    """Returns whether the save that wrote under a name is over.

    Args:
        temporary: The name.
        last_change: Tells when something was written there last, in seconds since 1970.
    """
    return _is_abandoned(temporary, last_change, _STALE_SECONDS)


def _settle(path: Path) -> bool:
    """Finishes or undoes an exchange by two renames; returns whether there is none under way that hides ``path``."""
    settled = True
    for aside in path.parent.glob(f".*{_REPLACED}*"):
        if not aside.name.startswith(f"{_hidden(path)}{_REPLACED}"):
            continue
        if not is_leftover(aside):
            settled = path.exists()
            continue
        with suppress(OSError):
            delete(aside) if path.exists() else os.rename(aside, path)
    return settled


def _is_abandoned(leftover: Place, last_change: Callable[[], float], stale_seconds: float) -> bool:
    """Returns whether nobody writes ``leftover`` any more: its save is over or, elsewhere, nothing has happened."""
    owner = re.fullmatch(r"(.+)-(\d+)-(\d*)(\.\d+)?", owner_of(leftover))
    if owner is None:
        return False
    place, pid, birth, _ = owner.groups()
    if place == _place() and birth:
        if int(pid) == os.getpid():
            return owner_of(leftover) not in _running
        return start_time(int(pid)) != int(birth)
    return time.time() - last_change() > stale_seconds


def _renamed(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except FileNotFoundError:  # somebody was faster
        return time.time()


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


def remove(path: Path) -> None:
    """Deletes a checkpoint. It loses its name first, so that half of it never carries the name."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        condemned = temporary_name(path)
        os.rename(path, condemned)
        delete(condemned)
        release(condemned)


def open_file(path: Place) -> BinaryIO:
    """Opens a file for reading; of anything else, such as a FIFO, reading might never end.

    Raises:
        CheckpointError: If it is something else.
    """
    if isinstance(path, Remote):
        return path.open("rb")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{path} is no file, but a folder, a FIFO or a device. Use a checkpoint that is whole.")
    return os.fdopen(handle, "rb")


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


def names_in(folder: Path) -> list[str]:
    """Returns the files in a folder by name; of a checkpoint inside of it, only the manifest, which lists the rest."""
    listed = [file.parent for file in folder.rglob(MANIFEST) if file.parent != folder]
    return sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and (file.name == MANIFEST or not any(inner in file.parents for inner in listed))
    )


def describe(folder: Path, names: Iterable[str] | None = None) -> dict[str, Facts]:
    """Returns size in bytes and CRC-32 of files in ``folder``, by their names; they are made to last."""
    described = {}
    for name in names_in(folder) if names is None else names:
        sync_file(folder / name)
        with (folder / name).open("rb") as file:
            described[name] = {"bytes": (folder / name).stat().st_size, "crc32": crc32_of(file)}
    return described


def crc32_of(file: BinaryIO) -> int:
    """Returns the CRC-32 of all of an open file."""
    value = 0
    file.seek(0)
    while block := file.read(_BLOCK_BYTES):
        value = zlib.crc32(block, value)
    return value


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes what a whole checkpoint consists of; the last file to be written."""
    path = folder / MANIFEST
    path.write_text(manifest.to_text())
    sync_file(path)
    sync_folder(folder)


def find_kind(path: Place) -> Kind:
    """Tells a sharded checkpoint from a full one by a glance.

    Raises:
        CheckpointError: If ``path`` is missing, or a folder that lacks what every checkpoint has.
    """
    if _is_of_objects(path):
        return "sharded"
    if not path.exists() or (isinstance(path, Remote) and path.is_dir() and not path.tree()):
        raise CheckpointError(f"There is no checkpoint at {path}.{others(path)}")
    if path.is_file():
        return "full"
    if not (path / INDEX).is_file():
        if (path / MANIFEST).is_file() and f'"{INDEX}"'.encode() not in (path / MANIFEST).read_bytes():
            return "folder"
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {INDEX} file, so it is half-written or belongs to something else."
            f"{others(path)}"
        )
    if not (path / META).is_file():
        raise CheckpointError(f"{path} is incomplete: {META} is missing.{others(path)}")
    return "sharded"


def _is_of_objects(path: Place) -> bool:
    """Returns whether this is laid out as in object storage, from where it may have been copied."""
    if isinstance(path, Path) and not any(path.glob(f"{GENERATION}*/{INDEX}")):
        return False
    return (path / MANIFEST).is_file()


def others(path: Place) -> str:
    """Names whole checkpoints beside ``path``, newest first, for messages."""
    if isinstance(path, Remote):
        return ""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist, either."
    found = []
    for entry in path.parent.iterdir():
        named = not entry.name.startswith(".") and entry != path
        with suppress(OSError):  # a link to nowhere, or somebody deletes it
            if named and ((entry / INDEX).is_file() or (entry / MANIFEST).is_file() or entry.suffix == ".ckpt"):
                found.append((entry.stat().st_mtime, entry.name))
    newest = [name for _, name in sorted(found, reverse=True)[:3]]
    return f" Checkpoints beside it: {', '.join(newest)}." if newest else ""
