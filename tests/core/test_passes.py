"""Forward passes through registered methods that call ``forward``, in evaluation, and after they raised."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Regressor, microbatch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core.runtime import is_sharded, register_forward_method, runtime_of
from lightning_mics.errors import MiCSError
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


class Fragile(Regressor):
    """Raises in the second block, in either pass, and remembers what it computed there."""

    fails_in = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.first(x))
        self.seen = weakref.ref(x)
        if self.fails_in == "forward":
            self.blocks[1](x)
            raise MemoryError("on purpose")
        x = self.blocks[1](x)
        if self.fails_in == "backward":
            x.register_hook(self.fail)
        return self.last(torch.tanh(self.narrow(x)))

    def step(self, x: Tensor) -> Tensor:
        return self(x).square().mean()

    def fail(self, grad: Tensor) -> None:
        raise MemoryError("on purpose")


def after_failure(place: str, by_method: bool) -> tuple[bool, int, bool]:
    """Returns what is alive when the error is handled: an activation, bytes of gathered parameters; and trains on."""
    model = mics_shard(Fragile(), MiCSConfig(shard_size=2, node_size=2, wrap="Block"))
    if by_method:
        register_forward_method(model, "step")
    run = model.step if by_method else lambda rows: model(rows).square().mean()
    rows = microbatch("uneven", dist.get_rank(), ROWS)
    run(rows).backward()
    gc.collect()
    gc.disable()
    model.fails_in = place
    with suppress(MemoryError):
        run(rows).backward()
    alive = model.seen() is not None
    gathered = [
        param._fsdp_param._unsharded_param for unit in runtime_of(model).window.units for param in unit.group.params
    ]
    left = sum(param.untyped_storage().size() for param in gathered)
    left += sum(param.grad.nbytes for param in gathered if param.grad is not None)
    gc.enable()
    model.fails_in = ""
    model.zero_grad()
    run(rows).backward()
    return alive, left, model.first.weight.grad is not None


@pytest.mark.parametrize("by_method", [False, True])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_failed_pass_leaves_no_memory_to_who_catches_its_error(pool: WorkerPool, place: str, by_method: bool) -> None:
    assert pool.run(after_failure, place, by_method, world_size=2) == [(False, 0, True)] * 2


def two_threads() -> tuple[str, bool]:
    """Calls the model from a second thread within a forward pass, and once between passes."""
    model = Regressor()
    block, told, inside = model.blocks[1], [], threading.Event()

    def call() -> None:
        try:
            model(microbatch("uneven", 0, ROWS))
            told.append("")
        except MiCSError as error:
            told.append(str(error))

    def call_beside(module: nn.Module, args: Any) -> None:
        if not inside.is_set():
            inside.set()
            thread = threading.Thread(target=call, name="another thread")
            thread.start()
            thread.join()

    mics_shard(model, MiCSConfig(shard_size=2, node_size=2, wrap="Block"))
    handle = block.register_forward_pre_hook(call_beside)
    model(microbatch("uneven", 0, ROWS)).sum().backward()
    handle.remove()
    has_gradient = model.first.weight.grad is not None
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return told[0], told[1:] == [""] and has_gradient


def test_a_second_thread_is_no_failed_pass(pool: WorkerPool) -> None:
    for message, goes_on in pool.run(two_threads, world_size=2):
        assert "another thread called the model while MainThread runs a forward pass" in message
        assert goes_on
