"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_tools import equal, everything, held_up, load_anew, trained
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_tools import LanguageModel, Net, cross_entropy, loader, make_trainer, where
from torch import Tensor, nn
from works import works

from lightning_mics import (
    CheckpointError,
    MiCSConfig,
    MiCSStrategy,
    load_checkpoint,
    mics_shard,
    save_checkpoint,
    wait_for_checkpoints,
)
from lightning_mics.checkpoint import background, ranks, writer
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import WorkerPool, full_state_dict


def train(model: Any, optimizer: Any) -> None:
    for _ in range(2):
        tokens = torch.arange(10).view(2, 5) + dist.get_rank()
        cross_entropy(model(tokens % 19), tokens % 19).backward()
        optimizer.step()
        optimizer.zero_grad()


def save_both_ways(folder: str, sharded: bool) -> dict[int, bool]:
    """Saves in the background, changes everything meanwhile, and compares with a save that training waited for."""
    found = {}
    for shard_size in (1, 2):
        model, optimizer = trained(3, config=MiCSConfig(shard_size=shard_size, async_checkpoint=shard_size == 1))
        model.register_buffer("seen", torch.ones(3))
        meta = {"schedule": [1, 2], "seen": torch.ones(2)}
        waited, behind = (f"{folder}/{shard_size}-{way}" for way in ("waited", "behind"))
        with torch.inference_mode():  # as at the end of a validation
            save_checkpoint(waited, model, optimizer, meta, sharded=sharded, background=False)
        for attempt in range(shard_size):  # the memory of the first save is used by the second
            before = {name: tensor.clone() for name, tensor in everything(model, optimizer).items()}
            with held_up() as go_on:
                default = None if shard_size == 1 else True
                with torch.inference_mode(attempt == 0):
                    pending = save_checkpoint(behind, model, optimizer, meta, sharded=sharded, background=default)
                train(model, optimizer)
                model.seen.zero_()
                optimizer.param_groups[0]["lr"] = 5.0
                meta["schedule"].append(3)
                meta["seen"].zero_()
                dist.barrier()
                early = pending.is_written
                go_on.set()
                other = {"seed": load_checkpoint(behind, model, optimizer)}
            assert not early and pending.is_written
            assert not equal(before, {})
            assert equal(everything(model, optimizer), before)
            assert other["seed"]["schedule"] == [1, 2] and other["seed"]["seen"].sum() == 2
            assert optimizer.param_groups[0]["lr"] != 5.0 and model.seen.sum() == 3
            meta = {"schedule": [1, 2], "seen": torch.ones(2)}
        load_checkpoint(waited, model, optimizer)
        found[shard_size] = equal(everything(model, optimizer), before)
    return found


@works("Savers", "Checkpoints that are written while training goes on (`async_checkpoint=True`)")
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_what_is_written_is_the_state_at_the_call(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    for found in pool.run(save_both_ways, str(tmp_path), sharded, world_size=4):
        assert found == {1: True, 2: True}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1-behind", "1-waited", "2-behind", "2-waited"]


def fail_behind(path: str, rank: int) -> dict[str, str]:
    model, optimizer = trained(1)
    told = {}

    def attempt(name: str, call: Any) -> None:
        with held_up("No space left" if dist.get_rank() == rank else None) as go_on:
            pending = save_checkpoint(path, model, optimizer, {"seed": 2}, background=True)
            background.afterwards(lambda: Path(path).with_name("followed").touch())
            go_on.set()
            background.settle()
        try:
            call(pending)
        except CheckpointError as error:
            told[name] = str(error)
        wait_for_checkpoints()  # told once

    attempt("handle", lambda pending: pending.wait())
    attempt("wait", lambda pending: wait_for_checkpoints())
    attempt("save", lambda pending: save_checkpoint(path, model, optimizer))
    attempt("load", lambda pending: load_checkpoint(path, model, optimizer))
    return told


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_is_raised_by_the_next_call_on_every_rank(pool: WorkerPool, tmp_path: Path, rank: int) -> None:
    path = tmp_path / "last.ckpt"
    saved = pool.run(save_new_behind, str(path), 1, world_size=2)[0]
    for told in pool.run(fail_behind, str(path), rank, world_size=2):
        assert told.keys() == {"handle", "wait", "save", "load"}
        for message in told.values():
            assert f"Saving {path} failed" in message and "No space left" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    loaded, meta = pool.run(load_anew, str(path), world_size=2)[0]
    assert equal(loaded, saved) and meta["seed"] == 1


def save_new_behind(path: str, seed: int) -> dict[str, Tensor]:
    model, optimizer = trained(seed)
    save_checkpoint(path, model, optimizer, {"seed": seed}, background=True)
    return everything(model, optimizer)  # the end of the world waits for the checkpoint


def save_as_a_job_of_its_own(path: str) -> set[int]:
    """Saves again and again, as if there were no other ranks; returns whose checkpoints it has read."""
    job, is_distributed, read = dist.get_rank(), ranks.is_distributed, set()
    dist.barrier()
    ranks.is_distributed = lambda: False
    try:
        for _ in range(8):
            model = nn.Linear(64, 64)
            nn.init.constant_(model.weight, job)
            save_checkpoint(path, model, meta={"job": job}, background=True).wait()
            found = load_checkpoint(path, model)["job"]
            assert (model.weight == found).all()
            read.add(found)
    finally:
        ranks.is_distributed = is_distributed
    return read


def test_two_jobs_at_one_name_leave_a_whole_checkpoint(pool: WorkerPool, tmp_path: Path) -> None:
    read = pool.run(save_as_a_job_of_its_own, str(tmp_path / "last.ckpt"), world_size=2)
    assert set.union(*read) == {0, 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_place_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (Path("/proc"), tmp_path / "file"):  # as on a file system that is read-only
        for sharded in (True, False):
            with pytest.raises(CheckpointError, match=r"Saving .*run\.ckpt failed.*permissions"):
                save_checkpoint(folder / "run.ckpt", nn.Linear(2, 2), sharded=sharded, background=True).wait()


@pytest.mark.parametrize("background", [True, False], ids=["in the background", "waited for"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_a_quota_keeps_the_earlier_checkpoint(tmp_path: Path, sharded: bool, background: bool) -> None:
    small, large = nn.Linear(2, 2), nn.Linear(512, 512)
    save_checkpoint(tmp_path / "run.ckpt", small, meta={"step": 1}, sharded=sharded)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"run.ckpt failed, and nothing was changed there: .*File too large"):
            save_checkpoint(
                tmp_path / "run.ckpt", large, meta={"step": 2}, sharded=sharded, background=background
            ).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path / "run.ckpt", small) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.ckpt"]


SCRIPT = """
import sys, time, torch
from concurrent.futures import ThreadPoolExecutor
from lightning_mics import save_checkpoint
from lightning_mics.checkpoint import ranks
together = ranks.together

def slowly(step, **options):
    time.sleep(0.1)
    with ThreadPoolExecutor(1) as pool:  # as uploads have it
        pool.submit(int).result()
    return together(step, **options)

ranks.together = slowly
model = torch.nn.Linear(2, 2)
save_checkpoint(sys.argv[1], model, background=True)
save_checkpoint(sys.argv[1], model, background=True)
torch.save = None
"""


def test_the_end_of_a_process_waits_and_says_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, timeout=60)
    assert f"Saving {path} failed, and nothing was changed there: TypeError" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"] and (path / "mics.json").is_file()


def save_by_fabric(path: str) -> tuple[bool, int, bool]:
    strategy = FabricStrategy(shard_size=2, node_size=2, async_checkpoint=True)
    fabric = Fabric(**where(), strategy=strategy)
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    state = {"model": model, "optimizer": optimizer, "step": 3}
    before = full_state_dict(net)
    with held_up() as go_on:
        fabric.save(path, state)
        was_there = Path(path).exists()
        train(model, optimizer)
        go_on.set()
        state["step"] = 4
        fabric.load(path, state)
    return was_there, state["step"], equal(full_state_dict(net), before)


def test_fabric_saves_in_the_background(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(save_by_fabric, str(tmp_path / "saved"), world_size=2) == [(False, 3, True)] * 2


def fit_on_a_full_disk(folder: str) -> str:
    strategy = MiCSStrategy(shard_size=2, node_size=2, async_checkpoint=True)
    trainer = make_trainer(strategy=strategy, enable_checkpointing=True, callbacks=[ModelCheckpoint(folder)])
    with held_up("No space left") as go_on:
        go_on.set()
        try:
            trainer.fit(LanguageModel("adamw"), loader(2, dist.get_world_size()))
        except CheckpointError as error:
            return str(error)
    return ""


def test_the_end_of_a_fit_waits_and_raises(pool: WorkerPool, tmp_path: Path) -> None:
    for told in pool.run(fit_on_a_full_disk, str(tmp_path), world_size=2):
        assert "epoch=0-step=2.ckpt failed" in told and "No space left" in told
    assert list(tmp_path.iterdir()) == []


def time_saves(path: str, rounds: int = 3, num_steps: int = 15) -> dict[str, list[float]]:
    """Returns seconds of saves that are waited for and not, and of steps beside nothing and beside the latter."""
    torch.manual_seed(0)
    model = mics_shard(nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))), MiCSConfig(shard_size=2))
    optimizer = torch.optim.AdamW(model.parameters())
    times: dict[str, list[float]] = {"waited": [], "behind": [], "idle": [], "busy": [], "after": []}
    write = writer._Counted.write

    def throttled(self: Any, data: Any) -> int:
        time.sleep(memoryview(data).nbytes * 8 / 100e6)  # 100 Mbit/s
        return write(self, data)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = call()
        times[name].append(time.perf_counter() - start)
        return result

    def step() -> None:
        model(torch.ones(16, 2048)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    writer._Counted.write = throttled
    try:
        for _ in range(rounds):
            for _ in range(num_steps):
                timed("idle", step)
            timed("waited", lambda: save_checkpoint(path, model, optimizer, background=False))
            pending = timed("behind", lambda: save_checkpoint(path, model, optimizer, background=True))
            for _ in range(num_steps):
                timed("busy" if not pending.is_written else "after", step)
            pending.wait()
    finally:
        writer._Counted.write = write
    return times


@pytest.mark.campaign
def test_training_hardly_stops(
    pool: WorkerPool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    times = pool.run(time_saves, str(tmp_path / "saved"), world_size=2, timeout=280.0)[0]
    waited, behind, idle, busy = (statistics.median(times[name]) for name in ("waited", "behind", "idle", "busy"))
    record_property(
        "figures",
        f"200 MB of states on two ranks, 100 Mbit/s each: training stops for {behind:.2f} s instead of {waited:.1f} s "
        f"({behind / waited:.1%}); a step takes {busy * 1e3:.0f} ms beside the write and {idle * 1e3:.0f} ms without",
    )
    assert behind < 0.1 * waited
    assert busy < 1.1 * idle
