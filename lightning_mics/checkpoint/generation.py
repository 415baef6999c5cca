"""One generation of a checkpoint: what was written together is read together, or not at all.

A checkpoint may be replaced while it is read, and ranks may see different folders under one path. So all ranks load by
the manifest that rank 0 read, and a file is checked against it through the very handle by which it is then read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TypeVar

from torch.distributed.checkpoint.metadata import Metadata

from lightning_mics.checkpoint import files, index, ranks
from lightning_mics.checkpoint.background import settle, wait_for_checkpoints
from lightning_mics.checkpoint.manifest import MANIFEST, Facts, Manifest, parse, step_of
from lightning_mics.checkpoint.storage import Identity, Place, Remote, check_shared, identity_of, place, size_of
from lightning_mics.checkpoint.trust import is_archive, is_trusted, unpickle
from lightning_mics.core.log import inform
from lightning_mics.errors import CheckpointError

_BLOCK_BYTES = 1 << 22
_MAX_OPEN = 256
_TRIES, _OPENINGS, _PAUSE_SECONDS = 50, 4, 0.02  # in all; where ranks differ; between the latter
_NAMED = 5

T = TypeVar("T")
Progress = Callable[[int], None]


class Generation:
    """A checkpoint as it was when it was opened.

    Args:
        path: Where it is.
        weights_only: ``False`` if it is trusted.
        hold: Whether to open all files at once, so that a writer who replaces the checkpoint cannot take them away.

    Attributes:
        path: Where it was.
        folder: Where its files are: in object storage, a folder of the save that wrote it.
        kind: Sharded, full, or a folder of other libraries' files.
        manifest: What it consists of; ``None`` for a full file, and where another program wrote it.
        listed: What is known of each file, by its name in the folder; a full file has none.
        digest: The same for two generations only if they hold the same.
    """

    def __init__(self, path: Place, weights_only: bool | None, *, hold: bool = False) -> None:
        self.path = self.folder = path
        self.weights_only = weights_only
        self.kind = files.find_kind(path)
        self.manifest: Manifest | None = None
        self._handles: dict[str, BinaryIO] = {}
        self._checked: dict[str, Identity] = {}
        self._meta: dict[str, Any] | None = None
        try:
            if self.kind == "full":
                self.listed: dict[str, Facts] = {"": {}}
                self.digest = _archive_digest(path, self._open(""))
            else:
                self._open_folder()
            for name in sorted(self.listed)[: _MAX_OPEN if hold else 0]:
                self._open(name)
        except FileNotFoundError as error:
            self.close()
            raise CheckpointError(f"{path} is incomplete: {error}") from error
        except BaseException:
            self.close()
            raise

    def _open_folder(self) -> None:
        text = None
        with suppress(FileNotFoundError), files.open_file(self.path / MANIFEST) as file:
            text = file.read()
        if text is None:
            self.listed = {files.INDEX: {}, files.META: {}}
            self.listed |= index.reaches(self.metadata())
            text = self._open(files.INDEX).read()
        else:
            self.manifest = parse(text, str(self.path / MANIFEST), trusted=is_trusted(self.weights_only))
            self.listed = self.manifest.files
            if self.manifest.folder:
                self.folder = self.path / self.manifest.folder
        self.digest = hashlib.sha256(text).hexdigest()

    def identity(self) -> Identity | None:
        """Returns which file a full checkpoint is, and in which state."""
        return identity_of(self._open("")) if self.kind == "full" else None

    def close(self) -> None:
        """Closes all files."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def step(self) -> int | None:
        """Returns the step of training that is saved, if it is known."""
        return step_of(self.meta()) if self.manifest is None else self.manifest.step

    def glance(self) -> None:
        """Checks that all files are there and as long as they were written.

        Raises:
            CheckpointError: Naming one that is not.
        """
        for name in self.listed:
            self._check_size(name, self._open(name))

    def total_bytes(self) -> int:
        """Returns the size of what there is to check."""
        return sum(facts.get("bytes", 0) for facts in self.listed.values())

    def open(self, name: str) -> BinaryIO:
        """Opens one of the files, which is as it was written.

        Raises:
            CheckpointError: If it is missing or another one.
        """
        handle = self._open(name)
        if self._checked.get(name) != identity_of(handle):
            self._check(name, handle)
            self._checked[name] = identity_of(handle)
        handle.seek(0)
        return handle

    def _open(self, name: str) -> BinaryIO:
        if name in self._handles:
            return self._handles[name]
        if name not in self.listed or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{self.path} names the file {name!r}, which is none of its own. Use another one.")
        try:
            handle = self._open_file(name)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.path} is incomplete: {name} is missing. If you copied the checkpoint, copy it again; on "
                f"several nodes, keep it on storage that all of them share.{files.others(self.path)}"
            ) from error
        if len(self._handles) >= _MAX_OPEN:
            self._handles.pop(next(iter(self._handles))).close()
        self._handles[name] = handle
        return handle

    def _open_file(self, name: str) -> BinaryIO:
        if name or isinstance(self.folder, Path):
            return files.open_file(self.folder / name)
        return self.folder.fetch()  # a single object may be replaced while it is read

    def _check(self, name: str, handle: BinaryIO) -> None:
        if self.kind == "full":
            _check_archive(self.path, handle, slice(None))
            return
        facts = self.listed[name]
        self._check_size(name, handle)
        if "crc32" in facts and files.crc32_of(handle) != facts["crc32"]:
            raise CheckpointError(
                f"{self.path / name} is damaged: its content does not match its checksum. Copy it again from where it "
                f"is whole.{files.others(self.path)}"
            )

    def _check_size(self, name: str, handle: BinaryIO) -> None:
        facts, size = self.listed[name], size_of(handle)
        if size < facts.get("bytes", 0) or ("crc32" in facts and size != facts["bytes"]):
            raise CheckpointError(
                f"{self.path / name} is damaged: it has {size} bytes instead of {facts['bytes']}. Copy it again from "
                f"where it is whole.{files.others(self.path)}"
            )

    def check(self, *, alone: bool = False, progress: Progress = lambda size: None) -> None:
        """Checks all files, each by one of the ranks. Collective over the world, unless ``alone``.

        What another rank has checked counts for this one where it finds the very same file.

        Args:
            alone: Whether other ranks, if there are any, do not take part.
            progress: Told the size of what was checked, in bytes.

        Raises:
            CheckpointError: Naming a file that is missing or whose content is another one.
        """
        rank, world_size = (0, 1) if alone else (ranks.rank(), ranks.world_size())

        def check_part() -> dict[str, Identity]:
            names = sorted(self.listed)[rank::world_size]
            for name in names[:_MAX_OPEN]:
                self._open(name)  # a writer who now replaces the checkpoint does not take them away
            for name in names:
                self.open(name)
                progress(self.listed[name].get("bytes", 0))
            return {name: self._checked[name] for name in names}

        if self.kind == "full":
            self._check_full(rank, world_size, alone)
            return
        for part in ranks.together(check_part, alone=alone):
            self._checked |= part

    def _check_full(self, rank: int, world_size: int, alone: bool) -> None:
        seen = ranks.together(self.identity, alone=alone)
        part = slice(rank, None, world_size) if len(set(seen)) == 1 else slice(None)
        ranks.together(lambda: _check_archive(self.path, self._open(""), part), alone=alone)
        self._checked[""] = identity_of(self._open(""))

    def metadata(self) -> Metadata:
        """Returns DCP's index of a sharded checkpoint.

        Raises:
            CheckpointError: If it is damaged, or more than an index.
        """
        self._refuse_folder()
        if index.NAME in self.listed:
            return index.decode(self.open(index.NAME).read(), str(self.path / index.NAME))
        return index.unpickle_index(self.open(files.INDEX), str(self.path / files.INDEX), self.weights_only)

    def _refuse_folder(self) -> None:
        if self.kind == "folder":
            raise CheckpointError(
                f"{self.path} is of the Trainer of transformers. Load it with MiCSTrainer.train(resume_from_checkpoint="
                "...), or its weights with from_pretrained."
            )

    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside its shards: of a full file, everything.

        Raises:
            CheckpointError: If it is damaged, holds objects that ``weights_only`` forbids, or lost its manifest.
        """
        self._refuse_folder()
        name = files.META if self.kind == "sharded" else ""
        where = self.path / name if name else self.path
        if not is_archive(self.open(name)):
            raise CheckpointError(f"{where} is damaged or not a PyTorch checkpoint. Use another one.")
        content = unpickle(self.open(name), str(where), self.weights_only)
        if not isinstance(content, dict):
            raise CheckpointError(f"{where} holds a {type(content).__name__}, not a checkpoint.")
        if self.kind == "sharded" and self.manifest is None and "mics" in content and not is_trusted(self.weights_only):
            raise CheckpointError(
                f"{self.path} is incomplete: {MANIFEST} is missing, which shows damage. Copy it again from where it "
                f"is whole or, if you trust it, load it with weights_only=False.{files.others(self.path)}"
            )
        self._meta = content
        return content

    def describe(self) -> str:
        """Says what this is: step, number of ranks and shard size, as far as they are known."""
        if self.manifest is None:
            step = step_of(self._meta or {})
            return ", ".join([*([] if step is None else [f"step {step}"]), f"a {self.kind} checkpoint"])
        known = {
            "step": self.manifest.step,
            "world size": self.manifest.world_size,
            "shard size": self.manifest.shard_size,
        }
        return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def read_generation(
    path: str | os.PathLike[str] | Remote,
    weights_only: bool | None,
    use: Callable[[Generation], T],
    *,
    alone: bool = False,
) -> T:
    """Reads a checkpoint that may be replaced meanwhile. Collective over the world, unless ``alone``.

    Args:
        path: The checkpoint.
        weights_only: ``False`` if it is trusted.
        use: Reads it; once more, from the next generation, where it was replaced. Raises on all ranks or on none.
        alone: Whether other ranks, if there are any, do not take part.

    Returns:
        What ``use`` returned.

    Raises:
        CheckpointError: On every rank, if the checkpoint is missing, damaged or does not fit, or is another one on
            some ranks.
    """
    settle() if alone else wait_for_checkpoints()
    path = place(path)
    if not alone:
        check_shared(path)
    for attempt in range(_TRIES):
        opened: list[Generation] = []
        try:
            _open_same(path, weights_only, alone, opened, again=attempt > 0)
            result = use(opened[0])
        except CheckpointError:
            if attempt + 1 == _TRIES or not _is_replaced(path, weights_only, alone, opened, attempt):
                raise
            continue
        finally:
            for generation in opened:
                generation.close()
        if not alone:
            inform(f"Loaded {path}: {generation.describe()}.")
        return result
    raise AssertionError


@contextmanager
def local_copy(path: Place, weights_only: bool | None, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Yields a local folder with files of a sharded checkpoint.

    Args:
        path: The checkpoint.
        weights_only: ``False`` if it is trusted.
        wanted: Tells by name which files are needed.

    Raises:
        CheckpointError: If one is damaged.
    """
    generation = Generation(path, weights_only)
    try:
        if isinstance(generation.folder, Path):
            yield generation.folder
            return
        with TemporaryDirectory(prefix="mics-") as copy:
            for name in filter(wanted, generation.listed):
                target = Path(copy) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with generation.open(name) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, _BLOCK_BYTES)
            yield Path(copy)
    finally:
        generation.close()


def _open_same(path: Place, weights_only: bool | None, alone: bool, opened: list[Generation], *, again: bool) -> None:
    """Opens what all ranks see.

    Raises:
        CheckpointError: On every rank, if they do not see the same.
    """
    if not again:
        ranks.together(lambda: _recover(path) if alone or ranks.rank() == 0 else None, alone=alone)

    def step() -> tuple[str, str]:
        opened.append(Generation(path, weights_only, hold=again))
        return opened[0].digest, opened[0].describe()

    (digest, said), *others = ranks.together(step, alone=alone)
    strangers = [rank for rank, (seen, _) in enumerate(others, 1) if seen != digest]
    if strangers:
        named = ", ".join(map(str, strangers[:_NAMED])) + (" and others" if len(strangers) > _NAMED else "")
        raise CheckpointError(
            f"Not all ranks see the same checkpoint under {path}: rank 0 sees {said}; {len(strangers)} of "
            f"{len(others) + 1} ranks ({named}) see another, rank {strangers[0]} {others[strangers[0] - 1][1]}. Give "
            "an absolute path on storage that all nodes share, or copy one checkpoint to all of them."
        )


def _is_replaced(path: Place, weights_only: bool | None, alone: bool, opened: list[Generation], attempt: int) -> bool:
    """Returns, on every rank the same, whether something else can be read by now than what just could not."""

    def look() -> tuple[str | None, str | None]:
        now = None
        with suppress(CheckpointError, OSError):
            fresh = Generation(path, weights_only)
            now = fresh.digest
            fresh.close()
        return (opened[0].digest if opened else None), now

    looks = ranks.together(look, alone=alone)
    seen, now = looks[0]
    differed = len({digest for digest, _ in looks}) > 1
    if differed and attempt < _OPENINGS:
        time.sleep(_PAUSE_SECONDS)
        return True
    return now is not None and now != seen


def _recover(path: Place) -> None:
    if isinstance(path, Path) and path.parent.is_dir():
        files.recover(path)


# Files.


def _archive_digest(path: Place, handle: BinaryIO) -> str:
    """Returns a digest of names, sizes and checksums of the records of a file that ``torch.save`` wrote."""
    with _archive(path, handle) as archive:
        records = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()]
    return hashlib.sha256(repr(records).encode()).hexdigest()


def _check_archive(path: Place, handle: BinaryIO, part: slice) -> None:
    """Compares records of a file that ``torch.save`` wrote with the checksums that it left there."""
    with _archive(path, handle) as archive:
        # PyTorch writes 0 where it was told to skip checksums (torch.serialization.set_crc32_options).
        for record in [record for record in archive.infolist() if record.CRC][part]:
            with archive.open(record) as content:
                while content.read(_BLOCK_BYTES):
                    pass


@contextmanager
def _archive(path: Place, handle: BinaryIO) -> Iterator[zipfile.ZipFile]:
    if not is_archive(handle):
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint.{files.others(path)}")
    try:
        with zipfile.ZipFile(handle) as archive:
            yield archive
    except Exception as error:  # a damaged archive makes zipfile raise almost anything
        raise CheckpointError(f"{path} is damaged ({error}).{files.others(path)}") from error
