"""Shards beside the model (averages of its weights) come back as shards, in every way in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from accelerate_tools import make_accelerator
from checkpoint_tools import PLAIN, equal
from lightning.fabric import Fabric
from lightning_tools import LanguageModel, Net, PoolEnvironment, cross_entropy, loader, make_optimizer, make_trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from works import works

from lightning_mics import MiCSConfig, MiCSStrategy, load_checkpoint, mics_shard, save_checkpoint
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import WorkerPool, full_state_dict


class Average(pl.Callback):
    """A running average of the weights, as one process would keep it."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.weights: dict[str, Tensor] = {}
        if model is not None:
            self.start(model)

    def start(self, model: nn.Module) -> None:
        self.weights = {name: param.detach().clone() for name, param in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, param in model.named_parameters():
            self.weights[name].mul_(0.5).add_(param.detach(), alpha=0.5)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.weights:
            self.start(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.update(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "both": (1, list(self.weights.values())[:2])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"]
        assert isinstance(state_dict["both"][1][0], DTensor)

    def whole(self) -> dict[str, Tensor]:
        assert all(isinstance(tensor, DTensor) for tensor in self.weights.values())
        return {name: tensor.full_tensor() for name, tensor in self.weights.items()}  # type: ignore[attr-defined]


def go_on(model: nn.Module, optimizer: Any, average: Average, backward: Any = Tensor.backward) -> None:
    tokens = torch.arange(10).view(2, 5) + dist.get_rank()
    for _ in range(2):
        backward(cross_entropy(model(tokens % 19), tokens % 19))
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)


def outcome(model: nn.Module, average: Average) -> dict[str, Tensor]:
    return {**full_state_dict(model), **{f"average {name}": value for name, value in average.whole().items()}}


def bare(path: str, sharded: bool, fresh: bool) -> tuple[Any, Any, Average]:
    torch.manual_seed(7 if fresh else 0)
    model = mics_shard(Net(), PLAIN)
    optimizer, average = make_optimizer("adamw", model.parameters()), Average(model)
    if fresh:
        average.load_state_dict(load_checkpoint(path, model, optimizer)["average"])
    else:
        go_on(model, optimizer, average)
        save_checkpoint(path, model, optimizer, {"average": average.state_dict()}, sharded=sharded)
    return model, optimizer, average


def fabric(path: str, sharded: bool, fresh: bool) -> tuple[Any, Any, Average]:
    strategy = FabricStrategy(shard_size=2, node_size=2, save_distributed_checkpoint=sharded)
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=[PoolEnvironment()])
    fabric.launch()
    torch.manual_seed(7 if fresh else 0)
    model = fabric.setup_module(Net())
    optimizer = fabric.setup_optimizers(make_optimizer("adamw", model.parameters()))
    average = Average(model)
    state = {"model": model, "optimizer": optimizer, "average": average, "raw": average.weights}
    if fresh:
        fabric.load(path, state)
        assert all(isinstance(tensor, DTensor) for tensor in state["raw"].values())
    else:
        go_on(model, optimizer, average)
        fabric.save(path, state)
    return model, optimizer, average


def accelerate(path: str, sharded: bool, fresh: bool) -> tuple[Any, Any, Average]:
    accelerator = make_accelerator(settings={"shard_size": 2, "node_size": 2})
    torch.manual_seed(7 if fresh else 0)
    model = accelerator.prepare(Net())
    optimizer = accelerator.prepare(make_optimizer("adamw", model.parameters()))
    average = Average(model)
    accelerator.register_for_checkpointing(average)
    if fresh:
        accelerator.load_state(path)
    else:
        go_on(model, optimizer, average)
        accelerator.save_state(path)
    return model, optimizer, average


def compare(folder: str) -> list[str]:
    """Returns in which ways resuming is not like going on."""
    wrong = []
    for way in (bare, fabric, accelerate):
        for sharded in (True, False)[: 1 if way is accelerate else 2]:
            path, ends = f"{folder}/{way.__name__}-{sharded}.ckpt", []
            for fresh in (False, True):
                model, optimizer, average = way(path, sharded, fresh)
                go_on(model, optimizer, average)
                ends.append(outcome(model, average))
            if not equal(ends[1], ends[0]):
                wrong.append(f"{way.__name__}, sharded={sharded}")
    return wrong


@works("Savers", "Averages of weights beside the model")
def test_averages_go_on_as_shards(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(compare, str(tmp_path), world_size=4) == [[]] * 4


def fit(folder: str, sharded: bool) -> bool:
    ends = []
    for epochs, path in ((1, None), (2, f"{folder}/{sharded}.ckpt"), (2, None)):
        torch.manual_seed(3)
        module, average = LanguageModel(), Average()
        strategy = MiCSStrategy(shard_size=2, node_size=2, save_distributed_checkpoint=sharded)
        trainer = make_trainer(strategy=strategy, max_epochs=epochs, callbacks=[average])
        trainer.fit(module, loader(2, dist.get_world_size()), ckpt_path=path)
        if epochs == 1:
            trainer.save_checkpoint(f"{folder}/{sharded}.ckpt")
        else:
            ends.append(outcome(module, average))
    return equal(ends[0], ends[1])


@pytest.mark.parametrize("sharded", [True, False])
def test_averages_of_callbacks_go_on(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    assert all(pool.run(fit, str(tmp_path), sharded, world_size=4))


@dataclass
class Kept:
    tensor: Tensor
    number: int


class Point(NamedTuple):
    first: Tensor
    second: Tensor


class Odd:
    def __init__(self, tensor: Tensor) -> None:
        self.inner = {"tensor": [tensor]}


def keep_in_objects(path: str) -> bool:
    model = mics_shard(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), MiCSConfig(shard_size=2))
    shard = model[0].weight.detach().clone()
    whole = shard.full_tensor()
    meta = {"kept": Kept(shard, 3), "point": Point(shard, torch.ones(2)), "odd": [Odd(shard)], "plain": (shard,)}
    save_checkpoint(path, model, meta=meta)
    assert meta["kept"].tensor is shard  # type: ignore[attr-defined]
    found = load_checkpoint(path, model, weights_only=False)
    inside = [found["kept"].tensor, found["point"].first, *found["odd"][0].inner["tensor"], found["plain"][0]]
    told = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in inside]
    return all(torch.equal(tensor, whole) for tensor in told) and found["kept"].number == 3


def test_shards_inside_of_objects_are_made_whole(pool: WorkerPool, tmp_path: Path) -> None:
    assert all(pool.run(keep_in_objects, str(tmp_path / "saved.ckpt"), world_size=2))
