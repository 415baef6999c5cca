"""Plain layers around a sharded module: replicas of one another, in every way in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from way_tools import WAYS, WIDTH, Rows, adamw, differences, sgd
from works import works

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core.gradients.whole import is_taken
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BOUND = 1e-5


class Parts(nn.Module):
    """Two bodies between plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, 8)
        self.body = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8))
        self.between = nn.LayerNorm(8)
        self.second = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8))
        self.after = nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        hidden = self.body(torch.tanh(self.before(rows)))
        return {"loss": (self.after(self.second(self.between(hidden))) - 1).square().mean()}


def config(shard_size: int = 2) -> MiCSConfig:
    return MiCSConfig(shard_size=shard_size, node_size=2, wrap=nn.Linear)


def shard_parts(shard_size: int, *names: str) -> Any:
    def shard(model: nn.Module) -> nn.Module:
        for name in names:
            mics_shard(getattr(model, name), config(shard_size))
        return model

    return shard


def parts(way: str) -> dict[str, float]:
    found = {}
    for names, shard_size, accumulate, optimize in (
        (("body",), 1, 1, sgd),
        (("body",), 2, 3, adamw),
        (("body", "second"), 2, 3, sgd),
        (("second",), 4, 3, sgd),
    ):
        settings = {"shard_size": shard_size, "node_size": 2}
        value = differences(
            Parts, way, settings, optimize=optimize, accumulate=accumulate, before=shard_parts(shard_size, *names)
        )
        found[f"{way}, {names}, p={shard_size}, {accumulate} microsteps"] = value
    return found


def check(results: list[dict[str, float]]) -> None:
    for found in results:
        assert found and {name: value for name, value in found.items() if not value <= BOUND} == {}


@works("Model kinds", "Plain layers around a sharded part")
@pytest.mark.parametrize("way", list(WAYS))
def test_the_rest_of_a_model_is_averaged_in_every_way(pool: WorkerPool, way: str) -> None:
    check(pool.run(parts, way, world_size=4, timeout=120))


def alone(frozen: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Parts()
    model.body.requires_grad_(not frozen)
    return model, sgd(model.parameters())


def without_an_outer_call(case: str) -> dict[str, float]:
    """Parts that are called one by one; only the optimizer holds them together."""
    found = {}
    for shard_size in (1, 2, 4):
        single, own = alone(case == "frozen body")
        torch.manual_seed(dist.get_rank())
        model = Parts()
        model.body.requires_grad_(case != "frozen body")
        if case == "optimizer first":
            optimizer = sgd(model.parameters())
            mics_shard(model.body, config(shard_size), optimizer=optimizer)
        elif case == "replaced":  # groups that were changed by hand are seen at the step
            torch.manual_seed(0)
            model = Parts()
            mics_shard(model.body, config(shard_size))
            optimizer = sgd(model.body.parameters())
            optimizer.param_groups[0]["params"] = list(model.parameters())
        else:
            mics_shard(model.body, config(shard_size))
            optimizer = sgd(list(model.body.parameters()))
            optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if not n.startswith("body")]})
        for index in range(3):
            single(Rows(3).of_rank(index))["loss"].backward()
            own.step()
            own.zero_grad()
            rows = Rows(3).of_rank(index, dist.get_rank())
            hidden = model.between(model.body(torch.tanh(model.before(rows))))
            (model.after(model.second(hidden)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = single.state_dict()
        found[f"{case}, p={shard_size}"] = max(weight_differences(full_state_dict(model), expected).values())
    return found


@pytest.mark.parametrize("case", ["optimizer", "optimizer first", "frozen body", "replaced"])
def test_an_optimizer_ties_plain_parameters_to_sharded_ones(pool: WorkerPool, case: str) -> None:
    check(pool.run(without_an_outer_call, case, world_size=4))


def separate_optimizers() -> dict[str, float]:
    """A module that holds both ties them, also where each part has an optimizer of its own."""
    single, own = alone(False)
    torch.manual_seed(dist.get_rank())
    model = Parts()
    mics_shard(model.body, config())
    names = [name for name, _ in model.named_parameters() if not name.startswith("body")]
    optimizers = [sgd(model.body.parameters()), sgd([dict(model.named_parameters())[name] for name in names])]
    for index in range(3):
        single(Rows(3).of_rank(index))["loss"].backward()
        own.step()
        own.zero_grad()
        model(Rows(3).of_rank(index, dist.get_rank()))["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {"separate": max(weight_differences(full_state_dict(model), single.state_dict()).values())}


def test_a_module_around_ties_plain_parameters_to_sharded_ones(pool: WorkerPool) -> None:
    check(pool.run(separate_optimizers, world_size=4))


def not_related() -> bool:
    """A plain model of its own is left alone: each rank may do with it what it wants."""
    model, other = Parts(), nn.Linear(WIDTH, 1)
    mics_shard(model, config())
    optimizers = [sgd(model.parameters()), sgd(other.parameters())]
    rows = Rows(1).of_rank(0, dist.get_rank())
    other(rows).mean().backward()
    mine = other.weight.grad.clone()
    model(rows)["loss"].backward()
    for optimizer in optimizers:
        optimizer.step()
    return torch.equal(other.weight.grad, mine) and not any(map(is_taken, other.parameters()))


def test_a_model_that_nothing_ties_is_left_alone(pool: WorkerPool) -> None:
    assert pool.run(not_related, world_size=2) == [True, True]


def tied() -> None:
    model = Parts()
    model.after.weight = model.second[0].weight = nn.Parameter(torch.ones(3, 8))
    mics_shard(model.second, config())
    model(Rows(1).of_rank(0, dist.get_rank()))


def test_a_parameter_that_is_shared_with_the_sharded_part_is_an_error(pool: WorkerPool) -> None:
    for failure in pool.attempt(tied, world_size=2):
        assert failure.kind == "MiCSConfigError" and "after.weight is shared with a module" in failure.message


def step_in_a_window() -> None:
    model = shard_parts(4, "body")(Parts())
    optimizer = sgd(model.after.parameters())
    with defer_replication_sync(model):
        model(Rows(1).of_rank(0, dist.get_rank()))["loss"].backward()
    optimizer.step()


def test_no_step_of_plain_layers_in_the_middle_of_a_window(pool: WorkerPool) -> None:
    for failure in pool.attempt(step_in_a_window, world_size=4):
        assert failure.kind == "UnsyncedGradientsError"


def late_head() -> float:
    """A head that takes the place of another after sharding, trained by an optimizer of its own."""
    torch.manual_seed(0)
    model, head = Parts(), nn.Linear(8, 2)
    model.body.requires_grad_(False)
    sharded = mics_shard(copy.deepcopy(model), MiCSConfig(shard_size=2, wrap=nn.Sequential))
    data = Rows(2)
    model.after = head
    sharded.after = copy.deepcopy(head)
    if dist.get_rank():
        nn.init.zeros_(sharded.after.weight)  # rank 0's counts
    optimizers = sgd(model.after.parameters()), sgd(sharded.after.parameters())
    for step in range(2):
        for who, optimizer, rank in zip((model, sharded), optimizers, (None, dist.get_rank()), strict=True):
            who(rows=data.of_rank(step, rank))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return max(weight_differences(full_state_dict(sharded), model.state_dict()).values())


@works("Model kinds", "A layer put into a sharded model, with an optimizer of its own")
def test_a_layer_that_comes_later_is_averaged(pool: WorkerPool) -> None:
    assert max(pool.run(late_head, world_size=4)) <= BOUND
