"""Checkpoints in object storage: whole or not at all without a rename, and errors that say what to do."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checkpoint_tools import equal, load_anew, save_new
from object_storage import Objects, keys
from torch import nn
from works import works

from lightning_mics import CheckpointError, consolidate, load_checkpoint, save_checkpoint, wait_for_checkpoints
from lightning_mics.checkpoint import (
    compare_checkpoints,
    describe_checkpoint,
    files,
    list_checkpoints,
    read_weights,
    remove,
    storage,
    verify_checkpoint,
)
from lightning_mics.checkpoint.generation import Generation
from lightning_mics.testing import WorkerPool

URL = "objects://bucket/run/last.ckpt"
FILES = [".metadata", "__0_0.distcp", "index.json", "meta.pt"]
WHOLE = sorted(f"run/last.ckpt/{name}" for name in ["mics.json", *(f"mics-*/{file}" for file in FILES)])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OBJECTS_ROOT", str(tmp_path / "objects"))
    monkeypatch.setattr(storage, "_PAUSES_SECONDS", (0.0,) * 5)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("objects", "tmp"):
        (tmp_path / name).mkdir()
    return tmp_path / "objects"


def of_step(step: int) -> nn.Module:
    model = nn.Linear(4, 4)
    for param in model.parameters():
        nn.init.constant_(param, step)
    return model


def save_step(step: int, sharded: bool = True, url: str = URL) -> None:
    save_checkpoint(url, of_step(step), meta={"step": step}, sharded=sharded)


def loaded_step(url: str | Path = URL) -> int:
    model = of_step(0)
    step = int(load_checkpoint(url, model)["step"])
    assert {float(value) for param in model.parameters() for value in param.unique()} == {float(step)}
    return step


@contextmanager
def before_each(action: Callable[[str, str], None]) -> Iterator[None]:
    Objects.before = staticmethod(action)
    try:
        yield
    finally:
        Objects.before = staticmethod(lambda operation, key: None)


# Round trips.


def save_and_load(root: str, sharded: bool) -> tuple[Any, Any]:
    os.environ["OBJECTS_ROOT"] = root
    saved = save_new(URL, 1, sharded)
    save_new(URL, 2, sharded)
    saved = save_new(URL, 1, sharded)
    return saved, load_anew(URL)


@works("Savers", "URLs of object storage, sharded and full")
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_ranks_save_and_load(pool: WorkerPool, root: Path, sharded: bool) -> None:
    for saved, (loaded, meta) in pool.run(save_and_load, str(root), sharded, world_size=2):
        assert equal(loaded, saved) and meta["seed"] == 1
    assert keys(root) == sorted([*WHOLE, "run/last.ckpt/mics-*/__1_0.distcp"] if sharded else ["run/last.ckpt"])


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_memory_consolidating_and_copies(root: Path, tmp_path: Path, sharded: bool) -> None:
    url = f"memory://{tmp_path.name}/last.ckpt"
    save_step(1, sharded, url)
    save_step(3, sharded, url)
    assert loaded_step(url) == 3
    whole = consolidate(url, "objects://bucket/whole.ckpt")
    assert str(whole) == "objects://bucket/whole.ckpt" and keys(root) == ["whole.ckpt"]
    assert loaded_step("objects://bucket/whole.ckpt") == 3
    assert consolidate("objects://bucket/whole.ckpt", tmp_path / "weights.safetensors").is_file()
    with pytest.raises(CheckpointError, match="--force"):
        consolidate(url, "objects://bucket/whole.ckpt")
    fsspec.filesystem("memory").get(url, str(tmp_path / "copy.ckpt"), recursive=True)
    assert loaded_step(tmp_path / "copy.ckpt") == 3
    save_step(4, sharded, str(tmp_path / "copy.ckpt"))
    assert loaded_step(tmp_path / "copy.ckpt") == 4
    remove(url)
    with pytest.raises(CheckpointError, match="There is no checkpoint at memory://"):
        loaded_step(url)
    assert not os.listdir(tempfile.gettempdir())


def test_what_was_uploaded_is_read_and_replaced(root: Path, tmp_path: Path) -> None:
    save_step(1, url=str(tmp_path / "run.ckpt"))
    system = Objects()
    for file in (tmp_path / "run.ckpt").iterdir():
        system.put_file(str(file), f"bucket/run/last.ckpt/{file.name}")
    assert loaded_step() == 1
    assert read_weights(URL)["step"] == 1
    save_step(2)
    assert loaded_step() == 2 and keys(root) == WHOLE


def test_what_is_in_it_is_shown(root: Path) -> None:
    save_step(1)
    save_step(2, sharded=False, url="objects://bucket/run/full.ckpt")
    listed = list_checkpoints("objects://bucket/run")
    assert {(entry.path, entry.kind, entry.step, entry.problem) for entry in listed} == {
        (URL, "sharded", 1, None),
        ("objects://bucket/run/full.ckpt", "full", 2, None),
    }
    assert describe_checkpoint(URL).tensors.keys() == {"state_dict.weight", "state_dict.bias"}
    assert not any(verify_checkpoint(URL).values())
    assert compare_checkpoints(URL, URL).differences == []


def test_in_the_background(root: Path) -> None:
    model = of_step(1)
    save_checkpoint(URL, model, meta={"step": 1}, background=True)
    nn.init.zeros_(model.weight)
    wait_for_checkpoints()
    assert loaded_step() == 1 and keys(root) == WHOLE


def test_urls_that_went_through_pathlib(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path(URL), of_step(1), meta={"step": 1})
    assert loaded_step(Path(URL)) == 1 and keys(root) == WHOLE
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["objects", "tmp"]
    assert storage.place(Path("run:/1")) == Path("run:/1")


def test_storage_options_arrive(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OBJECTS_ROOT")
    options = {"root": str(root)}
    save_checkpoint(URL, of_step(1), meta={"step": 1}, storage_options=options)
    assert load_checkpoint(URL, of_step(0), storage_options=options) == {"step": 1}


# Whole or not at all.


class Crash(BaseException):
    """What no code catches, as if the process were gone."""


def crash_at(moment: int) -> Callable[[str, str], None]:
    passed = 0

    def count(operation: str, key: str) -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            raise Crash

    return count


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_a_crash_at_any_moment_keeps_a_whole_checkpoint(root: Path, sharded: bool) -> None:
    survivors = []
    save_step(1, sharded)
    for moment in range(1, 1000):
        try:
            with before_each(crash_at(moment)):
                save_step(2, sharded)
            break
        except Crash:
            survivors.append(loaded_step())
        save_step(1, sharded, "objects://bucket/run/other.ckpt")  # cleans up beside it
        assert [key for key in keys(root) if "last" in key] == (WHOLE if sharded else ["run/last.ckpt"]), moment
        save_step(1, sharded)
    assert set(survivors) == {1, 2} and len(survivors) >= 5


def test_one_that_is_replaced_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = Generation.meta

    def replace_first(generation: Generation) -> Any:
        monkeypatch.setattr(Generation, "meta", meta)
        save_step(2)
        return meta(generation)

    save_step(1)
    monkeypatch.setattr(Generation, "meta", replace_first)
    assert loaded_step() == 2


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_damage_is_found(root: Path, sharded: bool) -> None:
    save_step(1, sharded)
    for file in root.iterdir():
        if "mics.json" not in file.name:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            before = file.read_bytes()
            file.write_bytes(content)
            with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
                loaded_step()
            file.write_bytes(before)
    assert loaded_step() == 1
    next(file for file in root.iterdir() if "mics.json" not in file.name).unlink()
    with pytest.raises(CheckpointError, match=r"incomplete|no checkpoint"):
        loaded_step()


def test_saves_that_run_are_left_alone(root: Path) -> None:
    running = files.temporary_name(storage.place(URL))
    running.write_bytes(b"last.ckpt")
    data = storage.place(URL) / f"mics-{files.owner_of(running)}"
    (data / "__0_0.distcp").write_bytes(b"half")
    for step in (1, 2):
        save_step(step)
        assert loaded_step() == step and (data / "__0_0.distcp").exists()
    files.release(running)
    save_step(3)
    assert keys(root) == WHOLE


# What fails.


def test_what_passes_is_tried_again(root: Path) -> None:
    calls: Counter[int] = Counter()

    def fail_often(operation: str, key: str) -> None:
        # By thread: what others call in between must not decide how often a call fails in a row.
        thread = threading.get_ident()
        calls[thread] += 1
        if calls[thread] % 3:
            raise [ConnectionResetError("cut"), OSError(16, "Please reduce your request rate")][calls[thread] % 2]

    with before_each(fail_often):
        for sharded, url in ((True, URL), (False, "objects://bucket/full.ckpt")):
            save_step(1, sharded, url)
            assert loaded_step(url) == 1
    assert calls.total() > 50


def refuse(error: Exception) -> Callable[[str, str], None]:
    def action(operation: str, key: str) -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError("Forbidden"), r"PermissionError: Forbidden\)\. Check the credentials .*rights"),
        (ConnectionError("no route"), r"ConnectionError: no route\)\. It was tried several times\. Check the net"),
        (ImportError("Install s3fs to access S3"), r"pip install 'lightning-mics\[remote\]'"),
        (ConnectionError("key hunter2-secret is wrong"), r"key \*\*\* is wrong"),
    ],
)
def test_errors_say_what_to_do(root: Path, error: Exception, says: str) -> None:
    options = {"root": str(root), "client": {"secret": "hunter2-secret"}}
    for act in (save_checkpoint, load_checkpoint):
        with before_each(refuse(error)), pytest.raises(CheckpointError, match=says) as raised:
            act(URL, of_step(0), storage_options=options)
        assert URL in str(raised.value) and "hunter2" not in str(raised.value)
        assert not os.listdir(tempfile.gettempdir())


def test_a_missing_bucket(root: Path) -> None:
    with before_each(refuse(FileNotFoundError("The bucket does not exist"))):
        with pytest.raises(CheckpointError, match=r"bucket/run/.*no such bucket. Create it, or check the URL"):
            save_step(1)
        with pytest.raises(CheckpointError, match=f"There is no checkpoint at {URL}"):
            loaded_step()


def test_urls_show_no_passwords() -> None:
    place = storage.place("ftp://me:hunter2-secret@host/run.ckpt?token=abcdef123")
    assert str(place) == "ftp://***@host/run.ckpt"


def test_an_unknown_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for act in (save_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=r"nope://a/b.*Protocol not known: nope.*Check the URL"):
            act("nope://a/b", of_step(0))
    assert not list(tmp_path.iterdir())


def test_the_memory_of_one_process(pool: WorkerPool) -> None:
    for function in (save_new, load_anew):
        arguments = ("memory://x/y", 1) if function is save_new else ("memory://x/y",)
        for failure in pool.attempt(function, *arguments, world_size=2):
            assert failure.kind == "CheckpointError" and "memory of one process, and there are 2" in failure.message


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_what_is_not_ours_is_not_replaced(root: Path, sharded: bool) -> None:
    Objects().pipe_file("bucket/run/last.ckpt/thesis.txt", b"years of work")
    with pytest.raises(CheckpointError, match=r"other files in it \(thesis.txt\)"):
        save_step(1, sharded)
    with pytest.raises(CheckpointError, match=r"other files in it \(thesis.txt\)"):
        remove(URL)
    for url in ("objects://bucket", "objects://bucket/"):
        with pytest.raises(CheckpointError, match="no name for a checkpoint"):
            save_step(1, sharded, url)
    assert keys(root) == ["run/last.ckpt/thesis.txt"]


def test_kinds_are_not_exchanged(root: Path) -> None:
    save_step(1, sharded=False)
    with pytest.raises(CheckpointError, match="not a folder of shards"):
        save_step(2)
    remove(URL)
    save_step(3)
    with pytest.raises(CheckpointError, match="a folder of shards, not a file"):
        save_step(4, sharded=False)
    assert loaded_step() == 3
