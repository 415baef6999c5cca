"""Penalties on weights, hooks on gradients and clipping together, in the Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning_tools import BATCH, LanguageModel, Net, cross_entropy, dataset, loader, make_trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import MiCSStrategy
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BATCHES, LR, CLIP = 6, 0.1, 0.3


def whole(param: Tensor) -> Tensor:
    return param.full_tensor() if isinstance(param, DTensor) else param


def penalty(net: nn.Module) -> Tensor:
    """L1 of all weights, and what the last block's make of one another."""
    block = net.blocks[2]
    return (
        0.01 * sum(whole(param).abs().sum() for param in net.parameters())
        + (whole(block.up.weight) @ whole(block.down.weight)).pow(2).mean()
    )


def clamp(net: nn.Module) -> None:
    net.blocks[0].up.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))


class Penalised(LanguageModel):
    """Looks at its weights before the forward pass, and at its own output after the backward pass."""

    def on_fit_start(self) -> None:
        clamp(self.net)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        looked = penalty(self.net)
        self.kept = batch[0]
        return cross_entropy(self(batch[0]), batch[1]) + looked

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self(self.kept)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def train_alone(net: nn.Module, world_size: int, accumulate: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    rows = dataset(BATCHES, world_size).tensors
    clamp(net)
    for index in range(BATCHES):
        part = slice(index * world_size * BATCH, (index + 1) * world_size * BATCH)
        ((cross_entropy(net(rows[0][part]), rows[1][part]) + penalty(net)) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()


def compare() -> list[float]:
    found = []
    for shard_size, accumulate in ((2, 3), (4, 1)):
        pl.seed_everything(2, verbose=False)
        module, alone = Penalised(), Net()
        alone.load_state_dict(module.net.state_dict())
        trainer = make_trainer(
            strategy=MiCSStrategy(shard_size=shard_size, node_size=2, wrap=["Block"]),
            accumulate_grad_batches=accumulate,
            gradient_clip_val=CLIP,
        )
        trainer.fit(module, loader(BATCHES, dist.get_world_size()))
        train_alone(alone, dist.get_world_size(), accumulate)
        weights = {name.removeprefix("net."): value for name, value in full_state_dict(module).items()}
        found.append(max(weight_differences(weights, alone.state_dict()).values()))
    return found


def test_penalties_hooks_and_clipping_are_those_of_one_process(pool: WorkerPool) -> None:
    for differences in pool.run(compare, world_size=4, timeout=120):
        assert max(differences) <= 1e-5, differences
