"""Dtypes in which hop two travels: gradients to those who add them up, and rows from those who stepped on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import MiCSConfig, communication_ledger, defer_replication_sync, mics_shard
from lightning_mics.core._torch import local_tensor
from lightning_mics.errors import MiCSConfigError, MiCSError
from lightning_mics.metrics import Hop, Traffic
from lightning_mics.testing import WorkerPool, full_state_dict


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


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.05),
}


def stepped(wire: Any, optimizer: str = "adamw", steps: int = 4, **settings: Any) -> tuple[Any, list[float], list[int]]:
    """Returns a model after some steps, their losses, and the bytes of hop two, by part, in the last of them."""
    torch.manual_seed(0)
    settings = {"shard_size": 2, "node_size": 2, "optimizer_shard_size": "world", "verify": False} | settings
    config = MiCSConfig(wrap=nn.Linear, param_dtype="bfloat16", replication_gather_dtype=wire, **settings)
    model: Any = mics_shard(Net(), config)
    inner, losses = OPTIMIZERS[optimizer](model.parameters()), []
    for step in range(steps):
        communication_ledger(model).reset()
        loss = model(rows(dist.get_rank(), step).bfloat16()).float().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        inner.step()
        inner.zero_grad()
        losses.append(loss.item())
    hops = (Hop.REPLICATION_REDUCE, Hop.REPLICATION_GATHER)
    ledger = communication_ledger(model)
    units = [unit for unit in ledger.units() if unit != "(whole)"]
    return model, losses, [sum(ledger.total(hop, unit).inter_bytes for unit in units) for hop in hops]


def losses_and_weights(wire: Any, optimizer: str, **settings: Any) -> tuple[list[float], list[int], list[Tensor]]:
    model, losses, sent = stepped(wire, optimizer, **settings)
    return losses, sent, [value.clone() for value in full_state_dict(model).values()]


@pytest.mark.parametrize("optimizer, p, kept", [("adamw", 2, 0.5), ("adamw", 1, 0.5), ("adafactor", 2, 1)])
def test_rows_that_come_in_16_bits_change_no_loss_and_no_weight(
    pool: WorkerPool, optimizer: str, p: int, kept: float
) -> None:
    settings = {"shard_size": p, "node_size": 1 if p == 1 else 2}
    exact = pool.run(losses_and_weights, None, optimizer, **settings, world_size=4)
    narrow = pool.run(losses_and_weights, "bfloat16", optimizer, **settings, world_size=4)
    for (losses, sent, weights), (others, whole, expected) in zip(narrow, exact, strict=True):
        assert losses == others and all(map(torch.equal, weights, expected))
        assert sent == [whole[0], kept * whole[1]] and min(whole) > 0


LOOKS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda model: local_tensor(model.state_dict()["first.weight"]),
    "to_local": lambda model: model.first.weight.to_local(),
    "foreach": lambda model: local_tensor(torch._foreach_mul([model.first.weight], 1.0)[0]),
    "alias": lambda model: local_tensor(model.alias.clone()),
}


def looks(wire: Any) -> dict[str, Tensor]:
    """Returns this rank's shard, as each way to look at it shows it; first as it lies there."""
    found = {}
    for name, look in LOOKS.items():
        model, _, _ = stepped(wire, steps=1)
        model.__dict__["alias"] = model.first.weight.detach()
        for _ in range(2):  # the second of these rounds again what the first look has restored
            model(rows(dist.get_rank(), 5).bfloat16()).square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()
            model(rows(0, 6).bfloat16())  # rows have come
            found["memory"] = local_tensor(model.first.weight).detach().clone()
            with torch.no_grad():
                found[name] = look(model).clone()
    return found


def test_whoever_looks_at_parameters_sees_float32(pool: WorkerPool) -> None:
    narrow, exact = (pool.run(looks, wire, world_size=4) for wire in ("bfloat16", None))
    for mine, expected in zip(narrow, exact, strict=True):
        assert not torch.equal(mine["memory"], expected["memory"])
        assert all(torch.equal(mine[name], expected[name]) for name in LOOKS)


def look_alone() -> str:
    model, _, _ = stepped("bfloat16", steps=1)
    model.eval()
    if dist.get_rank() == 0:
        with pytest.raises(MiCSError) as raised:
            model.first.weight.to_local()
    dist.barrier()
    return str(raised.value) if dist.get_rank() == 0 else ""


def checked(**settings: Any) -> None:
    stepped("bfloat16", steps=3, **settings)


def test_checks_of_replicas_compare_float32(pool: WorkerPool) -> None:
    pool.run(checked, verify=True, verify_every=1, world_size=4)


@pytest.mark.parametrize(
    "settings, told",
    [({"optimizer_shard_size": "partition"}, "nothing to act on"), ({"param_dtype": None}, "another dtype")],
)
def test_what_rows_cannot_be_fetched_in_is_refused(pool: WorkerPool, settings: dict[str, Any], told: str) -> None:
    for error in pool.run(refused_with, settings, world_size=4):
        assert told in error


def refused_with(settings: dict[str, Any]) -> str:
    fitting = {"shard_size": 2, "param_dtype": "bfloat16", "optimizer_shard_size": "world"}
    with pytest.raises(MiCSConfigError, match="replication_gather_dtype='bfloat16'") as raised:
        mics_shard(Net(), MiCSConfig(**{**fitting, "replication_gather_dtype": "bfloat16", **settings}))
    return str(raised.value)


def test_one_rank_that_looks_alone_is_told(pool: WorkerPool) -> None:
    assert "all ranks fetch" in pool.run(look_alone, world_size=4)[0]
