"""Gradients of parameters that are named: ``torch.autograd.grad(loss, params)``, ``loss.backward(inputs=params)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from works import refused, works

from lightning_mics import MiCSConfig, mics_shard
from lightning_mics.errors import MiCSError
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict


class Net(nn.Module):
    """Uneven shards, a scalar, a layer that only the first rank's rows reach, and a unit that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)) for _ in range(2))
        self.first, self.unused = nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 3))
        self.scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        marked = x[x.detach()[:, 0] > 50]
        return x[:, 1:].square().mean() * self.scale + (self.first(marked).square().sum() if len(marked) else 0.0)


def rows(rank: int, step: int) -> Tensor:
    made = torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * rank + step))
    made[0, 0] = 100.0 if rank == 0 else 0.0
    return made


Ask = Callable[[Any, Tensor], None]


def ask_grad(model: Net, loss: Tensor) -> None:
    params = list(model.parameters())
    for param, grad in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
        param.grad = grad


def ask_backward(model: Net, loss: Tensor) -> None:
    loss.backward(inputs=[model.scale, model.first.weight, *model.blocks[1].parameters()])


def ask_twice(model: Net, loss: Tensor) -> None:
    """Two losses of shared weights, one of them a penalty on the shards, weighed by the norms of their gradients."""
    weight = model.blocks[0][0].weight
    penalty = (weight.full_tensor() if isinstance(weight, DTensor) else weight).square().sum()
    (one,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    (two,) = torch.autograd.grad(penalty + loss, [weight])
    weight.grad = one / float(one.norm()) + two / float(two.norm())


def trained(model: Net, ask: Ask, batches: Callable[[int], list[Tensor]]) -> Net:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        losses = [model(batch) for batch in batches(step)]
        ask(model, torch.stack(losses).mean() if len(losses) > 1 else losses[0])
        optimizer.step()
        optimizer.zero_grad()
    return model


def named_inputs() -> str:
    rank, world = dist.get_rank(), dist.get_world_size()
    for ask, shard_sizes in ((ask_grad, (1, 2)), (ask_backward, (world,)), (ask_twice, (2,))):
        torch.manual_seed(0)
        alone = trained(Net(), ask, lambda step: [rows(other, step) for other in range(world)])
        for shard_size in shard_sizes:
            torch.manual_seed(0)
            model = mics_shard(Net(), MiCSConfig(shard_size=shard_size, node_size=2, wrap=nn.Sequential))
            trained(model, ask, lambda step: [rows(rank, step)])
            assert_parity(full_state_dict(model), alone.state_dict())
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(model(rows(rank, 0)), list(model.parameters()))
    with pytest.raises(MiCSError) as error:
        torch.autograd.grad(model(rows(rank, 0)), list(model.blocks.parameters()), create_graph=True)
    return str(error.value)


GRAPH = refused(
    "Training loops",
    "`torch.autograd.grad(loss, parameters, create_graph=True)` (MAML, IRM)",
    says="whose means over ranks have none",
)


@works("Training loops", "`torch.autograd.grad(loss, model.parameters())`")
@works("Training loops", "`loss.backward(inputs=...)` of some parameters")
@GRAPH
def test_named_parameters_get_the_gradients_of_one_process(pool: WorkerPool) -> None:
    for message in pool.run(named_inputs, world_size=4):
        GRAPH.check(message)
