"""Where a save writes before its checkpoint is whole, and the step that makes it one.

On a file system that is a hidden sibling, which all ranks see; a rename gives it its name. For object storage each rank
writes to its own disk and sends what it wrote to a folder of this save inside the checkpoint. The manifest, which is
put last, names that folder; only then is deleted what the manifest before it named. A marker beside the checkpoint
tells the next save of one that crashed.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lightning_mics.checkpoint import files, ranks
from lightning_mics.checkpoint.manifest import GENERATION, MANIFEST, Facts, Manifest, parse
from lightning_mics.checkpoint.own import check_replaceable, foreign
from lightning_mics.checkpoint.storage import Place, Remote, check_shared, each, staging
from lightning_mics.errors import CheckpointError

_UNWRITABLE = "Leave out what cannot be written, or convert it."


class Draft:
    """A checkpoint on a file system, while it is written.

    Attributes:
        path: Its name to be.
        local: The folder, or file, to write.
        aside: Where this rank may write before :meth:`bring`; elsewhere than ``local`` if that takes long.
        replaces_all: Whether it takes the place of whatever has the name.
    """

    def __init__(self, path: Place, local: Path, aside: Path | None = None, *, replaces_all: bool = False) -> None:
        self.path, self.local, self.aside, self.replaces_all = path, local, aside or local, replaces_all

    def bring(self) -> None:
        """Copies what ranks wrote aside; of files of one name the first rank's. Collective over the world."""
        if self.aside == self.local:
            return
        names = [file.relative_to(self.aside) for file in self.aside.rglob("*") if file.is_file()]
        before = ranks.together(lambda: names)[: ranks.rank()]

        def copy() -> None:
            for name in names:
                if not any(name in others for others in before):
                    (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.aside / name, self.local / name)

        ranks.on_each_rank(copy)

    def describe_added(self) -> dict[str, Facts]:
        """Returns what was written before the shards, on rank 0. Collective over the world."""
        return ranks.on_first_rank(lambda: files.describe(self.local)) or {}

    def send(self, written: dict[str, Facts]) -> dict[str, Facts]:
        """Brings what this rank wrote to where it belongs, and returns it."""
        return written

    def finish(self, manifest: Manifest) -> None:
        """Makes a whole checkpoint of the folder; on rank 0."""
        sizes = {name: (self.local / name).stat().st_size for name in manifest.files if (self.local / name).is_file()}
        _check_sizes(manifest, sizes)
        files.write_manifest(self.local, manifest)
        self.finish_file()

    def finish_file(self) -> None:
        """Makes a checkpoint of what was written; on rank 0."""
        assert isinstance(self.path, Path)
        if not self.replaces_all:
            check_replaceable(self.path)
        files.commit(self.local, self.path)

    def release(self) -> None:
        """Says that nobody writes here any more; the next save deletes what is left."""
        if self.aside != self.local:
            files.delete(self.aside)
            files.release(self.aside)
        files.release(self.local)

    def close(self) -> None:
        """Ends a save whose checkpoint is whole."""
        self.release()

    def discard(self) -> None:
        """Ends a save that failed."""
        files.delete(self.local)  # on every rank: without shared storage each node has one
        self.release()

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Deletes what was written when an error ends a save."""
        try:
            yield
        except CheckpointError as error:
            self.discard()
            reason = str(error).rstrip(".")
            for place in (self.local, self.aside):
                reason = reason.replace(str(place), str(self.path))
            failed = _failed(self.path, reason, _UNWRITABLE if error.is_content else self._advice)
            failed.rank = error.rank
            raise failed from error
        except BaseException:
            self.release()
            raise

    _advice = "Check the disk's space and permissions."


class _RemoteDraft(Draft):
    """A checkpoint in object storage, while it is written; ``marker`` is rank 0's on every rank."""

    path: Remote

    def __init__(self, path: Remote, local: Path, marker: Remote) -> None:
        super().__init__(path, local)
        self._marker = marker
        self._folder = f"{GENERATION}{files.owner_of(marker)}"
        self._added: dict[str, Facts] = {}

    def describe_added(self) -> dict[str, Facts]:
        described = ranks.together(lambda: files.describe(self.local))
        mine, before = described[ranks.rank()], described[: ranks.rank()]
        self._added = {name: mine[name] for name in mine if not any(name in other for other in before)}
        return {name: facts for part in reversed(described) for name, facts in part.items()}

    def send(self, written: dict[str, Facts]) -> dict[str, Facts]:
        folder = self.path / self._folder
        each(lambda name: (folder / name).upload(self.local / name), [*self._added, *written])
        files.delete(self.local)
        return written

    def finish(self, manifest: Manifest) -> None:
        _check_sizes(manifest, (self.path / self._folder).tree())
        before = _named(self.path)
        (self.path / MANIFEST).write_bytes(replace(manifest, folder=self._folder).to_text().encode())
        with suppress(CheckpointError):  # it is whole; the next save deletes what is left
            _delete_replaced(self.path, self._folder, before)

    def finish_file(self) -> None:
        self.path.upload(self.local)

    def release(self) -> None:
        files.release(self.local)
        files.release(self._marker)

    def close(self) -> None:
        self.release()
        files.delete(self.local)
        if ranks.rank() == 0:
            with suppress(CheckpointError):  # the next save deletes it
                self._marker.unlink()

    def discard(self) -> None:
        if ranks.rank() == 0:
            with suppress(CheckpointError):
                _delete(self.path / self._folder)
        self.close()

    _advice = ""


def _failed(path: Place, reason: str, advice: str) -> CheckpointError:
    return CheckpointError(f"Saving {path} failed, and nothing was changed there: {reason}. {advice}".rstrip())


def begin(path: Place, *, folder: bool, replaces_all: bool = False, aside: bool = False) -> Draft:
    """Cleans up after crashes and makes room. Collective over the world.

    Args:
        path: The checkpoint.
        folder: Whether it is to be a folder.
        replaces_all: Whether it takes the place of whatever has the name, on a file system.
        aside: Whether ranks first write to disks of their own, on a file system.

    Raises:
        CheckpointError: On every rank, if the checkpoint cannot be written, or something else is there.
    """
    if isinstance(path, Remote):
        return _begin_remote(path, folder=folder)

    def prepare() -> Path:
        try:
            if not replaces_all:
                check_replaceable(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.recover(path)
            temporary = files.temporary_name(path)
            if folder:
                temporary.mkdir()
        except OSError as error:
            raise _failed(path, ranks.describe_error(error), Draft._advice) from error
        return temporary

    temporary = ranks.on_first_rank(prepare)
    assert temporary is not None
    own = ranks.on_each_rank(lambda: _make_room(folder)) if aside else None
    return Draft(path, temporary, own, replaces_all=replaces_all)


def _make_room(folder: bool) -> Path:
    """Returns a place on this machine's disk."""
    files.recover(staging())
    local = files.temporary_name(staging())
    if folder:
        local.mkdir()
    return local


def _begin_remote(path: Remote, *, folder: bool) -> Draft:
    def prepare() -> str:
        _check_replaceable(path, folder=folder)
        _recover(path.parent)
        marker = files.temporary_name(path)
        marker.write_bytes(path.name.encode())
        return marker.name

    check_shared(path)
    name = ranks.on_first_rank(prepare)
    assert name is not None
    return _RemoteDraft(path, ranks.on_each_rank(lambda: _make_room(folder)), path.parent / name)


def _check_sizes(manifest: Manifest, sizes: dict[str, int]) -> None:
    for name, facts in manifest.files.items():
        if name not in sizes:
            raise CheckpointError(
                f"rank 0 does not see {name}, which was written. If another rank wrote it, all ranks must save to one "
                "folder: give an absolute path on storage that all nodes share. Otherwise somebody deletes files there"
            )
        if sizes[name] != facts["bytes"]:
            raise CheckpointError(f"{name} was changed by somebody else while it was saved")


# What lies in object storage.


def _check_replaceable(path: Remote, *, folder: bool) -> None:
    if path.is_bucket:
        raise CheckpointError(f"{path} is no name for a checkpoint. Save under a name in it.")
    if path.is_file():
        if folder:
            raise CheckpointError(f"{path} is an object, not a folder of shards. Save under another name.")
        return
    names = list(path.tree()) if path.is_dir() else []
    strangers = foreign(names, _read_manifest(path))
    if strangers or (names and not folder):
        found = f"a folder with other files in it ({strangers[0]})" if strangers else "a folder of shards, not a file"
        raise CheckpointError(f"{path} is {found}. Save under another name.")


def _read_manifest(path: Remote) -> bytes | None:
    try:
        return (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None


def _named(path: Remote) -> str | None:
    """Returns the folder that the manifest of a checkpoint names; none if it is damaged or not there."""
    with suppress(CheckpointError):
        return parse(_read_manifest(path) or b"", str(path / MANIFEST), trusted=True).folder
    return None


def _delete_replaced(path: Remote, folder: str, before: str | None = None) -> None:
    """Deletes what of a checkpoint its manifest does not name, but for saves that are running.

    Args:
        path: The checkpoint.
        folder: What its manifest names.
        before: What the manifest named that this one replaced.
    """
    names = path.tree()
    tops = {name.partition("/")[0] for name in names} - {MANIFEST, folder}
    ours = tops - set(foreign([*tops, MANIFEST], None))
    running = {top for top in ours if top.startswith(GENERATION) and top != before and not _is_over(path / top)}
    each(Remote.unlink, [path / name for name in names if name.partition("/")[0] in ours - running])


def _is_over(generation: Remote) -> bool:
    return files.is_abandoned(generation, generation.newest_change)


def _recover(parent: Remote) -> None:
    """Deletes what saves that crashed have left in checkpoints here."""
    for marker in filter(files.is_unfinished, list(parent.iterdir())):
        with suppress(FileNotFoundError):  # somebody was faster
            path = parent / marker.read_bytes().decode()
            folder = path / f"{GENERATION}{files.owner_of(marker)}"
            if files.is_abandoned(marker, functools.partial(_last_sign, folder, marker)):
                _clean(path, folder)
                marker.unlink()


def _clean(path: Remote, crashed: Remote) -> None:
    """Deletes what a save that crashed has written, or else what it replaced."""
    if (folder := _named(path)) == crashed.name:
        _delete_replaced(path, folder)
    else:
        _delete(crashed)


def _last_sign(folder: Remote, marker: Remote) -> float:
    return max(folder.newest_change(), marker.modified())


def _delete(path: Remote) -> None:
    each(Remote.unlink, [path / name for name in path.tree()])


def remove(path: Place) -> None:
    """Deletes a checkpoint. It loses its name, or its manifest, first, so that half of it is never taken for one."""
    if isinstance(path, Path):
        files.remove(path)
    elif path.is_file():
        path.unlink()
    else:
        _check_replaceable(path, folder=True)
        (path / MANIFEST).unlink()
        _delete(path)
