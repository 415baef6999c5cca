"""Units that are frozen or thawed while microsteps do not use them, and passes that an interrupt ended."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import Regressor, microbatch, regression_loss
from torch import Tensor, nn
from works import works

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.core.runtime import is_sharded
from lightning_mics.errors import MiCSError
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

ROWS = 8


class Skipping(Regressor):
    """Leaves out its second block, or is interrupted before it, when told to."""

    skips = False
    interrupt: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.first(x))
        if self.interrupt is not None:
            raise self.interrupt
        if not self.skips:
            x = self.blocks[1](x)
        return self.last(torch.tanh(self.narrow(x)))


class Run:
    """Trains a model with AdamW, whose decay and momentum act on any gradient, be it zero."""

    def __init__(self, model: Skipping) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)

    def rows(self, step: int) -> Tensor:
        whole = microbatch("uneven", step, ROWS)
        return whole.chunk(dist.get_world_size())[dist.get_rank()] if is_sharded(self.model) else whole

    def microstep(self, step: int, *, last: bool = True) -> None:
        with defer_replication_sync(self.model, enabled=not last) if is_sharded(self.model) else nullcontext():
            regression_loss(self.model, self.rows(step)).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def frozen_and_left_out(run: Run) -> None:
    run.microstep(0)
    run.update()
    run.model.blocks[1].requires_grad_(False)
    run.model.skips = True
    for step in range(2):
        run.microstep(2 * step, last=False)
        run.microstep(2 * step + 1)
        run.update()


def thawed_and_left_out(run: Run) -> None:
    bias = run.model.blocks[1].up.bias
    run.microstep(0, last=False)
    bias.requires_grad_(False)
    run.microstep(1, last=False)
    bias.requires_grad_(True)
    run.model.skips = True
    run.microstep(2, last=False)
    run.microstep(3)
    run.update()


def frozen_within_a_window(run: Run) -> None:
    run.microstep(0, last=False)
    run.model.blocks[1].up.bias.requires_grad_(False)
    run.model.skips = True
    run.microstep(1)
    run.update()


def interrupted(run: Run) -> None:
    run.microstep(0)
    run.update()
    if is_sharded(run.model):
        run.model.interrupt = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run.model(run.rows(1))
        run.model.interrupt = None
    for step in range(2):
        run.microstep(step)
        run.update()


SCENARIOS = [frozen_and_left_out, thawed_and_left_out, frozen_within_a_window, interrupted]


def both(scenario: Callable[[Run], None], shard_size: int, verify: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    alone, model = Skipping(), Skipping()
    model.load_state_dict(alone.state_dict())
    scenario(Run(alone))
    scenario(Run(mics_shard(model, MiCSConfig(shard_size=shard_size, node_size=2, verify=verify, wrap="Block"))))
    return full_state_dict(model), alone.state_dict()


@pytest.mark.parametrize("shard_size", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_weights_are_those_of_one_process(pool: WorkerPool, scenario: Callable[[Run], None], shard_size: int) -> None:
    for actual, expected in pool.run(both, scenario, shard_size, verify=True, world_size=4):
        assert_parity(actual, expected)


def thaw_in_bf16() -> bool:
    """Returns whether a block of 16-bit parameters that was thawed and not used since has no gradient."""
    model = mics_shard(Skipping().bfloat16(), MiCSConfig(shard_size=2, wrap="Block", reduce_dtype="float32"))
    run = Run(model)
    rows = run.rows(0).bfloat16()
    model.blocks[1].requires_grad_(False)
    model(rows).square().mean().backward()
    run.update()
    model.blocks[1].requires_grad_(True)
    model.skips = True
    with defer_replication_sync(model):
        model(rows).square().mean().backward()
    return all(param.grad is None for param in model.blocks[1].parameters())


def test_a_thawed_block_of_16_bit_parameters_that_is_not_used_gets_no_gradient(pool: WorkerPool) -> None:
    assert pool.run(thaw_in_bf16) == [True, True]


def step_beside_a_collector() -> None:
    """Takes a step while models that were dropped are collected."""
    for _ in range(3):
        run = Run(mics_shard(Skipping(), MiCSConfig(shard_size=1)))
        run.microstep(0)
        run.update()
    prepare = AccumulationWindow.prepare_step

    def collect_and_prepare(window: AccumulationWindow, params: set[int]) -> None:
        gc.collect()
        prepare(window, params)

    run.microstep(1)
    with mock.patch.object(AccumulationWindow, "prepare_step", collect_and_prepare):
        run.update()


def test_windows_may_be_collected_within_a_step(pool: WorkerPool) -> None:
    assert pool.run(step_beside_a_collector) == [None] * 2


class AdaptedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.lora = nn.Linear(6, 7), nn.Linear(6, 7)
        self.out = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.base(x) + self.lora(x)))


class AdaptedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(AdaptedBlock(), AdaptedBlock())
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


FROZEN_AT_FIRST: dict[str, Callable[[AdaptedNet], list[nn.Parameter]]] = {
    "whole units": lambda model: list(model.blocks.parameters()),
    "all but adapters": lambda model: [param for name, param in model.named_parameters() if "lora" not in name],
    "parts of units": lambda model: [block.base.weight for block in model.blocks],
}


def gradients_after_thawing(kind: str | None, settings: dict[str, object]) -> list[list[Tensor | None]]:
    """Returns the gradients of three microsteps: all are trainable in the second; ``None`` freezes nothing before."""
    torch.manual_seed(0)
    model = AdaptedNet()
    frozen = [
        name for name, param in model.named_parameters() if kind and _is_among(param, FROZEN_AT_FIRST[kind](model))
    ]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    config = MiCSConfig(shard_size=2, node_size=2, wrap=["AdaptedBlock"], verify=False, **settings)
    mics_shard(model, config)
    shards, found = dict(model.named_parameters()), []
    for step, trains in enumerate([False, True, False]):
        for name in frozen:
            shards[name].requires_grad_(trains)
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(4 * step + dist.get_rank()))
        model(x).pow(2).mean().backward()
        found.append([None if shard.grad is None else shard.grad.to_local().clone() for shard in shards.values()])
        assert all((shards[name].grad is not None) is trains for name in frozen)
        model.zero_grad()
    return found


def _is_among(param: nn.Parameter, params: list[nn.Parameter]) -> bool:
    return any(param is other for other in params)


def thaw_in_every_dtype() -> list[str]:
    """Returns where gradients differ, by a bit, from those of a model in which nothing was ever frozen."""
    wrong = []
    for param_dtype in (None, "bfloat16"):
        for reduce_dtype in (None, "float32", "bfloat16"):
            settings = {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype}
            expected = gradients_after_thawing(None, settings)
            for kind in FROZEN_AT_FIRST:
                actual = gradients_after_thawing(kind, settings)
                for step, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
                    pairs = zip(mine, theirs, strict=True)
                    if not all(one is None or torch.equal(one, other) for one, other in pairs):
                        wrong.append(f"{kind}, {settings}, microstep {step}")
    return wrong


@works("Training loops", "Units that are frozen at first, trained later, and frozen again, in 16-bit precision")
def test_thawed_parameters_are_reduced_in_the_dtypes_of_the_settings(pool: WorkerPool) -> None:
    assert pool.run(thaw_in_every_dtype, world_size=4) == [[]] * 4


def thaw_two_dtypes() -> str:
    model = AdaptedNet()
    for block in model.blocks:
        block.base.bfloat16()
        block.base.requires_grad_(False)
    config = MiCSConfig(shard_size=2, wrap=["AdaptedBlock"], param_dtype="bfloat16", verify=False)
    mics_shard(model, config)
    model(torch.randn(3, 6)).sum().backward()
    model.blocks.requires_grad_(True)
    with pytest.raises(MiCSError) as error:
        model(torch.randn(3, 6)).sum().backward()
    return str(error.value)


def test_trainable_parameters_of_one_unit_must_have_one_dtype(pool: WorkerPool) -> None:
    for message in pool.run(thaw_two_dtypes):
        assert "blocks.1.base.weight (torch.bfloat16)" in message and "wrap=" in message
