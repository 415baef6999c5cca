"""What survives of a checkpoint when processes die, or disks fail, while it is written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_tools import OWN_SCALE, PLAIN, equal, load_anew, save_new, trained

from lightning_mics import MiCSConfig, save_checkpoint
from lightning_mics.checkpoint import files
from lightning_mics.processes import start_time
from lightning_mics.testing import WorkerPool

# What touches the disk or other ranks during a save.
_WATCHED: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (torch, "save"),
    (files, "_exchange"),
    (files, "describe"),
    (files, "delete"),
    (files, "write_manifest"),
    (dist, "all_gather_object"),
)


def watch_moments(monkey: Callable[[str], None]) -> None:
    """Calls ``monkey`` before and after everything that touches the disk or other ranks."""

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            monkey(f"before {name}")
            result = original(*args, **kwargs)
            monkey(f"after {name}")
            return result

        setattr(owner, name, watched)

    for owner, name in _WATCHED:
        watch(owner, name)


def save_and_count(path: str, seed: int, sharded: bool) -> int:
    model, optimizer = trained(seed)
    moments: list[str] = []
    originals = [getattr(owner, name) for owner, name in _WATCHED]
    watch_moments(moments.append)
    try:
        save_checkpoint(path, model, optimizer, {"seed": seed}, sharded=sharded)
    finally:
        for (owner, name), original in zip(_WATCHED, originals, strict=True):
            setattr(owner, name, original)
    return len(moments)


def save_and_die(path: str, seed: int, sharded: bool, moment: int, victims: tuple[int, ...], exchange: bool) -> None:
    model, optimizer = trained(seed)
    if not exchange:
        files._exchange = lambda first, second: False
    passed = 0

    def monkey(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == moment and dist.get_rank() in victims:
            os._exit(1)

    watch_moments(monkey)
    try:
        save_checkpoint(path, model, optimizer, {"seed": seed}, sharded=sharded, background=not exchange).wait()
    finally:
        os._exit(2)  # the watched functions must not outlive the test


VICTIMS = ((0,), (1,), (0, 1))
WAYS = pytest.mark.parametrize(
    ("sharded", "exchange"),
    [(True, True), (True, False), (False, True)],
    ids=["sharded", "two renames, in the background", "full"],
)


@WAYS
def test_a_crash_at_any_moment_keeps_a_whole_checkpoint(
    pool: WorkerPool, tmp_path: Path, sharded: bool, exchange: bool
) -> None:
    count = 9 if (sharded and exchange) else 6
    crash_at_moments(
        pool, tmp_path, sharded, exchange, lambda moments: [moments * index // count for index in range(count)]
    )


@pytest.mark.campaign
@WAYS
def test_a_crash_at_every_moment_keeps_a_whole_checkpoint(
    pool: WorkerPool,
    tmp_path: Path,
    sharded: bool,
    exchange: bool,
    record_property: Callable[[str, object], None],
) -> None:
    deaths, replaced = crash_at_moments(pool, tmp_path, sharded, exchange, range)
    figures = f"{deaths} crashes, one at each moment; {replaced} left the new checkpoint, the others the old one"
    record_property("figures", figures)


def crash_at_moments(
    pool: WorkerPool,
    folder: Path,
    sharded: bool,
    exchange: bool,
    choose: Callable[[int], Sequence[int]],
) -> tuple[int, int]:
    """Returns how many saves died, and how many of them had replaced the earlier checkpoint."""
    path = folder / "last.ckpt"
    contents = {1: pool.run(save_new, str(path), 1, sharded, world_size=2)[0]}
    num_moments = max(pool.run(save_and_count, str(folder / "other.ckpt"), 7, sharded, world_size=2))
    contents[2] = pool.run(save_new, str(folder / "other.ckpt"), 2, sharded, world_size=2)[0]
    survivors = []
    for index, moment in enumerate(choose(num_moments)):
        victims = VICTIMS[index % len(VICTIMS)]
        pool.attempt(save_and_die, str(path), 2, sharded, 1 + moment, victims, exchange, world_size=2)
        seeds = set()
        for loaded, meta in pool.run(load_anew, str(path), world_size=2):
            seeds.add(meta["seed"])
            assert equal(loaded, contents[meta["seed"]]), f"moment {moment}"
        survivors += seeds
        if 2 in seeds:
            pool.run(save_new, str(path), 1, sharded, world_size=2)
    assert 1 in survivors
    pool.run(save_new, str(path), 1, sharded, world_size=2)
    assert sorted(entry.name for entry in folder.iterdir()) == ["last.ckpt", "other.ckpt"]
    return index + 1, survivors.count(2)


def save_until_killed(
    path: str, sharded: bool, delays: tuple[float, float], background: bool, config: MiCSConfig = PLAIN
) -> None:
    """Saves the states of two trainings in turn, until each rank is killed after a delay of its own."""
    trainings = {seed: trained(seed, config=config) for seed in (1, 2)}
    timer = threading.Timer(delays[dist.get_rank()], os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    dist.barrier()
    timer.start()
    while True:
        for seed, (model, optimizer) in trainings.items():
            save_checkpoint(path, model, optimizer, {"seed": seed}, sharded=sharded, background=background)


@pytest.mark.campaign
@pytest.mark.parametrize("background", [False, True], ids=["waited for", "in the background"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_kills_at_random_times_keep_a_whole_checkpoint(
    pool: WorkerPool, tmp_path: Path, sharded: bool, background: bool, record_property: Callable[[str, object], None]
) -> None:
    kills = 50 if background else 40
    kill_savers(pool, tmp_path, kills, sharded, background, PLAIN)
    record_property("figures", f"{kills} times two saving ranks killed (SIGKILL); a whole checkpoint after each")


@pytest.mark.campaign
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_kills_spare_states_at_their_own_scale(
    pool: WorkerPool, tmp_path: Path, sharded: bool, record_property: Callable[[str, object], None]
) -> None:
    kill_savers(pool, tmp_path, 40, sharded, False, OWN_SCALE)
    record_property("figures", "40 times two saving ranks killed (SIGKILL); a whole checkpoint after each, read at p=2")


def kill_savers(
    pool: WorkerPool, folder: Path, kills: int, sharded: bool, background: bool, config: MiCSConfig
) -> None:
    """Kills saving ranks at random times; there is a whole checkpoint after each, which other layouts read, too."""
    path, generator = folder / "last.ckpt", random.Random(0)
    contents = {seed: pool.run(save_new, str(path), seed, sharded, config, world_size=2)[0] for seed in (1, 2)}
    survivors = []
    for kill in range(kills):
        first = generator.uniform(0.0, 0.5)
        delays = (first, first + generator.uniform(-0.02, 0.02) * (kill % 2))
        outcomes = pool.attempt(save_until_killed, str(path), sharded, delays, background, config, world_size=2)
        assert -signal.SIGKILL in [outcome.exitcode for outcome in outcomes]
        for loaded, meta in pool.run(load_anew, str(path), world_size=2):
            survivors.append(meta["seed"])
            assert equal(loaded, contents[meta["seed"]]), f"kill {kill}"
    assert set(survivors) == {1, 2}
    pool.run(save_new, str(path), 1, sharded, world_size=2)
    assert [entry.name for entry in folder.iterdir()] == ["last.ckpt"]


def fail_to_write(path: str, rank: int) -> None:
    model, optimizer = trained(3)
    if dist.get_rank() == rank:

        def full_disk(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        os.fsync, original = full_disk, os.fsync
        try:
            save_checkpoint(path, model, optimizer)
        finally:
            os.fsync = original
    save_checkpoint(path, model, optimizer)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_while_writing_raises_on_every_rank(pool: WorkerPool, tmp_path: Path, rank: int) -> None:
    path = tmp_path / "last.ckpt"
    saved = pool.run(save_new, str(path), 1, world_size=2)[0]
    for failure in pool.attempt(fail_to_write, str(path), rank, world_size=2):
        assert failure.kind == "CheckpointError"
        assert "No space left on device" in failure.message
        assert "last.ckpt" in failure.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert equal(pool.run(load_anew, str(path), world_size=2)[0][0], saved)


def test_leftovers_of_running_saves_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    mine = files.temporary_name(path).name
    prefix, _, rest = mine.rpartition(f"-{os.getpid()}-")
    birth, number = rest.split(".")
    running = tmp_path / f"{prefix}-{os.getppid()}-{start_time(os.getppid())}.0"
    ours = tmp_path / mine
    over = tmp_path / f"{mine}0"  # another save of this process, which is none of those that run
    reused = tmp_path / f"{prefix}-{os.getppid()}-{int(birth) + 1}.{number}"
    dead = tmp_path / f"{prefix}-{2**22 + 1}-5.0"
    child = subprocess.Popen(["sleep", "60"])
    birth_of_child = start_time(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    zombie = tmp_path / f"{prefix}-{child.pid}-{birth_of_child}.0"  # its parent has not waited for it
    older = tmp_path / f"{prefix}-{2**22 + 1}-5"
    for leftover in (running, ours, over, reused, dead, zombie, older):
        leftover.mkdir()
        (leftover / "__0_0.distcp").write_text("half")
        os.utime(leftover / "__0_0.distcp", (0, 0))
        os.utime(leftover, (0, 0))
    files.recover(path)
    child.wait()
    assert sorted(tmp_path.iterdir()) == sorted([running, ours])
    files.release(ours)
    files.recover(path)
    assert list(tmp_path.iterdir()) == [running]


@pytest.mark.parametrize("crashed", [False, True])
def test_a_reader_between_the_two_renames_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashed: bool) -> None:
    path, temporary = tmp_path / "run.ckpt", files.temporary_name(tmp_path / "run.ckpt")
    for folder in (path, temporary):
        folder.mkdir()
        (folder / ".metadata").write_text(folder.name)
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    between, rename = threading.Event(), os.rename

    def slow(source: Path, target: Path) -> None:
        if source == temporary:
            between.set()
            time.sleep(0.1)
            if crashed:
                return
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    writer = threading.Thread(target=files.commit, args=(temporary, path))
    writer.start()
    between.wait()
    if crashed:
        files.release(temporary)
    files.recover(path)
    found = (path / ".metadata").read_text()
    writer.join()
    assert found == ("run.ckpt" if crashed else temporary.name)
    files.release(temporary)
