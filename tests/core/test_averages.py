"""Averages of weights on shards: PyTorch's, Lightning's callbacks, timm's kind; swapped in, saved and resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning_tools import make_trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler
from works import refused, works

from lightning_mics import (
    MiCSConfig,
    MiCSStrategy,
    exchanged_weights,
    load_checkpoint,
    mics_shard,
    save_checkpoint,
)
from lightning_mics.testing import WorkerPool, full_state_dict

BOUND = 1e-6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 9), nn.Linear(9, 4), nn.LayerNorm(4)
        self.tied = nn.Linear(9, 4)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(1.1))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, rows: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(rows))
        if self.training:
            self.seen += 1
        out: Tensor = self.norm(self.second(hidden) + self.tied(hidden)) * self.scale
        return out


class TimmLike:
    """As timm's ``ModelEmaV2``: over ``state_dict``."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model)
        self.module.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for mean, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mean.copy_(0.9 * mean + 0.1 * value)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": AveragedModel,
    "AveragedModel, EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "timm's ModelEmaV2": TimmLike,
}


def rows_of(step: int, rank: int | None, world: int) -> Tensor:
    rows = torch.randn(2 * world, 6, generator=torch.Generator().manual_seed(step))
    return rows if rank is None else rows[2 * rank : 2 * rank + 2]


def train(model: nn.Module, average: Any, steps: range, rank: int | None, world: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        model(rows_of(step, rank, world)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return optimizer


def differs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def in_a_loop(name: str, p: int, path: str, q: Any = "partition") -> dict[str, float]:
    """Returns how far averages, and what a model computes with them, are from those of one process."""
    torch.manual_seed(0)
    alone, rank, world = Net(), dist.get_rank(), dist.get_world_size()
    model = mics_shard(copy.deepcopy(alone), MiCSConfig(shard_size=p, node_size=2, optimizer_shard_size=q))
    average, expected = AVERAGES[name](model), AVERAGES[name](alone)
    optimizer = train(model, average, range(3), rank, world)
    train(alone, expected, range(3), None, world)
    shards = sum(param.to_local().nbytes for param in average.module.parameters() if isinstance(param, DTensor))
    assert shards == sum(param.to_local().nbytes for param in model.parameters() if isinstance(param, DTensor))
    found = {"average": differs(full_state_dict(average.module), expected.module.state_dict())}
    own = full_state_dict(model)
    with exchanged_weights(model, average), torch.no_grad():
        inputs = rows_of(9, None, world)
        model.eval()
        found["output"] = float((model(inputs) - expected.module.eval()(inputs)).abs().max())
        model.train()
    found["own weights"] = differs(full_state_dict(model), own)
    save_checkpoint(path, model, optimizer, {"average": average.module.state_dict()})
    other = mics_shard(Net(), MiCSConfig(shard_size=4, node_size=4))
    resumed = AVERAGES[name](other)
    meta = load_checkpoint(path, other, torch.optim.SGD(other.parameters(), lr=0.1))
    resumed.module.load_state_dict(meta["average"])
    found["resumed"] = differs(full_state_dict(resumed.module), expected.module.state_dict())
    return found


@works("Training loops", "Averages of weights on shards: `AveragedModel`, EMA, and timm's kind, resumed at any size")
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_shards_are_those_of_one_process(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    for found in pool.run(in_a_loop, name, 2, str(tmp_path / "saved"), world_size=4):
        assert max(found.values()) <= BOUND, found


def test_averages_see_what_other_ranks_have_stepped_on(pool: WorkerPool, tmp_path: Path) -> None:
    for found in pool.run(in_a_loop, "AveragedModel, EMA", 2, str(tmp_path / "saved"), "world", world_size=4):
        assert max(found.values()) <= BOUND, found


# Lightning's callbacks.


class Lit(pl.LightningModule):
    """Trains on the rows of all ranks where ``rank`` is ``None``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.validated.append(float(self.net(batch).square().mean()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.9),
    "WeightAveraging": WeightAveraging,
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
}


QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(name: str, p: int | None, folder: str, path: str | None = None) -> tuple[Lit, dict[str, Tensor]]:
    """Trains three epochs, on this rank's rows or, with ``p=None``, in one process; leaves a checkpoint of each."""
    world, model = dist.get_world_size(), Lit()
    data: Any = [row for step in range(3) for row in rows_of(step, None, world)]
    sampler = None if p is None else DistributedSampler(data, shuffle=False)
    loader: Any = DataLoader(data, batch_size=2 * world if p is None else 2, sampler=sampler)
    kept = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    settings: dict[str, Any] = {"callbacks": [CALLBACKS[name](), kept], "max_epochs": 3, "enable_checkpointing": True}
    if p is None:
        trainer = pl.Trainer(**settings, **QUIET, accelerator="cpu", devices=1)
    else:
        trainer = make_trainer(**settings, strategy=MiCSStrategy(shard_size=p, node_size=2))
    trainer.fit(model, loader, DataLoader(data, batch_size=len(data)), ckpt_path=path)
    return model, full_state_dict(model)


def validated(model: Lit) -> Tensor:
    """Returns the losses of validations, each rank's on its share of the rows, as means over all."""
    losses = torch.tensor(model.validated)
    dist.all_reduce(losses, op=dist.ReduceOp.AVG)
    return losses


def by_a_callback(name: str, folder: str) -> dict[str, float]:
    """Returns how far weights, and losses of validation, are from those of one process, also after a resume."""
    alone, expected = fit(name, None, f"{folder}/{dist.get_rank()}")
    model, weights = fit(name, 2, f"{folder}/ours")
    resumed, after = fit(name, 4, f"{folder}/resumed", f"{folder}/ours/epoch=1.ckpt")
    losses = torch.tensor(alone.validated)
    return {
        "weights": differs(weights, expected),
        "losses": float((validated(model) - losses).abs().max()),
        "resumed weights": differs(after, expected),
        "resumed losses": float((validated(resumed)[-1] - losses[-1]).abs()),
    }


@works("Training loops", "`EMAWeightAveraging`, `WeightAveraging`, `StochasticWeightAveraging`, resumed at any size")
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_average_shards(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    for found in pool.run(by_a_callback, name, str(tmp_path), world_size=4, timeout=180):
        assert max(found.values()) <= BOUND, found


# What is refused.


def compute_with_a_copy() -> None:
    model = mics_shard(Net(), MiCSConfig(shard_size=2))
    copy.deepcopy(model)(torch.ones(2, 6))


def average_another() -> None:
    model = mics_shard(Net(), MiCSConfig(shard_size=2))
    with exchanged_weights(model, AveragedModel(Net())):
        pass


def average_16_bits() -> None:
    settings: dict[str, Any] = {"optimizer_shard_size": "world", "param_dtype": "bfloat16", "master_weights": "owners"}
    copy.deepcopy(mics_shard(Net(), MiCSConfig(shard_size=1, node_size=1, **settings)))


def copy_parts() -> None:
    model = mics_shard(Net(), MiCSConfig(shard_size=2, wrap=nn.Linear))
    for copied in (copy.deepcopy(nn.ModuleList([model]))[0], copy.deepcopy(copy.deepcopy(model))):
        assert (
            same_shards(copied, model)
            and type(copied.first) is nn.Linear
            and copied.tied.weight is copied.second.weight
        )
    assert same_shards(copy.deepcopy(model.first), model.first)


def same_shards(copied: nn.Module, model: nn.Module) -> bool:
    pairs = zip(copied.state_dict().items(), model.state_dict().items(), strict=True)
    return all(name == other and torch.equal(local(a), local(b)) and a is not b for (name, a), (other, b) in pairs)


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def test_parts_and_copies_are_copied(pool: WorkerPool) -> None:
    pool.run(copy_parts, world_size=2)


COMPUTING = refused("Training loops", "A pass of a copy of a sharded model", says="so it cannot compute")


@COMPUTING
def test_copies_do_not_compute(pool: WorkerPool) -> None:
    for failure in pool.attempt(compute_with_a_copy, world_size=2):
        COMPUTING.check(failure.message)


ROUNDED = refused(
    "Training loops", "Averages of weights, with `master_weights='owners'`", says="an average of them would be one of"
)


@ROUNDED
def test_what_is_no_average_of_the_shards_is_refused(pool: WorkerPool) -> None:
    for failure in pool.attempt(average_another, world_size=2):
        assert "one of a model that was not sharded" in failure.message
    for failure in pool.attempt(average_16_bits, world_size=2):
        ROUNDED.check(failure.message)
