"""Optimizer states that are divided further than parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from works import works

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core._torch import local_tensor
from lightning_mics.errors import MiCSConfigError
from lightning_mics.testing import WorkerPool, full_state_dict
from lightning_mics.topology import ClusterTopology

BOUND = 1e-5


class Net(nn.Module):
    """Uneven shards, with fewer rows than slices, a scalar, what is unused, tied or frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5))
        self.norm, self.head, self.unused = nn.LayerNorm(5), nn.Linear(5, 1), nn.Linear(2, 2)
        self.tied = nn.Linear(5, 3)
        self.tied.weight = self.inner[2].weight
        self.scale = nn.Parameter(torch.tensor(1.2))
        self.norm.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.inner(x))
        return self.head(y) * self.scale + self.tied(y).sum(1, keepdim=True)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True, amsgrad=True),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05, initial_accumulator_value=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.05),
}


def rows(rank: int, step: int) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * step + rank))


def train(make: Any, p: int, q: Any, accumulate: int, steps: int = 3) -> tuple[float, Any, Any]:
    """Returns how far weights are from those of one process, the model and its optimizer."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = Net()
    model: Any = mics_shard(copy.deepcopy(reference), MiCSConfig(shard_size=p, node_size=2, optimizer_shard_size=q))
    optimizer, expected = make(model.parameters()), make(reference.parameters())
    for step in range(steps):
        for microstep in range(accumulate):
            number = step * accumulate + microstep
            with defer_replication_sync(model, enabled=microstep + 1 < accumulate):
                (model(rows(rank, number)).square().mean() / accumulate).backward()
            everyones = torch.cat([rows(other, number) for other in range(world)])
            (reference(everyones).square().mean() / accumulate).backward()
        norms = [nn.utils.clip_grad_norm_(each.parameters(), 0.5) for each in (model, reference)]
        assert abs(norms[0] - norms[1]) < BOUND * norms[1]
        for each in (optimizer, expected):
            each.step()
            each.zero_grad()
    whole = full_state_dict(model)
    worst = max((whole[name] - value).abs().max().item() for name, value in reference.state_dict().items())
    return worst, model, optimizer


def state_numel(optimizer: Any) -> int:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local_tensor(value).numel() for value in states if isinstance(value, DTensor))


def differences(names: list[str], layouts: list[tuple[int, Any, int]]) -> dict[str, float]:
    found = {}
    for p, q, accumulate in layouts:
        for name in names:
            found[f"{name}, p={p}, q={q}, {accumulate}"] = train(OPTIMIZERS[name], p, q, accumulate)[0]
    return found


@works("Optimizers", "AdamW, SGD, Adagrad and Adafactor with optimizer_shard_size")
@pytest.mark.parametrize(
    "world_size, layouts",
    [(4, [(2, "world", 2), (1, "world", 1), (1, 2, 1)]), (6, [(2, "world", 1), (1, 3, 1)])],
    ids=["four", "six"],
)
def test_training_equals_one_process(pool: WorkerPool, world_size: int, layouts: list[tuple[int, Any, int]]) -> None:
    for found in pool.run(differences, list(OPTIMIZERS), layouts, world_size=world_size, timeout=120):
        wrong = {name: value for name, value in found.items() if not value <= BOUND}
        assert not wrong, wrong


def largest_slice(model: nn.Module, world: int) -> int:
    """Returns the elements of the parameters that the rank with the most of them steps on."""
    shapes = [param.shape for param in model.parameters() if param.requires_grad and param.dim()]
    p = model_shard_size(model)
    return sum(math.ceil(math.ceil(shape[0] / p) / (world // p)) * shape[1:].numel() for shape in shapes)


def model_shard_size(model: nn.Module) -> int:
    return next(param.device_mesh.size() for param in model.parameters() if isinstance(param, DTensor))


def sizes(p: int, q: Any) -> tuple[int, int, int]:
    """Returns the elements of this rank's states, the most that a rank may have, and those of the whole model."""
    _, model, optimizer = train(OPTIMIZERS["adamw"], p, q, 1, steps=1)
    used = [param for param in model.parameters() if isinstance(param, DTensor) and param in optimizer.state]
    most = largest_slice(nn.ParameterList(used), dist.get_world_size())
    return state_numel(optimizer), 2 * most, 2 * sum(param.numel() for param in used)


def test_each_rank_has_its_slices_of_the_states_alone(pool: WorkerPool) -> None:
    for p in (1, 2):
        found = pool.run(sizes, p, "world", world_size=4)
        assert sum(numel for numel, _, _ in found) == found[0][2]
        assert max(numel for numel, _, _ in found) <= found[0][1]
    halves = pool.run(sizes, 1, 2, world_size=4)
    assert sum(numel for numel, _, _ in halves) == 2 * halves[0][2]  # two instances


def weights_by_bits(p: int, q: Any, hierarchical: bool) -> list[Tensor]:
    torch.manual_seed(0)
    config = MiCSConfig(shard_size=p, node_size=2, optimizer_shard_size=q, hierarchical=hierarchical)
    model: Any = mics_shard(Net(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(3):
        model(rows(dist.get_rank(), step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole.clone() for whole in full_state_dict(model).values()]


@pytest.mark.parametrize("p, hierarchical", [(1, False), (2, False), (4, True)])
def test_two_replicas_train_as_with_states_of_the_partition_to_the_bit(
    pool: WorkerPool, p: int, hierarchical: bool
) -> None:
    world = 2 * p
    divided = pool.run(weights_by_bits, p, "world", hierarchical, world_size=world)[0]
    undivided = pool.run(weights_by_bits, p, "partition", hierarchical, world_size=world)[0]
    assert all(map(torch.equal, divided, undivided))


def read_between_steps() -> dict[str, bool]:
    """Returns for each way to look at weights after a step whether it shows what all ranks made of them."""
    looks: dict[str, Callable[[Any], Tensor]] = {
        "full_tensor": lambda param: param.full_tensor(),
        "detach": lambda param: local_tensor(param.detach()),
        "data": lambda param: local_tensor(param.data),
        "to_local": lambda param: param.to_local(),
        "clone": lambda param: local_tensor(param.clone()),
        "foreach": lambda param: local_tensor(torch._foreach_mul([param], 1.0)[0]),
        "copy": lambda param: local_tensor(copy.deepcopy(param)),
        "norm": lambda param: param.norm().full_tensor(),
    }
    found = {}
    for name, look in looks.items():
        _, model, optimizer = train(OPTIMIZERS["adamw"], 2, "world", 1, steps=1)
        model(rows(dist.get_rank(), 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen = look(model.head.weight).clone()
            found[name] = torch.equal(seen, look(model.head.weight))
            found[name] &= _replicas_agree(seen)
    return found


def _replicas_agree(seen: Tensor) -> bool:
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, seen.clone())
    mine = everyones[dist.get_rank() % 2 :: 2]
    return all(torch.equal(mine[0], other) for other in mine)


def test_nobody_reads_rows_that_are_under_way(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in pool.run(read_between_steps, world_size=4):
        assert all(found.values()), found


class Fails(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        raise ValueError("after the step")


def failing_step() -> float:
    """Returns how far weights are from those of one process after a step that raised when it was done."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = Net()
    model: Any = mics_shard(copy.deepcopy(reference), MiCSConfig(shard_size=2, optimizer_shard_size="world"))
    for _ in range(2):
        everyones = torch.cat([rows(other, 0) for other in range(world)])
        for each, x in ((model, rows(rank, 0)), (reference, everyones)):
            each(x).square().mean().backward()
            with pytest.raises(ValueError, match="after the step"):
                Fails(each.parameters(), lr=0.1).step()
            each.zero_grad()
    model(rows(rank, 0))
    whole = full_state_dict(model)
    return max((whole[name] - value).abs().max().item() for name, value in reference.state_dict().items())


def test_a_step_that_raises_leaves_all_ranks_with_the_same_weights(pool: WorkerPool) -> None:
    assert max(pool.run(failing_step, world_size=4)) <= BOUND


def closures() -> float:
    """Returns how far weights are from those of one process, with a closure that is evaluated inside of the step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    reference = Net()
    model: Any = mics_shard(copy.deepcopy(reference), MiCSConfig(shard_size=1, optimizer_shard_size="world"))
    pairs = [(model, lambda step: rows(rank, step))]
    pairs.append((reference, lambda step: torch.cat([rows(other, step) for other in range(world)])))
    for each, batch in pairs:
        optimizer = torch.optim.AdamW(each.inner.parameters(), lr=0.05)
        optimizer.add_param_group({"params": list(each.head.parameters()), "lr": 0.01})
        for step in range(3):

            def closure(each: Any = each, batch: Any = batch, step: int = step, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = each(batch(step)).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            each.zero_grad()
    whole = full_state_dict(model)
    return max((whole[name] - value).abs().max().item() for name, value in reference.state_dict().items())


def test_closures_and_groups_that_are_added(pool: WorkerPool) -> None:
    assert max(pool.run(closures, world_size=4)) <= BOUND


@pytest.mark.parametrize("p, q", [(2, 3), (2, "node"), (4, 2), (1, 0), (2, 1)])
def test_sizes_that_do_not_work_are_refused_with_those_that_do(p: int, q: Any) -> None:
    with pytest.raises(MiCSConfigError, match="optimizer_shard_size=") as raised:
        layout = ClusterTopology(world_size=8, node_size=2).layout(p)
        layout.resolve_optimizer_shard_size(MiCSConfig(shard_size=p, optimizer_shard_size=q).optimizer_shard_size)
    assert "Values that work" in str(raised.value) or "Try" in str(raised.value)


def test_layouts_name_who_divides_states() -> None:
    layout = ClusterTopology(world_size=8, node_size=2).layout(2)
    assert layout.optimizer_groups(4) == ((0, 2), (4, 6), (1, 3), (5, 7))
    assert layout.instance_groups(4) == ((0, 4), (2, 6), (1, 5), (3, 7))
