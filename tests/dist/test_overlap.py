"""On CPUs communication runs beside computation: what starts when, and that nothing stale or unfinished is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Regressor, build, microbatch, regression_loss
from torch import Tensor, nn

from lightning_mics import Hop, MiCSConfig, communication_ledger, defer_replication_sync, mics_shard
from lightning_mics.grad_sync import syncs_of
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


def reductions_in_flight(hooks: bool) -> tuple[list[bool], bool]:
    """Returns for each unit whether its reduction ran on after FSDP2 had gone on, and whether any does at the end."""
    model = mics_shard(build("uneven"), CONFIG)
    if hooks:
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(lambda param: None)
    sync, log = syncs_of(model)[0], []
    for unit in sync.units:
        reduce = unit.reduce

        def noted(*args: Any, unit: Any = unit, reduce: Any = reduce, **kwargs: Any) -> None:
            reduce(*args, **kwargs)
            log.append(unit.is_reducing)

        unit.reduce = noted
    with defer_replication_sync(model):
        regression_loss(model, rows(0)).backward()
    return log, any(unit.is_reducing for unit in sync.units)


@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks-on-gradients"])
def test_reductions_run_beside_the_backward_pass_unless_somebody_wants_the_gradient_at_once(
    pool: WorkerPool, hooks: bool
) -> None:
    assert pool.run(reductions_in_flight, hooks, world_size=4) == [([not hooks] * 3, False)] * 4
