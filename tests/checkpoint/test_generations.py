"""What was written together is read together: readers beside writers, and ranks with folders of their own."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_tools import PLAIN
from torch import nn

from lightning_mics import CheckpointError, consolidate, load_checkpoint, mics_shard, save_checkpoint
from lightning_mics.checkpoint import load
from lightning_mics.checkpoint.generation import Generation
from lightning_mics.testing import WorkerPool


def of_step(step: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for param in model.parameters():
        nn.init.constant_(param, step)
    return model


def save_step(path: Path, step: int, sharded: bool = True) -> None:
    save_checkpoint(path, of_step(step), meta={"step": step}, sharded=sharded)


def read_step(path: str | Path, model: nn.Module) -> int:
    """Loads a checkpoint; returns its step, of which all of it must be."""
    step = load_checkpoint(path, model)["step"]
    assert {float(value) for param in model.parameters() for value in whole(param).unique()} == {float(step)}
    return int(step)


def whole(param: Any) -> torch.Tensor:
    return param.full_tensor() if hasattr(param, "full_tensor") else param.detach()


def consolidated_step(path: Path) -> int:
    content = torch.load(consolidate(path, path.parent / "out.ckpt", force=True), weights_only=True)
    assert {float(value) for tensor in content["state_dict"].values() for value in tensor.unique()} == {content["step"]}
    return int(content["step"])


WHERE = {"index": (Generation, "metadata"), "rest": (Generation, "meta"), "shards": (load._Reader, "read_data")}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("read", [lambda path: read_step(path, of_step(0)), consolidated_step])
def test_one_that_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, read: Callable[[Path], int]
) -> None:
    path, (owner, name) = tmp_path / "last.ckpt", WHERE[where]
    save_step(path, 1)
    original = getattr(owner, name)

    def replace_first(*args: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        save_step(path, 2)
        return original(*args)

    monkeypatch.setattr(owner, name, replace_first)
    monkeypatch.setattr("lightning_mics.checkpoint.generation._MAX_OPEN", 1)  # so that files are opened again
    assert read(path) == 2


@pytest.mark.parametrize("read", [lambda path: read_step(path, of_step(0)), consolidated_step])
def test_a_full_file_that_is_replaced_is_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], int]
) -> None:
    path, meta = tmp_path / "last.ckpt", Generation.meta
    save_step(path, 1, sharded=False)

    def replace_first(generation: Generation) -> Any:
        save_step(path, 2, sharded=False)
        return meta(generation)

    monkeypatch.setattr(Generation, "meta", replace_first)
    assert read(path) == 1


@contextmanager
def replacing(path: Path, sharded: bool, pause: float) -> Iterator[None]:
    """Replaces a checkpoint again and again."""
    save_step(path, 1, sharded)
    done = threading.Event()

    def write() -> None:
        step = 1
        while not done.wait(pause):
            step += 1
            save_step(path, step, sharded)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()


def read_often(read: Callable[[], int], times: int) -> tuple[int, int]:
    """Returns how many generations were seen, and how often none could be caught."""
    seen, refused = set(), 0
    for _ in range(times):
        try:
            seen.add(read())
        except CheckpointError:
            refused += 1
    return len(seen), refused


def load_often(path: str, times: int) -> tuple[int, int]:
    model = mics_shard(of_step(0), PLAIN)
    return read_often(lambda: read_step(path, model), times)


def read_beside_a_writer(
    pool: WorkerPool, folder: Path, sharded: bool, pause: float, loads: int, consolidations: int
) -> list[tuple[int, int]]:
    path = folder / "last.ckpt"
    with replacing(path, sharded, pause):
        seen = pool.run(load_often, str(path), loads, world_size=2)
        alone = read_often(lambda: consolidated_step(path), consolidations)
    assert seen[0] == seen[1]
    return [seen[0], alone]


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_readers_beside_a_writer(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    for generations, refused in read_beside_a_writer(pool, tmp_path, sharded, 0.1, 4, 6):
        assert generations and not refused


@pytest.mark.campaign
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_a_thousand_readers_beside_a_writer(
    pool: WorkerPool, tmp_path: Path, sharded: bool, record_property: Callable[[str, object], None]
) -> None:
    (loaded, refused), (consolidated, left) = read_beside_a_writer(pool, tmp_path, sharded, 0.0, 700, 300)
    record_property(
        "figures",
        f"700 loads by two ranks ({loaded} generations, {refused} refused) and 300 consolidations ({consolidated} "
        f"generations, {left} refused) beside a writer without a pause: 0 mixes",
    )


def read_in_own_folder(folder: str, path: str) -> int:
    before = os.getcwd()
    os.chdir(f"{folder}/{dist.get_rank()}")
    try:
        return read_step(path, mics_shard(of_step(0), PLAIN))
    finally:
        os.chdir(before)


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_ranks_that_see_different_checkpoints_are_named(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    for rank, step in ((0, 1), (2, 2)):
        save_step(tmp_path / str(rank) / "last.ckpt", step, sharded)
    for rank, origin in ((1, 0), (3, 2)):
        shutil.copytree(tmp_path / str(origin), tmp_path / str(rank))
    for failure in pool.attempt(read_in_own_folder, str(tmp_path), "last.ckpt", world_size=4):
        assert failure.kind == "CheckpointError" and "2 of 4 ranks (2, 3) see another" in failure.message
        assert not sharded or ("rank 0 sees step 1" in failure.message and "rank 2 step 2" in failure.message)
    assert pool.run(read_in_own_folder, str(tmp_path), "last.ckpt", world_size=2) == [1, 1]  # copies are one
    copy = tmp_path / "1" / "last.ckpt"
    if sharded:
        shutil.copy(tmp_path / "2" / "last.ckpt" / "__0_0.distcp", copy)
    else:
        copy.write_bytes(copy.read_bytes()[:-300])
    for failure in pool.attempt(read_in_own_folder, str(tmp_path), "last.ckpt", world_size=2):
        assert failure.kind == "CheckpointError" and "damaged" in failure.message


def test_loading_says_what_it_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_step(tmp_path / "last.ckpt", 7)
    read_step(tmp_path / "last.ckpt", of_step(0))
    assert f"Loaded {tmp_path / 'last.ckpt'}: step 7, world size 1." in caplog.messages


@pytest.mark.parametrize("beside", ["nothing", "a dangling link"])
def test_what_lies_beside_hides_no_error(tmp_path: Path, beside: str) -> None:
    if beside == "a dangling link":
        (tmp_path / "last.ckpt").symlink_to("gone")
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        consolidate(tmp_path / "run.ckpt", tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["__0_0.distcp", "mics.json"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "saved", nn.Linear(2, 2))
    (tmp_path / "saved" / name).unlink()
    os.mkfifo(tmp_path / "saved" / name)
    with pytest.raises(CheckpointError, match=f"{name} is no file"):
        load_checkpoint(tmp_path / "saved", nn.Linear(2, 2))
