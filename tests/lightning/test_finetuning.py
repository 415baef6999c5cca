"""Lightning's BaseFinetuning: units that are frozen first and thawed while training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning
from lightning_tools import BATCH, LanguageModel, Net, cross_entropy, dataset, loader, make_trainer
from torch import nn
from works import works

from lightning_mics import MiCSStrategy
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BATCHES, EPOCHS, LR = 2, 3, 0.1


class Thaw(BaseFinetuning):
    """Trains the embedding alone in the first epoch, and the blocks from the second one on."""

    def freeze_before_training(self, module: pl.LightningModule) -> None:
        self.freeze(module.net.blocks)

    def finetune_function(self, module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.blocks, optimizer, lr=LR, initial_denom_lr=1.0)


class FineTuned(LanguageModel):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=LR)


def train_alone(net: nn.Module, world_size: int) -> None:
    rows = dataset(BATCHES, world_size).tensors
    for epoch in range(EPOCHS):
        params = [param for name, param in net.named_parameters() if epoch or "blocks" not in name]
        for index in range(BATCHES):
            part = slice(index * world_size * BATCH, (index + 1) * world_size * BATCH)
            grads = torch.autograd.grad(cross_entropy(net(rows[0][part]), rows[1][part]), params)
            with torch.no_grad():
                for param, grad in zip(params, grads, strict=True):
                    param -= LR * grad


def fine_tune(precision: Any) -> float:
    """Returns how far weights are from those of one process."""
    torch.manual_seed(3)
    module, alone = FineTuned(), Net()
    alone.load_state_dict(module.net.state_dict())
    strategy = MiCSStrategy(shard_size=2, node_size=2, wrap=["Block"])
    trainer = make_trainer(strategy=strategy, precision=precision, callbacks=[Thaw()], max_epochs=EPOCHS)
    trainer.fit(module, loader(BATCHES, dist.get_world_size()))
    train_alone(alone, dist.get_world_size())
    weights = {name.removeprefix("net."): value for name, value in full_state_dict(module).items()}
    return max(weight_differences(weights, alone.state_dict()).values())


@works("Training loops", "BaseFinetuning, also in bf16-mixed")
@pytest.mark.parametrize("precision, bound", [("32-true", 1e-5), ("bf16-mixed", 0.02)])
def test_units_that_a_callback_thaws_are_trained(pool: WorkerPool, precision: str, bound: float) -> None:
    assert max(pool.run(fine_tune, precision, world_size=4)) <= bound
