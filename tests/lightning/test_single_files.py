"""Files of one state, and of no model, with Fabric; folders in ``load_from_checkpoint``; double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning_tools import LanguageModel, Net, cross_entropy, loader, make_trainer, train_alone, where
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from works import works

from lightning_mics import CheckpointError, MiCSStrategy
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict


def make_fabric(shard_size: int, **settings: Any) -> Fabric:
    fabric = Fabric(**{**where(), "strategy": FabricStrategy(shard_size=shard_size), **settings})
    fabric.launch()
    return fabric


def net_of(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def tokens_of(rank: int) -> Tensor:
    return (torch.arange(10).view(2, 5) + 3 * rank) % 19


def step(net: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor, backward: Any = Tensor.backward) -> None:
    backward(cross_entropy(net(rows), rows))
    optimizer.step()
    optimizer.zero_grad()


def load_raw_files(folder: str) -> None:
    """Continues in shards what one process began, from its raw files."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for shard_size in {1, 2, world_size}:
        alone = net_of(1)
        inner = torch.optim.AdamW(alone.parameters(), lr=1e-2, eps=1e-3)
        everything = torch.cat([tokens_of(other) for other in range(world_size)])
        step(alone, inner, everything)
        fabric = make_fabric(shard_size)
        if fabric.is_global_zero:
            torch.save(alone.state_dict(), f"{folder}/model.pth")
            torch.save({f"net.{name}": value for name, value in alone.state_dict().items()}, f"{folder}/prefix.pth")
            torch.save(alone.state_dict(), f"{folder}/old.bin", _use_new_zipfile_serialization=False)
            torch.save(inner.state_dict(), f"{folder}/optimizer.pth")
            torch.save({"model": alone.state_dict()}, f"{folder}/nested.pth")
            torch.save({**alone.state_dict(), "more": torch.ones(1)}, f"{folder}/more.pth")
        fabric.barrier()
        for file in ("model.pth", "prefix.pth", "old.bin"):
            net = net_of(2)
            model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3))
            fabric.load_raw(f"{folder}/{file}", model)
            assert_parity(full_state_dict(net), alone.state_dict())
        fabric.load_raw(f"{folder}/optimizer.pth", optimizer)
        for wrong, words in (
            ("nested", "with entries such as 'model'"),
            ("more", "Unknown to the model"),
            ("no", "no"),
        ):
            with pytest.raises(CheckpointError, match=words):
                fabric.load_raw(f"{folder}/{wrong}.pth", model)
        fabric.load_raw(f"{folder}/more.pth", model, strict=False)
        fabric.load_raw(f"{folder}/model.pth", plain := net_of(2))  # what was not set up is filled as it is
        assert_parity(plain.state_dict(), alone.state_dict())
        fabric.barrier()
        step(alone, inner, everything)
        step(model, optimizer, tokens_of(rank), fabric.backward)
        assert_parity(full_state_dict(net), alone.state_dict())


@works("Scripts", "fabric.load_raw(path, model), as in litgpt's continued pre-training")
@pytest.mark.parametrize("world_size", [2, 4])
def test_raw_files_go_into_shards(pool: WorkerPool, tmp_path: Path, world_size: int) -> None:
    pool.run(load_raw_files, str(tmp_path), world_size=world_size)


def save_without_a_model(folder: str) -> None:
    fabric, net, plain = make_fabric(2), net_of(1), nn.Linear(2, 2)
    fabric.setup(net)
    inner = torch.optim.SGD(plain.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)
    inner.step()
    scheduler.step()
    averages = {name: value.detach().clone() for name, value in net.state_dict().items()}
    assert all(isinstance(value, DTensor) for value in averages.values())
    state = {
        "step": 7,
        "scheduler": scheduler,
        "plain": plain,
        "averages": averages,
        "pair": [averages["embedding.weight"]],
    }
    fabric.save(f"{folder}/rest.pt", state)
    loaded = fabric.load(f"{folder}/rest.pt")
    assert loaded["step"] == 7 and loaded["scheduler"]["last_epoch"] == 1
    assert_parity(loaded["averages"], full_state_dict(net))
    assert torch.equal(loaded["pair"][0], loaded["averages"]["embedding.weight"])
    other = {"step": 0, "plain": nn.Linear(2, 2)}
    assert set(fabric.load(f"{folder}/rest.pt", other)) == {"scheduler", "averages", "pair"}
    assert other["step"] == 7 and torch.equal(other["plain"].weight, _of_rank_0(plain.weight))
    # Weights alone are a file that anything reads, as without MiCS.
    fabric.save(f"{folder}/weights.pt", net.state_dict())
    net_of(2).load_state_dict(torch.load(f"{folder}/weights.pt", weights_only=True))
    again = net_of(2)
    fabric.load_raw(f"{folder}/weights.pt", fabric.setup(again))
    assert_parity(full_state_dict(again), full_state_dict(net))
    # Beside a model, too.
    fabric.save(f"{folder}/folder", {"model": net, "averages": averages})
    state = {"model": net, "averages": None}
    fabric.load(f"{folder}/folder", state)
    assert_parity({name: value.full_tensor() for name, value in state["averages"].items()}, full_state_dict(net))
    step_only = {"averages": None}
    fabric.load(f"{folder}/folder", step_only)
    assert_parity(step_only["averages"], full_state_dict(net))
    with pytest.raises(CheckpointError, match="All ranks must save the same entries"):
        fabric.save(f"{folder}/uneven.pt", {"averages": averages if fabric.is_global_zero else {}})


def _of_rank_0(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    dist.broadcast(tensor, 0)
    return tensor


@works("Savers", "Fabric.save without a model")
def test_a_state_without_a_model_is_saved(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(save_without_a_model, str(tmp_path), world_size=4)


class Sized(pl.LightningModule):
    """A module that needs its hyperparameters, and keeps states that are no parameters."""

    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        return self.layers(torch.ones(2, self.hparams["width"])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def train_and_save(folder: str, shard_size: int) -> dict[str, Tensor]:
    module = Sized(6, depth=3)
    trainer = make_trainer(strategy=MiCSStrategy(shard_size=shard_size), max_steps=2)
    trainer.fit(module, loader(2, dist.get_world_size()))
    trainer.save_checkpoint(f"{folder}/saved.ckpt")
    again = Sized.load_from_checkpoint(f"{folder}/saved.ckpt")  # also while a group is up
    assert_parity(again.state_dict(), full_state_dict(module))
    return full_state_dict(module)


@works("Savers", "load_from_checkpoint of a sharded folder")
@pytest.mark.parametrize(("world_size", "shard_size"), [(2, 1), (4, 2), (4, 4)])
def test_a_module_is_made_of_a_folder(pool: WorkerPool, tmp_path: Path, world_size: int, shard_size: int) -> None:
    saved = pool.run(train_and_save, str(tmp_path), shard_size, world_size=world_size)[0]
    module = Sized.load_from_checkpoint(tmp_path / "saved.ckpt", map_location="cpu")
    assert module.hparams == {"width": 6, "depth": 3} and module.seen == 2
    assert_parity(module.state_dict(), saved)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Sized.load_from_checkpoint(str(tmp_path / "saved.ckpt"), width=5)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        Sized.load_from_checkpoint(tmp_path)


def train_in_doubles(accumulate: int) -> None:
    world_size = dist.get_world_size()
    for shard_size in {1, 2, world_size}:
        module, alone = LanguageModel(), LanguageModel().double()
        alone.load_state_dict(module.state_dict())
        make_trainer(
            strategy=MiCSStrategy(shard_size=shard_size), precision="64-true", accumulate_grad_batches=accumulate
        ).fit(module, loader(3, world_size))
        train_alone(alone.net, 3, world_size, accumulate=accumulate)
        assert_parity(full_state_dict(module), alone.state_dict(), tolerance=1e-13)

        fabric, net, alone_net = make_fabric(shard_size, precision="64-true"), net_of(1), net_of(1).double()
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        step(model, optimizer, tokens_of(dist.get_rank()), fabric.backward)
        rows = torch.cat([tokens_of(other) for other in range(world_size)])
        step(alone_net, torch.optim.SGD(alone_net.parameters(), lr=0.1), rows)
        assert all(value.dtype == torch.float64 for value in full_state_dict(net).values())
        assert_parity(full_state_dict(net), alone_net.state_dict(), tolerance=1e-6)  # Fabric gives outputs in float32


@works("Training loops", "Double precision (64-true), Trainer and Fabric")
@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 3)])
def test_double_precision_is_kept_all_the_way(pool: WorkerPool, world_size: int, accumulate: int) -> None:
    pool.run(train_in_doubles, accumulate, world_size=world_size)
