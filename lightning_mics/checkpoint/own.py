"""What is a checkpoint of ours, or nothing, and so may be replaced; all else at a target belongs to somebody."""

from __future__ import annotations

import json
import pickle
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from torch.serialization import MAGIC_NUMBER

from lightning_mics.checkpoint import index
from lightning_mics.checkpoint.manifest import GENERATION, INDEX, MANIFEST, META
from lightning_mics.errors import CheckpointError

# Beside what a manifest lists: what DCP and we write, and what file systems leave.
_KNOWN = {MANIFEST, META, INDEX, f"{INDEX}.tmp", index.NAME}
_KNOWN_KINDS = re.compile(rf".+\.distcp|{re.escape(GENERATION)}.+|\.nfs.+|\.DS_Store")
# A record of a zip file begins with a header, in which the length of its name lies; before 1.6 PyTorch used pickle.
_ZIP, _HEADER_BYTES, _OLDER = b"PK\x03\x04", 30, pickle.dumps(MAGIC_NUMBER, protocol=2)
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_replaceable(path: Path) -> None:
    """Checks that a checkpoint may be written to ``path``.

    Raises:
        CheckpointError: If there is anything but a checkpoint, a link to one or to nowhere, or something empty.
    """
    if path.name in ("", ".."):
        raise CheckpointError(f"'{path}' is no name for a checkpoint. Save under a name in it.")
    try:
        is_link = stat.S_ISLNK(path.lstat().st_mode)
        found = _stranger(path)
        if is_link and found is None and is_empty(path):
            found = "something empty"
    except (FileNotFoundError, NotADirectoryError):  # or a link to nowhere
        return
    if found is not None:
        said = f"is a link to {path.resolve()}, which is {found}" if is_link else f"is {found}"
        raise CheckpointError(f"{path} {said}. Only checkpoints are replaced: save under another name.")


def is_empty(path: Path) -> bool:
    """Returns whether there is an empty file or folder."""
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def _stranger(path: Path) -> str | None:
    """Says what is at ``path``, unless it is a checkpoint or empty."""
    if (kind := special(path)) is not None:
        return kind
    if is_empty(path):
        return None
    if path.is_file():
        return None if _is_of_torch(path) else "a file that is no checkpoint"
    strangers = foreign((entry.name for entry in path.iterdir()), _read(path / MANIFEST))
    return f"a folder with other files in it ({strangers[0]})" if strangers else None


def special(path: Path) -> str | None:
    """Returns what kind of thing ``path`` is, unless it is a file, a folder or a link to one of these."""
    mode = path.stat().st_mode
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def own_names(folder: Path) -> list[str]:
    """Returns which of the names in a folder belong to a checkpoint there."""
    names = [entry.name for entry in folder.iterdir()]
    strangers = foreign(names, _read(folder / MANIFEST))
    return [name for name in names if name not in strangers]


def foreign(names: Iterable[str], manifest: bytes | None) -> list[str]:
    """Returns which of the names in a folder do not belong to a checkpoint there.

    Args:
        names: All of them; of what lies in folders of it, the names of those are enough.
        manifest: The content of the checkpoint's manifest, if it has one.
    """
    names = sorted({name.partition("/")[0] for name in names})
    known = _KNOWN | _listed(manifest)
    if not any(name in (INDEX, MANIFEST) or name.startswith(GENERATION) for name in names):
        return names
    return [name for name in names if name not in known and not _KNOWN_KINDS.fullmatch(name)]


def _listed(manifest: bytes | None) -> set[str]:
    try:
        return {str(name).partition("/")[0] for name in json.loads(manifest or b"{}")["files"]}
    except (ValueError, KeyError, TypeError):  # damaged, or none
        return set()


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _is_of_torch(path: Path) -> bool:
    """Returns whether ``torch.save`` wrote a file, of which the end may be missing."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        if head[:4] != _ZIP:
            return head.startswith(_OLDER)
        return file.read(int.from_bytes(head[26:28], "little")).endswith(b"data.pkl")
