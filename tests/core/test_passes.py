"""Forward passes through registered methods that call ``forward``, in evaluation, and after they raised."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from models import Regressor, microbatch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core.runtime import is_sharded, register_forward_method, runtime_of
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

ROWS = 8
REGISTRATIONS = {"ours": register_forward_method, "PyTorch's": register_fsdp_forward_method}


class Steps(Regressor):
    """A step that calls ``forward`` and needs the root's own parameters once more behind it."""

    def step(self, rows: Tensor, fails: bool = False) -> Tensor:
        output = self(rows)
        if fails:
            raise ValueError("on purpose")
        return (output + self.last.bias).square().mean()


def train(model: nn.Module, mine: Callable[[int], Tensor], *, with_failures: bool) -> None:
    """Trains for three windows of two microsteps, with an evaluation before each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for window in range(3):
        with torch.no_grad():
            model.step(mine(10 + window))
        for index in range(2):
            if with_failures:
                with pytest.raises(ValueError, match="on purpose"):
                    model.step(mine(20), fails=True)
            with defer_replication_sync(model) if is_sharded(model) and index == 0 else nullcontext():
                (model.step(mine(2 * window + index)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_methods(
    register: Callable[[nn.Module, str], None], with_failures: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Returns the weights of sharded and of plain training, and how many calls are taken for running at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    alone, model = Steps(), Steps()
    model.load_state_dict(alone.state_dict())
    mics_shard(model, MiCSConfig(shard_size=2, node_size=2))
    register(model, "step")
    train(model, lambda step: microbatch("uneven", step, ROWS).chunk(world)[rank], with_failures=with_failures)
    train(alone, lambda step: microbatch("uneven", step, ROWS), with_failures=False)
    return full_state_dict(model), alone.state_dict(), len(runtime_of(model).passes._running)


@pytest.mark.parametrize("with_failures", [False, True], ids=["", "failures"])
@pytest.mark.parametrize("register", REGISTRATIONS.values(), ids=REGISTRATIONS.keys())
def test_methods_that_call_forward_train_like_one_process(
    pool: WorkerPool, register: Callable[[nn.Module, str], None], with_failures: bool
) -> None:
    for actual, expected, num_running in pool.run(through_methods, register, with_failures, world_size=4):
        assert_parity(actual, expected)
        assert num_running == 0
