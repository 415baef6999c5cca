"""A unit that a partition does not run in a microstep sends nothing there, and ends as in one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import Hop, MiCSConfig, communication_ledger, defer_replication_sync, mics_shard
from lightning_mics.testing import WorkerPool

# Window by window and microstep by microstep: which replicas run the expert.
WINDOWS: list[list[set[int]]] = [
    [{0, 1}, set(), {0}],
    [{1}, set(), {1}],
    [set(), set(), set()],
    [set(), {0, 1}, {0, 1}],
]


class Routed(nn.Module):
    """Two blocks, of which one is an expert that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.expert = (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(6, 1)

    def forward(self, inputs: Tensor, runs_expert: bool) -> Tensor:
        hidden = self.dense(inputs)
        return self.head(hidden + self.expert(hidden) if runs_expert else hidden).square().sum()


def inputs(rank: int, number: int) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(100 * number + rank))


def run(dtype: str | None) -> list[tuple[int, int]]:
    """Trains beside one process; returns the expert's reductions in both hops, window by window."""
    torch.manual_seed(0)
    whole = Routed()
    sharded = copy.deepcopy(whole)
    config = MiCSConfig(shard_size=2, node_size=2, wrap=["Sequential"], param_dtype=dtype, cast_forward_inputs=True)
    model = mics_shard(sharded, config)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01, weight_decay=0.1) for one in (whole, model)]
    ledger, calls = communication_ledger(model), []
    for window, microsteps in enumerate(WINDOWS):
        ledger.reset()
        for index, replicas in enumerate(microsteps):
            number = 10 * window + index
            with defer_replication_sync(model, enabled=index + 1 < len(microsteps)):
                model(inputs(dist.get_rank(), number), dist.get_rank() // 2 in replicas).backward()
            for rank in range(4):
                (whole(inputs(rank, number), rank // 2 in replicas) / 4).backward()
        hops = Hop.PARTITION_REDUCE, Hop.REPLICATION_REDUCE
        calls.append(tuple(ledger.total(hop, "expert").calls for hop in hops))
        tolerance = 1e-5 if dtype is None else 0.1
        for one, other in zip(whole.parameters(), model.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(other.grad.full_tensor(), one.grad, rtol=tolerance, atol=tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return calls


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_idle_units_send_nothing_in_their_partition(pool: WorkerPool, dtype: str | None) -> None:
    first, second = [(2, 1), (0, 1), (0, 1), (2, 1)], [(1, 1), (2, 1), (0, 1), (2, 1)]
    assert pool.run(run, dtype, world_size=4) == [first, first, second, second]


class Shifted(nn.Module):
    """A frozen layer with one trainable parameter, which only some rows take."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6).requires_grad_(False)
        self.shift = nn.Parameter(torch.ones(6))

    def forward(self, inputs: Tensor, is_shifted: bool) -> Tensor:
        hidden = self.layer(inputs)
        return hidden + self.shift if is_shifted else hidden


class Adapted(nn.Module):
    """A unit whose output wants a gradient only where its parameter was used, before one that always does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Shifted(), nn.Sequential(nn.Linear(6, 6))
        self.offset = nn.Parameter(torch.zeros(6))

    def forward(self, inputs: Tensor, is_shifted: bool) -> Tensor:
        return self.second(self.first(inputs, is_shifted) + self.offset).square().sum()


def train_adapted() -> None:
    """Trains beside one process; in each window after the first another rank alone runs the first unit backward."""
    torch.manual_seed(0)
    whole = Adapted()
    model = mics_shard(copy.deepcopy(whole), MiCSConfig(shard_size=2, node_size=2, wrap=["Shifted", "Sequential"]))
    for window in range(3):
        shifted = [window == 0 or window % 2 == rank for rank in range(2)]
        model(inputs(dist.get_rank(), window), shifted[dist.get_rank()]).backward()
        for rank in range(2):
            (whole(inputs(rank, window), shifted[rank]) / 2).backward()
        for one, other in zip(whole.parameters(), model.parameters(), strict=True):
            if one.requires_grad:
                torch.testing.assert_close(other.grad.full_tensor(), one.grad)
        for trained in (whole, model):
            trained.zero_grad()


def test_a_rank_without_a_backward_pass_of_a_unit_reduces_with_those_that_have_one(pool: WorkerPool) -> None:
    pool.run(train_adapted, world_size=2)
