"""Ranks that wait for one another for ever end within seconds, with an error that says where each of them is."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from works import refused, works

from lightning_mics import MiCSConfig, MiCSError, defer_replication_sync, mics_shard
from lightning_mics import checkpoint as checkpoints
from lightning_mics.core import apart, failures
from lightning_mics.core.apart import Watch, stuck, told, verdict
from lightning_mics.core.places import Place, Waiting, look_around
from lightning_mics.errors import SelfCheckError
from lightning_mics.testing import WorkerPool

SECONDS = 15.0  # on a machine that does more besides
EXPERTS = refused("Model kinds", "Experts as units, unequal routes", says="Ranks run different units of the model")
UNEVEN = refused("Training loops", "Ranks with unequal numbers of batches", says="wait for each other for ever")
SAVING = refused("Savers", "Saving on the main process alone", says="on every rank, not behind `if is_main_process`")
SAMPLING = refused("Training loops", "A forward pass on one rank alone", says="run it on every rank")


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(Expert() for _ in range(3)), nn.Linear(4, 1)

    def forward(self, x: Tensor, route: list[int]) -> Tensor:
        for index in route:
            x = self.experts[index](x)
        return self.head(x).sum()


def sharded(p: int) -> nn.Module:
    return mics_shard(Experts(), MiCSConfig(shard_size=p, node_size=p))


def step(model: nn.Module, route: tuple[int, ...] = (0, 1, 2)) -> None:
    model(torch.randn(2, 4), list(route)).backward()


def outcome(run: Any, *args: Any) -> tuple[str, str, float]:
    """Returns the name of the error that ends a run, its words and the seconds."""
    start = time.monotonic()
    try:
        run(*args)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


# Reading places.


def waits(rank: int, key: str, turn: int, ranks: tuple[int, ...], kind: str = "unit", **more: Any) -> Place:
    counts = {key: turn, **more.pop("counts", {})}
    return Place(rank, main=Waiting(key, turn, ranks, kind, key), counts=counts, **more)


def test_ranks_that_compute_may_still_come() -> None:
    assert stuck({0: waits(0, "a", 1, (0, 1)), 1: None}) == set()
    assert stuck({0: waits(0, "a", 1, (0, 1)), 1: Place(1)}) == set()


def test_ranks_in_one_call_are_only_slow() -> None:
    assert stuck({0: waits(0, "a", 3, (0, 1)), 1: waits(1, "a", 3, (0, 1))}) == set()


def test_who_waits_for_a_rank_that_waits_for_one_at_work_goes_on() -> None:
    chain = {0: waits(0, "a", 1, (0, 1)), 1: waits(1, "b", 1, (1, 2)), 2: Place(2)}
    assert stuck(chain) == set()
    assert stuck({**chain, 2: waits(2, "a", 1, (2, 0)), 0: waits(0, "c", 1, (0, 1))}) == {0, 1, 2}


def test_a_rank_that_has_been_there_already_is_not_missed() -> None:
    slow = waits(0, "a", 2, (0, 1))
    assert stuck({0: slow, 1: waits(1, "b", 1, (0, 1), counts={"a": 2})}) == set()
    assert stuck({0: slow, 1: waits(1, "b", 1, (0, 1), counts={"a": 1})}) == {0, 1}


def test_what_the_thread_has_before_it_may_end() -> None:
    gather = Waiting("a", 1, (0, 1), "unit", "a")
    ahead = Place(1, main=Waiting("w", 1, (0, 1), "window", "w"), thread=gather, counts={"w": 1, "a": 1})
    assert stuck({0: waits(0, "a", 1, (0, 1)), 1: ahead}) == set()
    assert stuck({0: waits(0, "b", 1, (0, 1)), 1: ahead}) == {0, 1}
    on_thread = Place(1, thread=gather, on_thread=True, counts={"a": 1})
    assert stuck({0: waits(0, "b", 1, (0, 1)), 1: on_thread}) == {0, 1}


def test_ranks_that_have_ended_never_come() -> None:
    gone = Place(1, has_ended=True, windows=7)
    assert stuck({0: waits(0, "a", 1, (0, 1)), 1: gone}) == {0, 1}
    told = str(
        verdict({0: waits(0, "the gather of unit 'x'", 1, (0, 1), windows=7, line="train.py:3 in main"), 1: gone})
    )
    assert "rank 1 ended the process, after 7 accumulation windows" in told
    assert "rank 0 waits in the gather of unit 'x' (train.py:3 in main)" in told
    assert "same number" in told


# Ranks that run.


def take_routes(p: int, routes: list[tuple[int, ...]]) -> tuple[str, str, float]:
    model = sharded(p)

    def run() -> None:
        for _ in range(2):
            step(model, routes[dist.get_rank() % p])

    return outcome(run)


@EXPERTS
@pytest.mark.parametrize(
    ("p", "routes"), [(2, [(0, 1), (0, 1, 2)]), (2, [(0,), (1,)]), (4, [(0, 1, 2)] * 3 + [(0, 2)])]
)
def test_units_that_one_rank_of_a_partition_skips(pool: WorkerPool, p: int, routes: list[tuple[int, ...]]) -> None:
    for name, words, seconds in pool.run(take_routes, p, routes, world_size=4):
        assert name == "SelfCheckError", words
        assert seconds < SECONDS
        assert "experts." in words and "rank" in words
        EXPERTS.check(words)


def run_out(p: int, accumulate: int) -> tuple[str, str, float]:
    model, rank, last = sharded(p), dist.get_rank(), dist.get_world_size() - 1

    def run() -> None:
        for microstep in range(3 * accumulate if rank == last else 4 * accumulate):
            with defer_replication_sync(model, (microstep + 1) % accumulate != 0):
                step(model)
        dist.barrier()

    return outcome(run)


@UNEVEN
@pytest.mark.parametrize(("world_size", "p", "accumulate"), [(2, 1, 3), (2, 2, 1), (4, 2, 3), (4, 4, 1)])
def test_ranks_that_have_more_batches(pool: WorkerPool, world_size: int, p: int, accumulate: int) -> None:
    *others, last = pool.run(run_out, p, accumulate, world_size=world_size)
    assert last[0] == "RuntimeError"  # of a barrier that is not ours
    for name, words, seconds in others:
        assert name == "MiCSError", words
        assert seconds < SECONDS
        assert f"rank {world_size - 1} waits in torch.distributed.barrier" in words
        assert "after 3 accumulation windows" in words and "same number" in words
        UNEVEN.check(words)


def enter_alone(folder: str) -> list[tuple[str, str, float]]:
    model, rank = sharded(2), dist.get_rank()
    optimizer = torch.optim.Adam(model.parameters())
    step(model)
    optimizer.step()
    entries = [
        lambda: checkpoints.save_checkpoint(f"{folder}/a", model, optimizer),
        lambda: checkpoints.model_state(model, full=True),
        lambda: checkpoints.optimizer_state(model, optimizer, full=True),
        lambda: checkpoints.load_checkpoint(f"{folder}/a", model),
    ]
    found = []
    for entry in entries:
        if rank == 0:
            found.append(outcome(entry))
        dist.barrier()  # nothing is broken: what the user catches is over
    checkpoints.save_checkpoint(f"{folder}/b", model, optimizer)
    step(model)
    return found


@SAVING
def test_entries_that_one_rank_takes_alone(pool: WorkerPool, tmp_path: Path) -> None:
    found, *others = pool.run(enter_alone, str(tmp_path), world_size=4)
    assert others == [[], [], []]
    for (name, words, seconds), call in zip(
        found, ["save_checkpoint", "model_state", "optimizer_state", "load_checkpoint"], strict=True
    ):
        assert name == "MiCSError" and seconds < SECONDS
        assert words.startswith(f"{call}") and "was called on rank 0 and not on ranks 1, 2, 3" in words
        assert "barrier (test_ranks_apart.py:" in words
        SAVING.check(words)


def sample_alone(p: int) -> tuple[str, str, float]:
    model = sharded(p)

    def run() -> None:
        step(model)
        if dist.get_rank() == 0:
            with torch.no_grad():
                model(torch.randn(2, 4), [0, 1, 2])
        dist.barrier()

    return outcome(run)


@SAMPLING
def test_a_forward_pass_that_one_rank_runs_alone(pool: WorkerPool) -> None:
    (name, words, seconds), *_ = pool.run(sample_alone, 2, world_size=4)
    assert name == "MiCSError" and seconds < SECONDS
    assert "torch.distributed.barrier" in words
    SAMPLING.check(words)


def ask_alone(item: bool) -> tuple[str, str, float]:
    model = sharded(2)
    param = next(model.parameters())

    def run() -> None:
        step(model)
        if dist.get_rank() == 0:
            _ = param.norm().item() if item else param.full_tensor()  # type: ignore[operator]
        dist.barrier()

    return outcome(run)


@pytest.mark.parametrize("item", [False, True])
def test_the_whole_of_a_shard_that_one_rank_asks_for(pool: WorkerPool, item: bool) -> None:
    (name, words, seconds), *_ = pool.run(ask_alone, item, world_size=4)
    assert name == "MiCSError" and seconds < SECONDS, words
    assert "was called on rank 0 and not on rank 1, and takes all ranks of a partition" in words
    assert "in torch.distributed.barrier (test_ranks_apart.py:" in words


def wait_for_slow_ranks(folder: str) -> None:
    apart.MOMENT, apart.FOREIGN_MOMENT, apart.NOTICE = 0.1, 0.1, 0.5
    try:
        model, rank = sharded(2), dist.get_rank()
        for slow in range(3):  # a loader, an evaluation on one rank, work before saving
            if rank == slow:
                time.sleep(1.5)
            step(model)
        if rank == 3:
            time.sleep(1.5)
        checkpoints.save_checkpoint(f"{folder}/a", model)
        if rank == 0:
            time.sleep(1.5)
        dist.barrier()
    finally:
        apart.MOMENT, apart.FOREIGN_MOMENT, apart.NOTICE = 0.4, 2.0, 30.0


@works("Training loops", "Ranks of unequal speed")
def test_slow_ranks_are_waited_for(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(wait_for_slow_ranks, str(tmp_path), world_size=4)


def told_while_waiting() -> None:
    rank, said = dist.get_rank(), []
    model = sharded(2)
    apart.NOTICE, notice = 0.5, apart._notice
    apart._notice = lambda *args: said.append(args)  # type: ignore[assignment]
    try:
        if rank == 1:
            time.sleep(2)
        step(model)
    finally:
        apart.NOTICE, apart._notice = 30.0, notice
    assert bool(said) == (rank == 0)


def test_a_long_wait_is_told(pool: WorkerPool, capsys: pytest.CaptureFixture[str]) -> None:
    pool.run(told_while_waiting, world_size=2)
    mine, other = waits(0, "the gather of unit 'x'", 2, (0, 1)), Place(1, line="eval.py:7 in evaluate", windows=3)
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda line, **_: said.append(line))
        apart._notice(mine, {0: mine, 1: other}, 31.0)
    assert said == [
        "lightning-mics: rank 0 has waited 31 s: it waits in the gather of unit 'x'. Missing are rank 1: rank 1 "
        "at work (eval.py:7 in evaluate), after 3 accumulation windows"
    ]


def test_places_must_be_told_twice() -> None:
    watch, first = Watch(), {0: waits(0, "a", 1, (0, 1)), 1: waits(1, "b", 1, (0, 1))}
    assert watch._certain(first) == set()
    again = {rank: Place(**{**vars(place), "beat": 1}) for rank, place in first.items()}
    moved = {**again, 1: Place(**{**vars(again[1]), "serial": "another"})}
    assert watch._certain(moved) == set()
    watch._certain(first)
    assert watch._certain(again) == {0, 1}


def test_errors_are_ours() -> None:
    assert isinstance(verdict({0: waits(0, "a", 1, (0, 1)), 1: waits(1, "b", 1, (0, 1))}), SelfCheckError)
    assert isinstance(verdict({0: waits(0, "a", 1, (0, 1)), 1: waits(1, "b", 1, (0, 1), "foreign")}), MiCSError)


def seen_in_a_thread() -> str:
    """Trains in a thread, as Ray Train does, and waits there for rank 1, which comes late; returns where rank 0 is."""

    def train() -> None:
        step(sharded(1))
        time.sleep(2 * dist.get_rank())
        dist.barrier()

    thread = threading.Thread(target=train)
    thread.start()
    place = look_around()
    while thread.is_alive() and (place.main is None or "barrier" not in place.main.what):
        time.sleep(0.05)
        place = look_around()
    thread.join()
    failures.watch()  # the next test's script is in this thread again
    return told([place])


def test_a_script_in_a_thread_is_found_there(pool: WorkerPool) -> None:
    place = pool.run(seen_in_a_thread, world_size=2)[0]
    assert "waits in torch.distributed.barrier (test_ranks_apart.py:" in place and "in train)" in place
