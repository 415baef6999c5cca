"""What a user makes of the gradients before ``sync_gradients`` is what the replicas exchange."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard, sync_gradients
from lightning_mics.testing import WorkerPool

Edit = Callable[[nn.Linear], None]
Values = tuple[list[float] | None, list[float] | None]


def scale(model: nn.Linear) -> None:
    for param in model.parameters():
        param.grad.mul_(0.5)


def scale_shards(model: nn.Linear) -> None:
    for param in model.parameters():
        param.grad.to_local().mul_(0.5)


def replace(model: nn.Linear) -> None:
    for param in model.parameters():
        param.grad = param.grad * 2


def drop_weight(model: nn.Linear) -> None:
    model.weight.grad = None


def drop_weight_in_one_replica(model: nn.Linear) -> None:
    if dist.get_rank() >= 2:
        model.weight.grad = None


def values(grad: torch.Tensor | None) -> list[float] | None:
    """Returns the distinct values of a gradient."""
    return None if grad is None else grad.full_tensor().float().unique().tolist()


def edited_window(dtype: torch.dtype, edit: Edit, before_last: bool) -> Values:
    """Accumulates two microsteps, edits, and closes the window; returns the gradients of weight and bias.

    In a microstep the gradient of the weight is 1.5 in one replica and 3.5 in the other, the bias's 1 in both.
    """
    torch.manual_seed(0)
    config = MiCSConfig(shard_size=2, node_size=2, reduce_dtype="float32")
    model = mics_shard(nn.Linear(4, 4).to(dtype), config)
    batch = torch.full((1, 4), dist.get_rank() + 1.0, dtype=dtype)
    for index in range(2):
        if before_last and index == 1:
            edit(model)
        with defer_replication_sync(model):
            model(batch).sum().backward()
    if not before_last:
        edit(model)
    sync_gradients(model)
    return values(model.weight.grad), values(model.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("edit", "before_last", "expected"),
    [
        (scale, False, ([2.5], [1.0])),
        (scale, True, ([3.75], [1.5])),
        (scale_shards, False, ([2.5], [1.0])),
        (scale_shards, True, ([3.75], [1.5])),
        (replace, False, ([10.0], [4.0])),
        (replace, True, ([7.5], [3.0])),
        (drop_weight, False, (None, [2.0])),
        (drop_weight, True, ([2.5], [2.0])),
        (drop_weight_in_one_replica, False, ([1.5], [2.0])),
        (drop_weight_in_one_replica, True, ([3.25], [2.0])),
    ],
)
def test_edits_are_kept(pool: WorkerPool, dtype: torch.dtype, edit: Edit, before_last: bool, expected: Values) -> None:
    assert pool.run(edited_window, dtype, edit, before_last, world_size=4) == [expected] * 4


def replaced_twice() -> list[list[float] | None]:
    """Returns gradients of windows whose first microstep's, of 1, was replaced twice and written, which makes 8."""
    model = mics_shard(nn.Linear(64, 64, bias=False).bfloat16(), MiCSConfig(shard_size=2, reduce_dtype="float32"))
    batch, found = torch.ones(1, 64, dtype=torch.bfloat16), []
    for _ in range(20):
        with defer_replication_sync(model):
            model(batch).sum().backward()
        model.weight.grad = model.weight.grad * 2
        model.weight.grad = model.weight.grad * 2  # may get the memory of the first
        model.weight.grad.to_local().mul_(2)
        model(batch).sum().backward()
        found.append(values(model.weight.grad))
        model.zero_grad()
    return found


def test_a_gradient_in_the_place_of_an_earlier_one_is_another(pool: WorkerPool) -> None:
    assert pool.run(replaced_twice) == [[[9.0]] * 20] * 2
