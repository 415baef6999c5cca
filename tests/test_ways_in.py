"""A model that does at once what is easily lost, in every way in, beside one process that sees the global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from way_tools import WAYS, WIDTH, adamw, differences, sgd
from works import works

from lightning_mics.testing import WorkerPool

BOUND = 2e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.down(torch.tanh(self.up(rows)))


class Chooser(nn.Module):
    """Leaves its unit by a distribution, in which FSDP2 looks for no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 5)

    def forward(self, rows: Tensor) -> torch.distributions.Categorical:
        return torch.distributions.Categorical(logits=self.score(rows))


class Outcome:
    """An output of an own class."""

    def __init__(self, loss: Tensor) -> None:
        self._loss = loss

    def __getitem__(self, key: object) -> Tensor:
        return self._loss


class Everything(nn.Module):
    """Each call freezes or thaws, writes to weights, penalises shards, and takes gradients of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, WIDTH, max_norm=1.0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.chooser, self.last, self.average = Chooser(), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.scale, self.kept = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.randn(4))
        self.average.requires_grad_(False)
        self.calls = 0
        self.last.weight.register_hook(lambda grad: grad.clamp(-0.05, 0.05))
        self.scale.register_hook(lambda grad: grad / (grad.abs() + 1))

    @torch.no_grad()
    def _write(self) -> None:
        self.calls += 1
        self.blocks[1].up.weight.requires_grad_(self.calls % 3 != 0)
        self.last.bias.clamp_(-0.2, 0.2)
        self.last.weight.data.mul_(0.99)
        self.average.weight.lerp_(self.last.weight, 0.1)

    def _penalty(self) -> Tensor:
        weight = self.blocks[0].down.weight  # not gathered yet where it is a shard
        return (weight.full_tensor() if isinstance(weight, DTensor) else weight).abs().sum()

    def forward(self, rows: Tensor) -> Outcome:
        self._write()
        penalty = self._penalty()
        rows = rows.detach().requires_grad_()
        hidden = rows + self.words((rows.detach() * 3).long().abs() % 11).mean(1)
        for block in self.blocks:
            hidden = block(hidden)
        chosen = self.chooser(hidden).log_prob((rows.detach()[:, 0] > 0).long()).mean()
        loss = ((self.last(hidden) - self.average(hidden)) * self.scale + self.kept).square().mean() - chosen
        loss = loss + 0.01 * penalty
        if torch.is_grad_enabled():
            (forces,) = torch.autograd.grad(hidden.square().sum(), rows, create_graph=True)
            loss = loss + 0.01 * forces.square().mean()
        return Outcome(loss)


def trained(way: str, shard_size: int, accumulate: int) -> float:
    settings: dict[str, Any] = {"shard_size": shard_size, "node_size": 2, "wrap": [Block, Chooser], "ignore": "*kept"}
    optimize = adamw if shard_size == 1 else sgd
    return differences(Everything, way, {**settings, "verify_every": 1}, optimize=optimize, accumulate=accumulate)


SHAPES = ((4, 2, 3), (2, 1, 1))
OTHER_SHAPES = ((4, 4, 3), (4, 4, 1), (4, 2, 1), (4, 1, 3), (4, 1, 1), (2, 2, 3), (2, 2, 1), (2, 1, 3))


@works("Training loops", "Freezing, writes, penalties, hooks and distributions together, in every way in")
@pytest.mark.parametrize("shapes", [SHAPES, pytest.param(OTHER_SHAPES, marks=pytest.mark.campaign)], ids=["few", "all"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_easily_lost_counts_in_every_way(
    pool: WorkerPool, way: str, shapes: tuple[tuple[int, int, int], ...]
) -> None:
    for world_size, shard_size, accumulate in shapes:
        found = pool.run(trained, way, shard_size, accumulate, world_size=world_size, timeout=120)
        assert max(found) <= BOUND, (world_size, found)
