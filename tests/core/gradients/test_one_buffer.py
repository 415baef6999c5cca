"""Where the gradients of a unit lie in one buffer, a microstep is added to them in one operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core import transport
from lightning_mics.core._torch import UnitParamGroup
from lightning_mics.testing import WorkerPool

Edit = Callable[[nn.Module], object]


class Uneven(nn.Module):
    """Two units and a root; no size divides by the partition's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return self.head(inputs)


def scale(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad.mul_(0.5)


def replace(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = param.grad * 2


def swap_two(model: Any) -> None:
    first, second = model.blocks[0][0].weight, model.blocks[0][2].weight
    first.grad, second.grad = second.grad, first.grad


def freeze(model: Any) -> None:
    model.blocks[0][0].weight.requires_grad_(False)


def nothing(model: nn.Module) -> None:
    pass


# How many of the six reductions that a window has after its first microstep go into one buffer.
EDITS: dict[Edit, int] = {
    nothing: 6,
    scale: 6,
    replace: 0,
    swap_two: 4,
    freeze: 4,
}


def train(edit: Edit, dtype: torch.dtype, in_one: bool) -> tuple[list[Tensor], int]:
    """Trains two windows of three microsteps; returns the weights, and how many reductions went into one buffer."""
    torch.manual_seed(0)
    calls, original = [], UnitParamGroup.reduce_into

    def counted(group: UnitParamGroup, sums: Tensor, reduce_scatter: Callable[[], None]) -> None:
        calls.append(sums.numel())
        original(group, sums, reduce_scatter)

    with contextlib.ExitStack() as stack:
        carrier = transport.DeviceTransport()
        stack.enter_context(mock.patch.object(transport, "transport_for", lambda *args, **kwargs: carrier))
        stack.enter_context(mock.patch.object(UnitParamGroup, "reduce_into", counted))
        if not in_one:
            stack.enter_context(mock.patch.object(UnitParamGroup, "can_reduce_into", lambda group, dtype: False))
        config = MiCSConfig(shard_size=2, node_size=2, wrap=["Sequential"], verify=False)
        model = mics_shard(Uneven().to(dtype), config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for window in range(2):
            for index in range(3):
                with defer_replication_sync(model, enabled=index < 2):
                    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(dist.get_rank() + 4 * index))
                    model(inputs.to(dtype)).square().sum().backward()
                if index == 0 and window == 0:
                    edit(model)
            optimizer.step()
            optimizer.zero_grad()
        return [param.full_tensor().detach() for param in model.parameters()], len(calls)


def compare() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for edit, expected in EDITS.items():
            apart, none = train(edit, dtype, in_one=False)
            together, count = train(edit, dtype, in_one=True)
            assert none == 0
            again = expected if edit is freeze else 6  # what else is edited is the first window
            assert count == expected + again if dtype is torch.float32 else count > 0, (edit, dtype, count)
            for one, other in zip(apart, together, strict=True):
                # Sums of 16-bit gradients take up what was reduced before it is rounded.
                tolerance = 0.0 if dtype is torch.float32 else 0.02
                torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, msg=f"{edit}, {dtype}")


def test_a_microstep_is_added_at_once(pool: WorkerPool) -> None:
    pool.run(compare, world_size=2)
