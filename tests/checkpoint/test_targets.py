"""What a save may replace: a checkpoint, or nothing. Everything else is named, and stays as it is."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_tools import load_anew, save_new
from torch import nn

from lightning_mics import CheckpointError, consolidate, load_checkpoint, save_checkpoint
from lightning_mics.testing import WorkerPool


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "chapter.txt").write_text("years of work")


def checkpoint_with_notes(path: Path) -> None:
    save_checkpoint(path, nn.Linear(2, 2))
    (path / "notes.txt").write_text("years of work")


def link_to_file(path: Path) -> None:
    (path.parent / "thesis.txt").write_text("years of work")
    path.symlink_to("thesis.txt")


def link_to_empty_folder(path: Path) -> None:
    (path.parent / "disk").mkdir()
    path.symlink_to("disk")


def zip_file(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(22) + b"\x07\x00\x00\x00a/b.txt")


STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a FIFO"),
    "socket": (listen, "is a socket"),
    "file": (lambda path: path.write_text("years of work"), "a file that is no checkpoint"),
    "zip file": (zip_file, "a file that is no checkpoint"),
    "folder": (foreign_folder, r"other files in it \(chapter.txt\)"),
    "checkpoint with notes": (checkpoint_with_notes, r"other files in it \(notes.txt\)"),
    "link to a file": (link_to_file, "is a link to .*thesis.txt, which is a file that is no checkpoint"),
    "link to /dev/null": (lambda path: path.symlink_to("/dev/null"), "is a link to /dev/null, which is a device"),
    "link to an empty folder": (link_to_empty_folder, "is a link to .*disk, which is something empty"),
}


def snapshot(folder: Path) -> dict[str, object]:
    return {str(entry): entry.lstat().st_mtime_ns for entry in folder.rglob("*") if not entry.name.startswith(".mics")}


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
@pytest.mark.parametrize("what", STRANGERS)
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, what: str, sharded: bool) -> None:
    make, says = STRANGERS[what]
    make(tmp_path / "last.ckpt")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        save_checkpoint(tmp_path / "last.ckpt", nn.Linear(2, 2), sharded=sharded)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "", ".", "/", "some/.."])
def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a device|is no name"):
        save_checkpoint(path, nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_every_rank_is_told(pool: WorkerPool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.ckpt")
    for failure in pool.attempt(save_new, str(tmp_path / "last.ckpt"), 1, world_size=2):
        assert failure.kind == "CheckpointError" and "is a FIFO" in failure.message


def appear(path: Path) -> Callable[..., None]:
    def save(*args: object) -> None:
        path.write_text("years of work")

    return save


def test_what_appears_while_it_is_saved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", appear(tmp_path / "last.ckpt"))
    with pytest.raises(CheckpointError, match="a file that is no checkpoint"):
        save_checkpoint(tmp_path / "last.ckpt", nn.Linear(2, 2), sharded=False)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("last.ckpt", "years of work")]


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def damaged_file(path: Path) -> None:
    save_checkpoint(path, nn.Linear(2, 2), sharded=False)
    path.write_bytes(path.read_bytes()[:500])


def of_old_pytorch(path: Path) -> None:
    torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False)


def damaged_folder(path: Path) -> None:
    save_checkpoint(path, nn.Linear(2, 2))
    (path / "mics.json").write_text("{")
    (path / ".nfs0000").write_text("")


OURS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "empty folder": Path.mkdir,
    "empty file": empty_file,
    "full": lambda path: save_checkpoint(path, nn.Linear(2, 2), sharded=False),
    "sharded": lambda path: save_checkpoint(path, nn.Linear(2, 2)),
    "damaged file": damaged_file,
    "damaged folder": damaged_folder,
    "of an old PyTorch": of_old_pytorch,
    "dangling link": lambda path: path.symlink_to("gone.ckpt"),
}


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
@pytest.mark.parametrize("what", OURS)
def test_what_is_ours_is_replaced(tmp_path: Path, what: str, sharded: bool) -> None:
    OURS[what](tmp_path / "last.ckpt")
    save_checkpoint(tmp_path / "last.ckpt", nn.Linear(2, 2), meta={"step": 5}, sharded=sharded)
    assert load_checkpoint(tmp_path / "last.ckpt", nn.Linear(2, 2)) == {"step": 5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_a_link_to_a_checkpoint_is_replaced_and_never_followed(tmp_path: Path, sharded: bool) -> None:
    save_checkpoint(tmp_path / "step=1.ckpt", nn.Linear(2, 2), meta={"step": 1}, sharded=sharded)
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    save_checkpoint(tmp_path / "last.ckpt", nn.Linear(2, 2), meta={"step": 2}, sharded=sharded)
    assert not (tmp_path / "last.ckpt").is_symlink()
    for name, step in (("step=1.ckpt", 1), ("last.ckpt", 2)):
        assert load_checkpoint(tmp_path / name, nn.Linear(2, 2)) == {"step": step}


def test_force_replaces_no_device(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run.ckpt", nn.Linear(2, 2))
    os.mkfifo(tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="is a FIFO"):
        consolidate(tmp_path / "run.ckpt", tmp_path / "out.safetensors", force=True)
    assert (tmp_path / "out.safetensors").is_fifo()


@pytest.mark.parametrize("form", ["~/runs/last.ckpt", "file://{home}/runs/last.ckpt"])
def test_paths_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = form.format(home=tmp_path)
    for sharded in (True, False):
        save_checkpoint(path, nn.Linear(2, 2), meta={"step": 1}, sharded=sharded)
        assert load_checkpoint(path, nn.Linear(2, 2)) == {"step": 1}
    assert consolidate(path, "~/weights.safetensors") == tmp_path / "weights.safetensors"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["runs", "weights.safetensors"]


def test_ranks_expand_it_too(pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("~") / os.path.relpath(tmp_path, Path.home()) / "last.ckpt"
    pool.run(save_new, str(path), 3, world_size=2)
    assert pool.run(load_anew, str(tmp_path / "last.ckpt"), world_size=2)[0][1]["seed"] == 3
