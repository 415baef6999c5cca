"""Every optimizer of PyTorch on shards, beside one process that sees the global batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers.optimization import Adafactor as TransformersAdafactor
from works import refused, works

from lightning_mics import MiCSConfig, mics_shard
from lightning_mics.checkpoint import load_checkpoint, save_checkpoint
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BOUND = 1e-5
EPS = 1e-3  # see parity.py

ELEMENTWISE: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "eps": EPS}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "eps": EPS}),
    "AdamW (amsgrad)": (torch.optim.AdamW, {"lr": 0.01, "eps": EPS, "amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01, "eps": EPS}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "eps": EPS}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01, "eps": EPS}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": EPS, "momentum": 0.9, "centered": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
}
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
WHOLE: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "Muon": (torch.optim.Muon, {"lr": 0.01}),
    "transformers' Adafactor": (TransformersAdafactor, {}),
    "transformers' Adafactor (fixed rate)": (
        TransformersAdafactor,
        {"lr": 0.01, "relative_step": False, "scale_parameter": False, "beta1": 0.9},
    ),
}
FUSED_MAKERS = {f"fused {name}": (ELEMENTWISE[name][0], {**ELEMENTWISE[name][1], "fused": True}) for name in FUSED}
MAKERS = {
    **ELEMENTWISE,
    **FUSED_MAKERS,
    **WHOLE,
    "Rprop, foreach": (torch.optim.Rprop, {"lr": 0.01, "foreach": True}),
}


def build(bias: bool = True) -> nn.Module:
    """Layers that are even, uneven and with fewer rows than there are ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 5, bias=bias), nn.Tanh(), nn.Linear(5, 1, bias=bias)
    )


def rows(step: int, rank: int | None = None) -> Tensor:
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(step)
    everything = torch.randn(2 * world, 6, generator=generator)
    return everything if rank is None else everything[2 * rank : 2 * rank + 2]


def step(model: nn.Module, optimizer: Optimizer, data: Tensor, *, closure: bool = False) -> None:
    def compute() -> Tensor:
        optimizer.zero_grad()
        loss = (model(data) - 1).square().mean()
        loss.backward()
        return loss

    if closure:
        assert optimizer.step(compute) is not None
    else:
        compute()
        optimizer.step()


def difference(model: nn.Module, alone: nn.Module) -> float:
    found = weight_differences(full_state_dict(model), alone.state_dict())
    return max(found.values())


def trained(name: str, shard_size: int, *, closure: bool = False, before: bool = False) -> float:
    """Trains on shards and alone; returns the largest difference."""
    cls, settings = MAKERS[name]
    model = build(bias=name != "Muon")
    alone = copy.deepcopy(model)
    own = cls(alone.parameters(), **settings)
    config = MiCSConfig(shard_size=shard_size, node_size=2, verify=False, wrap=nn.Linear)
    if before:
        optimizer = cls(model.parameters(), **settings)
        mics_shard(model, config, optimizer=optimizer)
    else:
        mics_shard(model, config)
        optimizer = cls(model.parameters(), **settings)
    for index in range(3):
        step(alone, own, rows(index))
        step(model, optimizer, rows(index, dist.get_rank()), closure=closure)
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(isinstance(param, DTensor) for param in held) and set(optimizer.state) <= set(held)
    for param in held:
        for value in optimizer.state.get(param, {}).values():
            assert not isinstance(value, Tensor) or value.shape != param.shape or isinstance(value, DTensor)
    return difference(model, alone)


def all_trained(names: list[str]) -> dict[str, float]:
    found = {}
    for name in names:
        found[f"{name}, p=4, made before sharding"] = trained(name, 4, before=True)
        found[f"{name}, p=2, closure"] = trained(name, 2, closure=True)
    return found


def check(results: list[dict[str, float]]) -> None:
    for found in results:
        assert {name: value for name, value in found.items() if not value <= BOUND} == {}


@pytest.mark.parametrize("name", [pytest.param(name, marks=works("Optimizers", name)) for name in ELEMENTWISE])
def test_optimizers_that_work_element_by_element(pool: WorkerPool, name: str) -> None:
    check(pool.run(all_trained, [name, "Rprop, foreach"] if name == "Rprop" else [name], world_size=4))


@pytest.mark.parametrize("name", [pytest.param(name, marks=works("Optimizers", name)) for name in FUSED_MAKERS])
def test_fused_optimizers(pool: WorkerPool, name: str) -> None:
    check(pool.run(all_trained, [name], world_size=4))


@pytest.mark.parametrize("name", [pytest.param(name, marks=works("Optimizers", name)) for name in WHOLE])
def test_optimizers_that_look_at_whole_matrices(pool: WorkerPool, name: str) -> None:
    check(pool.run(all_trained, [name], world_size=4))


class Filled(Optimizer):
    """Fills its states when it is made, as some optimizers of third parties do: momentum, and slow weights."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for param in group["params"]:
                slow = param.detach().clone()
                self.state[param] = {"step": 0, "average": torch.zeros_like(param), "slow": slow}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["step"] += 1
                state["average"].mul_(0.9).add_(param.grad)
                param.add_(state["average"], alpha=-group["lr"])
                state["slow"].add_(param - state["slow"], alpha=0.5)
                param.copy_(state["slow"])


def filled_when_made() -> dict[str, float]:
    """Every way in that takes an optimizer over the whole model."""
    from accelerate_tools import make_accelerator
    from lightning.fabric import Fabric
    from lightning_tools import where

    from lightning_mics.fabric import MiCSStrategy

    settings = {"shard_size": 2, "node_size": 2, "verify": False, "wrap": nn.Linear}

    def bare(model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        return mics_shard(model, MiCSConfig(**settings), optimizer=optimizer), optimizer

    def fabric(model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        strategy = MiCSStrategy(**settings)
        runner = Fabric(**{**where(), "strategy": strategy})
        runner.launch()
        return runner.setup(model, optimizer)

    def accelerate(model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        return make_accelerator(settings=settings).prepare(model, optimizer)

    def apart(model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        accelerator = make_accelerator(settings=settings)
        return accelerator.prepare(model), accelerator.prepare(optimizer)

    found = {}
    for make in (lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1), Filled):
        for way in (bare, fabric, accelerate, apart):
            model, alone = build(), build()
            inner = make(model.parameters())
            own = make(alone.parameters())
            sharded, optimizer = way(model, inner)
            for index in range(3):
                step(alone, own, rows(index))
                loss = (sharded(rows(index, dist.get_rank())) - 1).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found[f"{type(inner).__name__}, {way.__name__}"] = difference(model, alone)
    return found


@works("Optimizers", "optimizers that fill their states when they are made")
def test_states_that_are_filled_when_an_optimizer_is_made(pool: WorkerPool) -> None:
    check(pool.run(filled_when_made, world_size=4))


def made_over_meta() -> dict[str, float]:
    with torch.device("meta"):
        model = build()
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.1)
    mics_shard(model, MiCSConfig(shard_size=2, node_size=2), optimizer=optimizer)
    sums = [state["sum"].full_tensor() for state in optimizer.state_dict()["state"].values()]
    return {str(index): float((total - 0.1).abs().max()) for index, total in enumerate(sums)}


def test_states_over_the_meta_device_get_values(pool: WorkerPool) -> None:
    check(pool.run(made_over_meta, world_size=2))


def stepped_before(name: str) -> None:
    model = build()
    optimizer = Filled(model.parameters()) if name == "Filled" else torch.optim.Adagrad(model.parameters())
    step(model, optimizer, rows(0))
    mics_shard(model, MiCSConfig(shard_size=2, node_size=2), optimizer=optimizer)


def test_states_that_steps_have_made_are_refused(pool: WorkerPool) -> None:
    for name in ("Adagrad", "Filled"):
        for failure in pool.attempt(stepped_before, name, world_size=2):
            assert failure.kind == "MiCSConfigError" and "has taken steps already" in failure.message


def resumed(folder: Path) -> dict[str, float]:
    """Saves in the middle, and goes on at another shard size."""
    found = {}
    for name in ("Rprop", "Adafactor"):
        cls, settings = MAKERS[name]
        alone = build(bias=name != "Muon")
        own = cls(alone.parameters(), **settings)
        for index in range(4):
            step(alone, own, rows(index))
        for shard_size, steps in ((2, range(2)), (4, range(2, 4))):
            model = build(bias=name != "Muon")
            mics_shard(model, MiCSConfig(shard_size=shard_size, node_size=2, verify=False))
            optimizer = cls(model.parameters(), **settings)
            if steps.start:
                load_checkpoint(folder / name, model, optimizer)
            for index in steps:
                step(model, optimizer, rows(index, dist.get_rank()))
            save_checkpoint(folder / name, model, optimizer)
        found[name] = difference(model, alone)
    return found


def test_states_of_stand_ins_are_saved_and_loaded(pool: WorkerPool, tmp_path: Path) -> None:
    check(pool.run(resumed, tmp_path, world_size=4))


def with_sparse_adam() -> None:
    model = build()
    mics_shard(model, MiCSConfig(shard_size=2, node_size=2))
    step(model, torch.optim.SparseAdam(model.parameters()), rows(0, dist.get_rank()))


SPARSE_ADAM = refused("Optimizers", "SparseAdam", says="SparseAdam does not support dense gradients")


@SPARSE_ADAM
def test_sparse_adam_is_refused(pool: WorkerPool) -> None:
    for failure in pool.attempt(with_sparse_adam, world_size=2):
        SPARSE_ADAM.check(failure.message)


def with_lbfgs() -> None:
    model = build()
    mics_shard(model, MiCSConfig(shard_size=2, node_size=2))
    step(model, torch.optim.LBFGS(model.parameters()), rows(0, dist.get_rank()), closure=True)


LBFGS = refused("Optimizers", "LBFGS", says="LBFGS needs the whole gradient as one vector")


@LBFGS
def test_lbfgs_is_refused(pool: WorkerPool) -> None:
    for failure in pool.attempt(with_lbfgs, world_size=2):
        LBFGS.check(failure.message)
