"""Batch norms, whose running statistics differ between ranks until a run evaluates or saves: beside DDP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from accelerate_tools import make_accelerator
from lightning.fabric import Fabric
from lightning_tools import make_trainer, where
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from works import works

from lightning_mics import (
    MiCSConfig,
    MiCSError,
    MiCSStrategy,
    broadcast_buffers,
    defer_replication_sync,
    load_checkpoint,
    mics_shard,
    save_checkpoint,
)
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

STEPS = 3


class Averages(nn.Module):
    """Statistics of a user's own: kept in the state, whatever their names; and a cache of any shape, which is not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
            self.cache = torch.ones(1 + dist.get_rank())
        return x - self.mean


def build() -> nn.Module:
    torch.manual_seed(2)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(*blocks, Averages(), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 1))


def rows(index: int) -> Tensor:
    torch.manual_seed(100 * index + dist.get_rank())
    return torch.randn(4, 6) + dist.get_rank()


def beside_ddp(accumulate: int) -> tuple[dict[str, Tensor], Tensor]:
    """Returns what rank 0 would save with DDP, and what that predicts for the first rows of this rank."""
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        for index in range(accumulate):
            loss = model(rows(step * accumulate + index)).square().mean() / accumulate
            if index + 1 < accumulate:
                with model.no_sync():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = [model.module.state_dict()]
    dist.broadcast_object_list(saved)
    alone = build().eval()
    alone.load_state_dict(saved[0])
    return saved[0], alone(rows(0)).detach()


def train(model: Any, optimizer: Any, accumulate: int, backward: Any = Tensor.backward) -> None:
    for step in range(STEPS):
        for index in range(accumulate):
            with defer_replication_sync(model, index + 1 < accumulate):
                backward(model(rows(step * accumulate + index)).square().mean() / accumulate)
        optimizer.step()
        optimizer.zero_grad()


def differ(model: nn.Module) -> bool:
    mine = torch.cat([buffer.flatten().double() for name, buffer in sorted(model.named_buffers()) if "mean" in name])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    return any(not torch.equal(other, mine) for other in others)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build()
        self.seen: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(rows(batch_idx)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(differ(self.net))
        self.predicted = self.net(rows(0))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(differ(self.net))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def agree_in_every_way(folder: str, accumulate: int) -> None:
    world_size = dist.get_world_size()
    expected, predicted = beside_ddp(accumulate)
    for shard_size in sorted({1, 2, world_size}):
        path = f"{folder}/{shard_size}"
        net = mics_shard(build(), MiCSConfig(shard_size=shard_size))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        train(net, optimizer, accumulate)
        assert differ(net)
        broadcast_buffers(net)
        assert not differ(net) and net[2].cache.shape == (1 + dist.get_rank(),)
        assert_parity(full_state_dict(net), expected)
        torch.testing.assert_close(net.eval()(rows(0)), predicted, rtol=1e-5, atol=1e-6)
        net.train()(rows(1))
        save_checkpoint(f"{path}.bare", net, optimizer)
        assert not differ(net)
        kept = copy.deepcopy({name: buffer for name, buffer in net.named_buffers()})
        net(rows(2))
        load_checkpoint(f"{path}.bare", net)
        assert all(torch.equal(buffer, kept[name]) for name, buffer in net.named_buffers() if "cache" not in name)

        fabric = Fabric(**where(), strategy=FabricStrategy(shard_size=shard_size))
        fabric.launch()
        net = build()
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        train(model, optimizer, accumulate, fabric.backward)
        assert differ(net)
        fabric.save(f"{path}.fabric", {"model": model})
        assert not differ(net)
        assert_parity(full_state_dict(net), expected)

        accelerator = make_accelerator(settings={"shard_size": shard_size})
        net = build()
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        train(model, optimizer, accumulate, accelerator.backward)
        assert differ(net)
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            assert_parity(weights, expected)
        accelerator.save_state(f"{path}.accelerate")
        assert not differ(net)
        assert_parity(full_state_dict(net), expected)

        module, data = Module(), DataLoader(TensorDataset(torch.zeros(world_size * STEPS * accumulate, 1)))
        trainer = make_trainer(
            strategy=MiCSStrategy(shard_size=shard_size),
            accumulate_grad_batches=accumulate,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, data, data)
        assert_parity(full_state_dict(module.net), expected)
        torch.testing.assert_close(module.predicted, predicted, rtol=1e-5, atol=1e-6)
        trainer.test(module, data, verbose=False)
        trainer.predict(module, data)
        assert module.seen and not any(module.seen)
        trainer.save_checkpoint(f"{path}.trainer")


@works("Model kinds", "BatchNorm")
@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 3), (4, 1)])
def test_buffers_are_those_of_ddp_where_a_run_evaluates_and_saves(
    pool: WorkerPool, tmp_path: Path, world_size: int, accumulate: int
) -> None:
    pool.run(agree_in_every_way, str(tmp_path), accumulate, world_size=world_size)


def broadcast_without_sharding() -> None:
    with pytest.raises(MiCSError, match="not sharded"):
        broadcast_buffers(build())


def test_a_plain_model_is_refused(pool: WorkerPool) -> None:
    pool.run(broadcast_without_sharding, world_size=1)
