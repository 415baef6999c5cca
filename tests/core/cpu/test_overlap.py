"""On CPUs communication runs beside computation: what starts when, and that nothing stale or unfinished is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Regressor, build, microbatch, regression_loss
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from lightning_mics import Hop, MiCSConfig, communication_ledger, defer_replication_sync, mics_shard
from lightning_mics.core.runtime import runtime_of
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

ROWS = 8
CONFIG = MiCSConfig(shard_size=2, node_size=2)


def rows(step: int) -> Tensor:
    return microbatch("uneven", step, ROWS).chunk(dist.get_world_size())[dist.get_rank()]


def gathers_during_blocks() -> list[tuple[str, int]]:
    """Returns, at the beginning and end of each block's computation, how many gathers were started."""
    model = mics_shard(build("uneven"), CONFIG)
    regression_loss(model, rows(0)).backward()
    ledger, log = communication_ledger(model), []

    def note(what: str) -> None:
        log.append((what, ledger.total(Hop.PARTITION_GATHER).calls))

    ledger.reset()
    for name, block in model.blocks.named_children():
        inner = next(block.children())
        inner.register_forward_pre_hook(lambda *_, name=name: note(f"block {name}"))
    regression_loss(model, rows(1))
    return log


def test_the_next_unit_is_gathered_while_a_block_computes(pool: WorkerPool) -> None:
    # The root and block 0 are needed at block 0, whose computation runs beside the gather of block 1.
    assert pool.run(gathers_during_blocks, world_size=4) == [[("block 0", 3), ("block 1", 3)]] * 4


class Skipping(Regressor):
    """Leaves out its first block when told to."""

    skips = False

    def forward(self, x: Tensor) -> Tensor:
        blocks, self.blocks = self.blocks, self.blocks[1:] if self.skips else self.blocks
        try:
            return super().forward(x)
        finally:
            self.blocks = blocks


def train_with_detours(model: nn.Module, mine: Any) -> None:
    """Takes steps, with forward passes in between that do not use what was gathered ahead for them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        if step:
            model.skips = True
            with torch.no_grad():
                model(mine(step))
            model.skips = False
        regression_loss(model, mine(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def detour() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model, alone = Skipping(), Skipping()
    alone.load_state_dict(model.state_dict())
    train_with_detours(mics_shard(model, CONFIG), rows)
    train_with_detours(alone, lambda step: microbatch("uneven", step, ROWS))
    return full_state_dict(model), alone.state_dict()


def test_what_was_gathered_ahead_and_not_used_never_grows_stale(pool: WorkerPool) -> None:
    for actual, expected in pool.run(detour, world_size=4):
        assert_parity(actual, expected)


def look_at_once(model: nn.Module) -> None:
    """Has FSDP2 call something with each gradient that it has just reduced."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(lambda grad: None)


def reductions_in_flight(hooks: bool) -> tuple[list[bool], bool]:
    """Returns for each unit whether its reduction ran on after FSDP2 had gone on, and whether any does at the end."""
    model = mics_shard(build("uneven"), CONFIG)
    if hooks:
        look_at_once(model)
    window, log = runtime_of(model).window, []
    for unit in window.units:
        reduce = unit.reduce

        def noted(*args: Any, unit: Any = unit, reduce: Any = reduce, **kwargs: Any) -> None:
            reduce(*args, **kwargs)
            log.append(unit.is_reducing)

        unit.reduce = noted
    with defer_replication_sync(model):
        regression_loss(model, rows(0)).backward()
    return log, any(unit.is_reducing for unit in window.units)


@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks-on-gradients"])
def test_reductions_run_beside_the_backward_pass_unless_somebody_wants_the_gradient_at_once(
    pool: WorkerPool, hooks: bool
) -> None:
    assert pool.run(reductions_in_flight, hooks, world_size=4) == [([not hooks] * 3, False)] * 4


def train_in_dtypes(overlaps: bool, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the weights after two windows; a hook on each gradient keeps reductions from running beside."""
    model = mics_shard(build("uneven"), CONFIG.replace(**settings))
    if not overlaps:
        look_at_once(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        with defer_replication_sync(model, enabled=step % 2 == 0):
            regression_loss(model, rows(step)).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return full_state_dict(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reduce_dtype": None},
        {"reduce_dtype": "bfloat16"},
        {"param_dtype": "bfloat16"},
        {"param_dtype": "bfloat16", "reduce_dtype": None},
        {"param_dtype": "float16", "reduce_dtype": "float16"},
    ],
    ids=lambda settings: ", ".join(f"{name}={value}" for name, value in settings.items()) or "defaults",
)
def test_reductions_bring_the_same_bits_beside_the_pass_as_within(pool: WorkerPool, settings: dict[str, Any]) -> None:
    beside = pool.run(train_in_dtypes, True, settings, world_size=4)
    within = pool.run(train_in_dtypes, False, settings, world_size=4)
    for actual, expected in zip(beside, within, strict=True):
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("out of memory, say")


def window_after_failure(set_to_none: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns weights after a window whose second backward pass fails and is thrown away, and without that window."""
    trained = []
    for fails in (True, False):
        model = mics_shard(build("uneven"), CONFIG)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if fails:
            with defer_replication_sync(model):
                regression_loss(model, rows(0)).backward()
                hook = model.blocks[0].register_forward_pre_hook(lambda module, args: Failing.apply(args[0]))
                with pytest.raises(RuntimeError, match="out of memory"):
                    regression_loss(model, rows(1)).backward()
                hook.remove()
            optimizer.zero_grad(set_to_none=set_to_none)
        for step in range(2):
            regression_loss(model, rows(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(full_state_dict(model))
    return trained[0], trained[1]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_a_failed_pass_do_not_come_back(pool: WorkerPool, set_to_none: bool) -> None:
    for actual, expected in pool.run(window_after_failure, set_to_none, world_size=4):
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def write_in_the_middle(model: nn.Module, mine: Any) -> None:
    """Changes a block's weights in every forward pass, after they were gathered ahead."""

    def shrink(*unused: Any) -> None:
        with torch.no_grad():
            for param in model.blocks[1].parameters():
                param.mul_(0.9)

    next(model.blocks[0].children()).register_forward_pre_hook(shrink)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        regression_loss(model, mine(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def written_while_gathered_ahead() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, alone = build("uneven"), build("uneven")
    write_in_the_middle(mics_shard(model, CONFIG), rows)
    write_in_the_middle(alone, lambda step: microbatch("uneven", step, ROWS))
    return full_state_dict(model), alone.state_dict()


def test_weights_that_are_written_after_they_were_gathered_ahead_are_gathered_anew(pool: WorkerPool) -> None:
    for actual, expected in pool.run(written_while_gathered_ahead, world_size=4):
        assert_parity(actual, expected)


class Recomputing(Regressor):
    """Recomputes its blocks' activations in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return self.last(torch.tanh(self.narrow(x)))


def gathers_of_microsteps() -> list[int]:
    """Returns the number of gathers in each of three microsteps; from the second on they run ahead."""
    torch.manual_seed(0)
    model, counts = mics_shard(Recomputing(num_blocks=4), CONFIG), []
    ledger = communication_ledger(model)
    for step in range(3):
        ledger.reset()
        regression_loss(model, rows(step)).backward()
        counts.append(ledger.total(Hop.PARTITION_GATHER).calls)
    return counts


def test_gathering_ahead_never_gathers_more(pool: WorkerPool) -> None:
    for counts in pool.run(gathers_of_microsteps, world_size=4):
        assert counts == [counts[0]] * 3
