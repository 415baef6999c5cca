"""Dtypes in which hop two travels: gradients to those who add them up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import MiCSConfig, communication_ledger, defer_replication_sync, mics_shard
from lightning_mics.core._torch import local_tensor
from lightning_mics.metrics import Hop, Traffic
from lightning_mics.testing import WorkerPool


class Net(nn.Module):
    """Uneven shards, a parameter of one element and one that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 9), nn.Linear(9, 1)
        self.scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))) * self.scale


def rows(rank: int, step: int) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * step + rank))


def wholes(model: Any) -> list[Tensor]:
    return [param.grad.full_tensor() for param in model.parameters() if hasattr(param, "full_tensor")]


def gradients(settings: dict[str, Any], wire: Any) -> tuple[list[Tensor], list[Tensor], Traffic]:
    """Returns gradients of a window of two microsteps, weights some steps later, and the bytes of hop two."""
    torch.manual_seed(0)
    config = MiCSConfig(shard_size=2, node_size=2, wrap=nn.Linear, replication_reduce_dtype=wire, **settings)
    model: Any = mics_shard(Net(), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    grads = []
    for step in range(3):
        for microstep in range(2):
            with defer_replication_sync(model, enabled=microstep == 0):
                (model(rows(dist.get_rank(), 2 * step + microstep)).square().mean() / 2).backward()
        grads = grads or [whole.clone() for whole in wholes(model)]
        optimizer.step()
        optimizer.zero_grad()
    shards = [local_tensor(param.detach()).clone() for param in model.parameters()]
    ledger = communication_ledger(model)
    return grads, shards, ledger.total(Hop.REPLICATION_REDUCE) - ledger.total(Hop.REPLICATION_REDUCE, "(whole)")


@pytest.mark.parametrize("q, kept", [("partition", 0.75), ("world", 0.5), (4, 0.75)])
def test_16_bit_exchanges_round_once_and_sum_in_float32(pool: WorkerPool, q: Any, kept: float) -> None:
    world = 8 if q == 4 else 4
    settings = {"optimizer_shard_size": q}
    exact = pool.run(gradients, settings, None, world_size=world)
    narrow = pool.run(gradients, settings, "bfloat16", world_size=world)
    for mine, other in zip(narrow[0][0], exact[0][0], strict=True):
        assert 0 < (mine - other).abs().max() <= 2**-8 * other.abs().max() * 2
    assert any((grad != grad.bfloat16()).any() for grad in narrow[0][0])
    for rank, (_, shards, traffic) in enumerate(narrow):
        assert all(map(torch.equal, shards, narrow[rank % 2][1]))  # replicas, to the bit
        assert all(torch.allclose(a, b, atol=5e-3) for a, b in zip(shards, exact[rank][1], strict=True))
        assert traffic.inter_bytes == pytest.approx(kept * exact[rank][2].inter_bytes, abs=3)


@pytest.mark.parametrize("q", ["partition", "world"])
def test_sums_are_float32_whatever_the_reduction_is(pool: WorkerPool, q: str) -> None:
    settings = {"optimizer_shard_size": q, "reduce_dtype": "bfloat16"}
    grads = pool.run(gradients, settings, "bfloat16", world_size=4)[0][0]
    assert any((grad != grad.bfloat16()).any() for grad in grads)
