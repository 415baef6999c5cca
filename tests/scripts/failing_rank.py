"""Trains on four ranks, one of which fails in the third step: ``failing_rank.py WAY PLACE RANK``."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WAY, PLACE, FAILING = sys.argv[1], sys.argv[2], int(sys.argv[3])
SETTINGS: dict[str, Any] = {"shard_size": 2, "node_size": 2}
step = 0


def fail_in(place: str) -> None:
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    if step == 2 and place == PLACE and rank == FAILING:
        print("RAISED", time.time(), file=sys.stderr, flush=True)
        raise ValueError(f"rank {rank} failed in {place}")


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        fail_in("backward")
        return grad


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = FailingBackward.apply(self.first(x))
        fail_in("forward")
        return self.last(x)


class Optimizer(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        fail_in("optimizer")
        super().step()
        return loss


class Rows(Dataset[Tensor]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Tensor:
        fail_in("loader")
        return torch.randn(8)


def bare() -> None:
    global step
    from lightning_mics import MiCSConfig, mics_shard

    dist.init_process_group("gloo")
    model = mics_shard(Net(), MiCSConfig(**SETTINGS), device_type="cpu")
    optimizer = Optimizer(model.parameters(), 0.1)
    for batch in DataLoader(Rows(), batch_size=2):
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def accelerate() -> None:
    global step
    from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin

    accelerator, model = MiCSAccelerator(mics_plugin=MiCSPlugin(**SETTINGS)), Net()
    model, optimizer, loader = accelerator.prepare(
        model, Optimizer(model.parameters(), 0.1), DataLoader(Rows(), batch_size=2)
    )
    for batch in loader:
        accelerator.backward(model(batch).sum())
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def lightning() -> None:
    import lightning.pytorch as pl

    from lightning_mics import MiCSStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Optimizer(self.parameters(), 0.1)

    class Steps(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            global step
            fail_in("callback")
            step += 1

    trainer = pl.Trainer(
        accelerator="cpu", devices=4, strategy=MiCSStrategy(**SETTINGS), callbacks=[Steps()], max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(Rows(), batch_size=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"bare": bare, "accelerate": accelerate, "lightning": lightning}[WAY]()
