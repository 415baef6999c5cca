"""Ring collectives over gloo against values known beforehand, and the thread that runs collectives in order."""

from __future__ import annotations

import functools
import itertools
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mics.core.cpu.rings import CommunicationThread, exchange, ring_all_gather, ring_reduce_scatter
from lightning_mics.core.places import look_around
from lightning_mics.core.transport import RingTransport, transport_for
from lightning_mics.testing import WorkerPool

WORLD_SIZES = [1, 2, 3, 4]
NUMELS = [1, 7, 1024]


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def values(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator).to(dtype)
    return torch.randint(0, 255, (numel,), generator=generator).to(dtype)


def small_integers(numel: int, dtype: torch.dtype, rank: int) -> Tensor:
    """Returns what every rank contributes to each rank, ``[size, numel]``; sums are exact even in bfloat16."""
    seed = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 9, (world().size(), numel), generator=seed).to(dtype)


def gathers() -> list[str]:
    """Returns which gathers are not bitwise what the ranks contributed."""
    size, rank, wrong = world().size(), world().rank(), []
    dtypes = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
    for dtype, numels in itertools.product(dtypes, ([7], [1024], NUMELS)):
        whole = [values(sum(numels), dtype, seed) for seed in range(size)]
        pieces = [list(torch.zeros_like(message).split(numels)) for message in whole]
        for piece, mine in zip(pieces[rank], whole[rank].split(numels), strict=True):
            piece.copy_(mine)
        ring_all_gather(pieces, world())
        if any(not torch.equal(torch.cat(parts), message) for parts, message in zip(pieces, whole, strict=True)):
            wrong.append(f"{dtype}, pieces of {numels}")
    return wrong


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_gather_brings_every_piece_bit_by_bit(pool: WorkerPool, world_size: int) -> None:
    assert pool.run(gathers, world_size=world_size) == [[]] * world_size


def reductions() -> list[str]:
    """Returns which reductions are not exact, or change what they reduce."""
    size, rank, wrong = world().size(), world().rank(), []
    ops = (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
    for dtype, numel, op, is_strided in itertools.product((torch.float32, torch.bfloat16), NUMELS, ops, (False, True)):
        contributions = [small_integers(numel, dtype, sender) for sender in range(size)]
        mine = contributions[rank]
        parts = list(mine.t().contiguous().t() if is_strided else mine)
        output = torch.full((numel,), torch.nan, dtype=dtype)
        ring_reduce_scatter(output, parts.__getitem__, world(), op)
        expected = torch.stack(contributions)[:, rank].sum(dim=0)
        if op == dist.ReduceOp.AVG:
            expected = expected / size
        if not torch.equal(output, expected) or not torch.equal(torch.stack(parts), mine):
            wrong.append(f"{dtype}, {numel} elements, {op}, strided {is_strided}")
    return wrong


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_reduction_is_exact_and_leaves_its_input_alone(pool: WorkerPool, world_size: int) -> None:
    assert pool.run(reductions, world_size=world_size) == [[]] * world_size


def rounded_average() -> float:
    """Returns the largest error of an average of ordinary bfloat16 values."""
    size, rank = world().size(), world().rank()
    contributions = [values(size * 512, torch.bfloat16, sender).view(size, 512) for sender in range(size)]
    output = torch.empty(512, dtype=torch.bfloat16)
    ring_reduce_scatter(output, contributions[rank].__getitem__, world(), dist.ReduceOp.AVG)
    return (output.float() - torch.stack(contributions)[:, rank].float().mean(dim=0)).abs().max().item()


def test_bfloat16_values_are_averaged_within_its_rounding(pool: WorkerPool) -> None:
    assert all(error < 0.02 for error in pool.run(rounded_average, world_size=4))


def ring_cases() -> tuple[list[bool], list[Tensor]]:
    """Returns where rings are chosen, and what a reduce-scatter of ranks and their doubles brings, by operation."""
    chosen = [isinstance(transport_for(world(), device_type), RingTransport) for device_type in ("cuda", "cpu")]
    rank, results = world().rank(), []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX):
        output, message = torch.empty(1), torch.tensor([1.0, 2.0]) * (rank + 1)
        transport_for(world(), "cpu").reduce_scatter([world()])(output, message, world(), op)
        results.append(output)
    return chosen, results


def test_rings_carry_sums_and_averages_of_cpu_tensors_and_leave_the_rest_to_gloo(pool: WorkerPool) -> None:
    for rank, (chosen, results) in enumerate(pool.run(ring_cases)):
        assert chosen == [False, True]
        assert [result.item() / (rank + 1) for result in results] == [3.0, 1.5, 2.0]


def collectives_of_others() -> dict[str, int]:
    """Returns how many collectives that are not ours a rank seems to have begun, while it waits in each ring."""
    size, rank, name = world().size(), world().rank(), world().group_name
    pieces, output = list(torch.zeros(size, 2)), torch.zeros(2)
    rings = {
        "gather": lambda: ring_all_gather([[piece] for piece in pieces], world()),
        "reduction": lambda: ring_reduce_scatter(output, pieces.__getitem__, world(), dist.ReduceOp.SUM),
        "exchange": lambda: exchange(torch.zeros(size, 2), torch.zeros(size, 2), world()),
    }
    seen = {}
    for ring, run in rings.items():
        before = look_around().counts.get(name, 0)
        thread = threading.Thread(target=run)
        time.sleep(rank == 0)  # the others wait for it
        thread.start()
        time.sleep(0.3)
        seen[ring] = look_around().counts[name] - before
        thread.join()
        dist.barrier()
    return seen


def test_who_waits_in_a_ring_of_all_ranks_lacks_no_collective_of_others(pool: WorkerPool) -> None:
    assert pool.run(collectives_of_others, world_size=4) == [dict.fromkeys(("gather", "reduction", "exchange"), 0)] * 4


# --- the thread -------------------------------------------------------------------------------------------------------


def order_of_submission() -> list[str]:
    thread, gate, log = CommunicationThread(), threading.Event(), []

    def slow() -> None:
        assert gate.wait(10)
        log.append("first")

    first = thread.run(slow, async_op=True)
    second = thread.run(lambda: log.append("second"), async_op=True)
    assert first is not None and second is not None and not first.is_completed()
    threading.Timer(0.05, gate.set).start()
    assert thread.run(lambda: log.append("third"), async_op=False) is None
    assert log == ["first", "second", "third"] and first.is_completed()
    fourth = thread.run(lambda: log.append("fourth"), async_op=True)
    assert fourth is not None and fourth.wait() and fourth.wait() and second.wait()
    thread.run(lambda: log.append("fifth"), async_op=False)
    return log


def test_collectives_run_in_the_order_of_submission(pool: WorkerPool) -> None:
    assert pool.run(order_of_submission, world_size=1) == [["first", "second", "third", "fourth", "fifth"]]


def errors() -> list[str]:
    """Returns what waiting for failed collectives raises, in order; one that works runs after each."""
    thread, gate, found, log = CommunicationThread(), threading.Event(), [], []

    def succeed() -> None:
        assert gate.wait(10)

    def fail() -> None:
        succeed()
        raise ValueError("no such peer")

    failing = [thread.run(fail, async_op=True) for _ in range(2)]
    gate.set()
    for work in failing:
        assert work is not None
        for _ in range(2):  # a second wait does not make it good
            try:
                work.wait()
            except ValueError as error:
                found.append(str(error))
    gate.clear()
    threading.Timer(0.05, gate.set).start()
    earlier = thread.run(succeed, async_op=True)
    try:
        thread.run(fail, async_op=False)
    except ValueError as error:
        found.append(str(error))
    assert earlier is not None and earlier.wait()
    thread.run(lambda: log.append("works"), async_op=False)
    return [*found, *log]


def test_an_error_in_a_collective_surfaces_where_it_is_waited_for(pool: WorkerPool) -> None:
    assert pool.run(errors, world_size=1) == [["no such peer"] * 5 + ["works"]]


def crossing_groups() -> list[float]:
    """Returns sums over the world and over a pair, from many collectives under way at once."""
    thread, rank, size = CommunicationThread(), world().rank(), world().size()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    pair, outputs, works = pairs[rank // 2], [], []
    for step in range(20):
        group = (world(), pair)[step % 2]
        parts = list(torch.full((group.size(), 64), float(rank + step)))
        output = torch.empty(64)
        reduce = functools.partial(ring_reduce_scatter, output, parts.__getitem__, group, dist.ReduceOp.SUM)
        works.append(thread.run(reduce, async_op=step % 5 != 4))
        outputs.append(output)
    for work in works:
        assert work is None or work.wait()
    assert all(bool((output == output[0]).all()) for output in outputs)
    return [output[0].item() for output in outputs]


def test_collectives_of_two_groups_do_not_wait_for_each_other(pool: WorkerPool) -> None:
    for rank, sums in enumerate(pool.run(crossing_groups, world_size=4)):
        first = rank // 2 * 2
        assert sums == [(6 + 4 * step, 2 * first + 1 + 2 * step)[step % 2] for step in range(20)]
