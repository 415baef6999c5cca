"""The worker pool itself: everything else relies on it."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from lightning_mics.testing import WorkerPool


def rank_sum() -> tuple[int, int]:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on rank {rank}")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleep_forever() -> None:
    time.sleep(1000)


def leave_things_behind() -> None:
    os.environ["MICS_LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)


def look_around() -> tuple[str | None, torch.dtype]:
    return os.environ.get("MICS_LEFT_BEHIND"), torch.get_default_dtype()


def test_worlds_of_every_size_give_results_by_rank(pool: WorkerPool) -> None:
    for world_size in (4, 2, 1, 4):
        expected = sum(range(world_size))
        assert pool.run(rank_sum, world_size=world_size) == [(rank, expected) for rank in range(world_size)]


def test_a_further_run_is_quick(pool: WorkerPool) -> None:
    pool.run(rank_sum, world_size=2)
    start = time.monotonic()
    pool.run(rank_sum, world_size=2)
    assert time.monotonic() - start < 5


def test_every_failing_rank_is_reported_and_the_pool_goes_on(pool: WorkerPool) -> None:
    results = pool.attempt(fail_on, 1, world_size=2)
    assert results[1].kind == "ValueError" and "no luck on rank 1" in results[1].message
    assert results[0].kind != "ValueError"
    assert pool.run(rank_sum, world_size=2) == [(0, 1), (1, 1)]


def test_a_dead_worker_is_reported_and_replaced(pool: WorkerPool) -> None:
    results = pool.attempt(die_on, 0, world_size=2)
    assert results[0].kind == "WorkerDied" and "7" in results[0].message
    assert pool.run(rank_sum, world_size=2) == [(0, 1), (1, 1)]


def test_a_hung_worker_shows_its_stack(pool: WorkerPool) -> None:
    results = pool.attempt(sleep_forever, world_size=1, timeout=2)
    assert results[0].kind == "WorkerHung" and "sleep_forever" in results[0].details
    assert pool.run(rank_sum, world_size=1) == [(0, 0)]


def test_nothing_leaks_from_one_run_into_the_next(pool: WorkerPool) -> None:
    pool.run(leave_things_behind, world_size=2)
    assert pool.run(look_around, world_size=2) == [(None, torch.float32)] * 2
