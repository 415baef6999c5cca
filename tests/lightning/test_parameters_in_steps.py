"""Parameters that a ``training_step`` and hooks of a LightningModule write and freeze."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_tools import (
    BATCH,
    Block,
    LanguageModel,
    cross_entropy,
    dataset,
    loader,
    make_optimizer,
    make_scheduler,
    make_trainer,
)
from torch import Tensor, nn
from works import works

from lightning_mics import MiCSStrategy
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

BATCHES = 4


@torch.no_grad()
def in_step(net: nn.Module, index: int) -> None:
    net.embedding.weight.copy_(F.normalize(net.embedding.weight, dim=1))
    if index == 2:
        net.embedding.requires_grad_(False)
        net.blocks[1].up.requires_grad_(False)


@torch.no_grad()
def before_step(net: nn.Module) -> None:
    for param in net.parameters():
        param.clamp_(-0.4, 0.4)


@torch.no_grad()
def average(net: nn.Module, means: Sequence[Tensor]) -> list[Tensor]:
    return [mean * 0.9 + param for mean, param in zip(means or [0] * 99, net.parameters(), strict=False)]


class Writer(LanguageModel):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        in_step(self.net, batch_idx)
        return super().training_step(batch, batch_idx)

    means: tuple[Tensor, ...] | list[Tensor] = ()

    def on_before_zero_grad(self, optimizer: object) -> None:  # between forward and backward
        self.means = average(self.net, self.means)

    def on_before_optimizer_step(self, optimizer: object) -> None:
        before_step(self.net)


def alone(net: nn.Module) -> list[Tensor]:
    means: list[Tensor] = []
    optimizer = make_optimizer("sgd", net.parameters())
    scheduler = make_scheduler(optimizer)
    tokens, targets = dataset(BATCHES, dist.get_world_size()).tensors
    rows = BATCH * dist.get_world_size()
    for index in range(BATCHES):
        in_step(net, index)
        part = slice(index * rows, (index + 1) * rows)
        loss = cross_entropy(net(tokens[part]), targets[part])
        means = average(net, means)
        optimizer.zero_grad()
        loss.backward()
        before_step(net)
        optimizer.step()
        scheduler.step()
    return means


def _train() -> None:
    torch.manual_seed(0)
    expected = Writer().net
    means = alone(expected)
    for shard_size, reshard in ((2, True), (4, False)):
        torch.manual_seed(0)
        module = Writer()
        strategy = MiCSStrategy(shard_size=shard_size, node_size=4, wrap=Block, reshard_after_forward=reshard)
        make_trainer(strategy=strategy, max_epochs=1).fit(module, loader(BATCHES, dist.get_world_size()))
        assert_parity(full_state_dict(module.net), expected.state_dict())
        for mean, other in zip(module.means, means, strict=True):
            torch.testing.assert_close(mean.full_tensor(), other)


@works("Training loops", "Weights written or frozen in `training_step`, and in hooks of a LightningModule")
def test_what_steps_and_hooks_do_to_parameters_counts(pool: WorkerPool) -> None:
    pool.run(_train, world_size=4)
