"""The worker pool itself: everything else relies on it."""

from __future__ import annotations

import functools
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader

from lightning_mics import MiCSConfig, mics_shard
from lightning_mics.testing import (
    Failure,
    WorkerError,
    WorkerPool,
    assert_parity,
    full_state_dict,
    get_pool,
    relative_difference,
    shard_batch,
    weight_differences,
    worker,
    worker_device,
)


def rank_sum() -> tuple[int, int]:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on(rank: int) -> None:
    print(f"rank {dist.get_rank()} begins")
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on rank {rank}")
    dist.barrier()


def fail_everywhere() -> None:
    raise FileNotFoundError(f"nothing for rank {dist.get_rank()}")


def fail_with_work_in_flight() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1000), async_op=True)
    raise ValueError("not awaited")


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_forever() -> None:
    time.sleep(1000)


def return_unpicklable() -> object:
    return lambda: None


def leave_things_behind() -> float:
    os.environ["MICS_LEFT_BEHIND"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    return torch.rand((), device="cpu").item()


def look_around() -> dict[str, object]:
    return {
        "variable": os.environ.get("MICS_LEFT_BEHIND"),
        "folder": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def launch_variables() -> list[str]:
    return [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]


def sum_of_shards(num_groups_before: int) -> float:
    for _ in range(num_groups_before):
        dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))["shard"]
    total = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)]).sum()
    assert total.device_mesh is mesh
    return float(total.full_tensor())


def echo(tensor: Tensor, *, scale: float) -> Tensor:
    return tensor * scale + dist.get_rank()


def load_with_workers() -> list[int]:
    return [int(batch) for batch in DataLoader(range(3), batch_size=1, num_workers=1)]


@pytest.mark.parametrize("world_sizes", [(4, 2, 1, 4), (8, 2)], ids=str)
def test_worlds_of_every_size_give_results_by_rank(pool: WorkerPool, world_sizes: tuple[int, ...]) -> None:
    for world_size in world_sizes:
        expected = sum(range(world_size))
        assert pool.run(rank_sum, world_size=world_size) == [(rank, expected) for rank in range(world_size)]


def test_a_world_beyond_the_pool_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="world_size=9 does not fit the pool: choose 1 to 8"):
        pool.run(rank_sum, world_size=9)


def test_a_further_run_starts_no_process(pool: WorkerPool) -> None:
    pids = pool.run(os.getpid, world_size=4)
    assert pool.run(os.getpid, world_size=2) == pids[:2]
    assert pool.run(os.getpid, world_size=4) == pids


def test_arguments_and_results_are_copied(pool: WorkerPool) -> None:
    results = pool.run(echo, torch.ones(3), scale=2.0, world_size=2)
    assert [result.tolist() for result in results] == [[2.0] * 3, [3.0] * 3]


def test_the_one_pool_of_the_process(pool: WorkerPool) -> None:
    assert get_pool() is pool


def test_a_failure_ends_those_that_wait_in_a_collective(pool: WorkerPool) -> None:
    failed, waiting = pool.attempt(fail_on, 0, world_size=2, timeout=60)
    assert (failed.kind, failed.message) == ("ValueError", "no luck on rank 0")
    assert "Exception" in failed.bases and "in fail_on" in failed.details and failed.printed == "rank 0 begins\n"
    assert (waiting.kind, waiting.message) == ("WorkerHung", "no answer 5 s after rank 0 failed")
    assert "rank 1 begins" in waiting.printed and "in barrier" in waiting.printed
    assert pool.run(rank_sum, world_size=2) == [(0, 1), (1, 1)]


def test_run_raises_with_the_traceback_of_every_failing_rank(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="fail_everywhere failed on 2 of 2 ranks") as error:
        pool.run(fail_everywhere, world_size=2)
    for rank in range(2):
        assert f"FileNotFoundError: nothing for rank {rank}" in str(error.value)
        assert error.value.failures[rank].kind == "FileNotFoundError"
    assert pool.run(rank_sum, world_size=2) == [(0, 1), (1, 1)]


def test_work_in_flight_does_not_outlive_a_failure(pool: WorkerPool) -> None:
    assert [failure.message for failure in pool.attempt(fail_with_work_in_flight, world_size=2)] == ["not awaited"] * 2
    assert pool.run(rank_sum, world_size=2) == [(0, 1), (1, 1)]


def test_a_dead_worker_is_reported_and_replaced(pool: WorkerPool) -> None:
    dead, bereft = pool.attempt(die_on, 0, world_size=2)
    assert (dead.kind, dead.exitcode) == ("WorkerDied", 7)
    assert isinstance(bereft, Failure)
    assert pool.attempt(kill_self, world_size=1)[0].exitcode == -signal.SIGKILL
    assert pool.run(rank_sum, world_size=2) == [(0, 1), (1, 1)]


def test_a_worker_that_dies_between_runs_is_replaced(pool: WorkerPool) -> None:
    victim = pool.run(os.getpid, world_size=2)[1]
    with exit_of(victim) as wait_for_it:
        os.kill(victim, signal.SIGKILL)
        wait_for_it()
    assert pool.run(rank_sum, world_size=2) == [(0, 1), (1, 1)]


def test_stacks_are_shown_behind_what_changes_handlers_of_signals(pool: WorkerPool) -> None:
    pool.run(signal.signal, signal.SIGUSR1, signal.SIG_DFL, world_size=1)
    (hung,) = pool.attempt(sleep_forever, world_size=1, timeout=1)
    assert "in sleep_forever" in hung.printed


def test_a_hung_worker_shows_its_stack(pool: WorkerPool) -> None:
    (hung,) = pool.attempt(sleep_forever, world_size=1, timeout=1)
    assert (hung.kind, hung.message) == ("WorkerHung", "no answer after 1 s")
    assert "in sleep_forever" in hung.printed
    assert pool.run(rank_sum, world_size=1) == [(0, 0)]


def test_a_result_that_cannot_be_sent_is_a_failure(pool: WorkerPool) -> None:
    assert all("pickle" in str(failure) for failure in pool.attempt(return_unpicklable, world_size=2))


def test_nothing_leaks_from_one_run_into_the_next(pool: WorkerPool) -> None:
    before = pool.run(look_around, world_size=2)
    draws = pool.run(leave_things_behind, world_size=2)
    assert pool.run(look_around, world_size=2) == before
    assert before[0]["dtype"] == torch.float32 and before[0]["threads"] == 1
    assert pool.run(leave_things_behind, world_size=2) == draws


def test_groups_of_an_earlier_run_are_forgotten(pool: WorkerPool) -> None:
    for num_groups_before in (0, 3, 1):
        assert pool.run(sum_of_shards, num_groups_before, world_size=4) == [28.0] * 4


def test_workers_carry_the_variables_of_a_launcher(pool: WorkerPool) -> None:
    assert pool.run(launch_variables, world_size=2) == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]


def test_workers_may_have_children(pool: WorkerPool) -> None:
    assert pool.run(load_with_workers, world_size=1) == [[0, 1, 2]]


def test_a_closed_pool_has_ended_its_workers_and_removed_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with WorkerPool(2) as ours:
        pids = ours.run(os.getpid, world_size=2)
        assert list(tmp_path.iterdir())
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed"):
        ours.run(os.getpid)


@contextmanager
def exit_of(pid: int) -> Iterator[Callable[[], None]]:
    """Yields a function that waits for the end of a process, which need not be our child."""
    descriptor = os.pidfd_open(pid)

    def wait() -> None:
        assert select.select([descriptor], [], [], 50.0)[0], f"process {pid} goes on"

    try:
        yield wait
    finally:
        os.close(descriptor)


INTERRUPTED = """
import os, time
from lightning_mics.testing import WorkerPool

if __name__ == "__main__":
    with WorkerPool(2) as pool:
        print(*pool.run(os.getpid, world_size=2), flush=True)
        pool.run(time.sleep, 1000, world_size=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_workers_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    folder = Path(tempfile.mkdtemp())  # the name of a socket in it must be short
    environ = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    # A test run in the background of a shell ignores Ctrl-C, and would hand that down.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ, preexec_fn=heed
    ) as parent:
        assert parent.stdout is not None
        first, second = map(int, parent.stdout.readline().split())
        with exit_of(first) as first_ended, exit_of(second) as second_ended:
            parent.send_signal(number)
            first_ended()
            second_ended()
    left = list(folder.glob("mics-pool-*"))
    shutil.rmtree(folder)
    assert number == signal.SIGKILL or not left


def shard_and_gather() -> dict[str, Tensor]:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return full_state_dict(model)


def test_full_state_dict_gathers_uneven_shards_on_every_rank(pool: WorkerPool) -> None:
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).state_dict()
    for state in pool.run(shard_and_gather, world_size=2):
        assert_parity(state, expected, tolerance=0.0)


@pytest.mark.parametrize(("strided", "rows"), [(False, [2, 3]), (True, [1, 3])], ids=["adjacent", "strided"])
def test_shard_batch_shares_rows_equally(strided: bool, rows: list[int]) -> None:
    batch = {"tokens": torch.arange(4), "pair": [torch.arange(4)]}
    share = shard_batch(batch, 1, 2, strided=strided)
    assert share["tokens"].tolist() == share["pair"][0].tolist() == rows
    with pytest.raises(ValueError, match="4 rows cannot be shared equally by 3 ranks"):
        shard_batch(batch, 0, 3)


def test_differences_are_relative_and_never_hide_nan() -> None:
    assert relative_difference(1.01, 1.0) == pytest.approx(0.01)
    assert relative_difference(0.0, 0.0) == 0.0
    assert relative_difference(float("nan"), 1.0) == relative_difference(1e-9, 0.0) == float("inf")
    expected = {"w": torch.tensor([1.0, -4.0]), "zero": torch.zeros(2), "none": torch.zeros(0)}
    actual = {"w": torch.tensor([1.0, -4.4]), "zero": torch.zeros(2), "none": torch.zeros(0)}
    assert weight_differences(actual, expected) == pytest.approx({"w": 0.1, "zero": 0.0, "none": 0.0})


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ({"a": torch.ones(2), "b": torch.tensor([1.0, 1.5])}, "1 of 2 tensors .* the worst is b: 5.00e-01"),
        ({"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2)}, "the worst is a: inf"),
        ({"a": torch.ones(2), "c": torch.ones(2)}, r"missing tensors: \['b'\]; unexpected: \['c'\]"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, r"shapes \(actual, expected\): {'b': \(\(1,\), \(2,\)\)}"),
    ],
    ids=["far", "nan", "names", "shape"],
)
def test_assert_parity_names_what_differs(actual: dict[str, Tensor], message: str) -> None:
    expected = {"a": torch.ones(2), "b": torch.ones(2)}
    assert_parity(expected, expected)
    with pytest.raises(AssertionError, match=message):
        assert_parity(actual, expected)


def test_ranks_that_share_a_card_are_hosts_of_their_own_to_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    def variables(rank: int, num_cards: int) -> dict[str, str]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cards)
        return worker.launch_variables(worker.Task(rank, 4, "cpu:gloo,cuda:nccl", "store", 60.0, [], b""))

    shared = [variables(rank, num_cards=1) for rank in range(4)]
    assert len({entry["NCCL_HOSTID"] for entry in shared}) == 4
    assert {(entry["LOCAL_RANK"], entry["LOCAL_WORLD_SIZE"]) for entry in shared} == {("0", "1")}
    own = variables(3, num_cards=4)
    assert "NCCL_HOSTID" not in own
    assert (own["RANK"], own["LOCAL_RANK"], own["LOCAL_WORLD_SIZE"]) == ("3", "3", "4")
    assert worker_device() == torch.device("cpu")
    for entry, card in ((shared[3], 0), (own, 3)):
        for name, value in entry.items():
            monkeypatch.setenv(name, value)
        assert worker_device() == torch.device("cuda", card)


def train_and_count_threads(width: int) -> int:
    """Trains a little, and returns this worker's threads of gloo."""
    model = mics_shard(nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4)), MiCSConfig(shard_size=1, node_size=1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.state_dict()["0.weight"].full_tensor()
    return sum("gloo_tcp" in comm.read_text() for comm in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_groups_of_earlier_runs_do_not_pile_up(pool: WorkerPool) -> None:
    counts = [pool.run(train_and_count_threads, width, world_size=2)[0] for width in range(1, 9)]
    assert max(counts[4:]) <= max(counts[:4]), counts
