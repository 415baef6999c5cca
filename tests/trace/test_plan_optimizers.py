"""Footprints are those of real optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics import MiCSConfigError
from lightning_mics.plan.profile import Param
from lightning_mics.trace.optimizers import optimizer_footprint

SHAPES = [(7, 5), (9,), (3, 4, 2), (1, 6)]
PARAMS = [Param(shape=shape) for shape in SHAPES]


def real_params(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def real_bytes(optimizer: Optimizer) -> int:
    optimizer.step()
    states = {id(v): v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)}
    return sum(value.nbytes for value in states.values())


@pytest.mark.parametrize(
    "name", ["AdamW", "Adam", "SGD", "Adagrad", "RMSprop", "Adafactor", "Adamax", "NAdam", "RAdam", "Adadelta", "ASGD"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_a_named_optimizer(name: str, dtype: torch.dtype) -> None:
    params = real_params(dtype=dtype)
    footprint = optimizer_footprint(name, params, foreach=False)
    assert not footprint.is_estimate
    assert footprint.state_bytes == real_bytes(getattr(torch.optim, name)(params))
    described = [Param(shape=shape, dtype=str(dtype).removeprefix("torch.")) for shape in SHAPES]
    assert optimizer_footprint(name, described, foreach=False) == footprint


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
        (torch.optim.AdamW, {"lr": torch.tensor(0.1), "betas": (0.8, 0.9)}),
        (torch.optim.AdamW, {"fused": True}),
    ],
)
def test_states_of_an_instance_with_settings(kind: Any, settings: dict[str, Any]) -> None:
    optimizer = kind(real_params(), **settings)
    footprint = optimizer_footprint(optimizer, PARAMS, foreach=False)
    assert not optimizer.state, "the instance was used"
    assert not footprint.is_estimate
    assert footprint.state_bytes == real_bytes(optimizer)


def test_settings_of_a_group_count() -> None:
    optimizer = torch.optim.SGD([{"params": real_params(), "momentum": 0.9}], lr=0.1)
    assert optimizer_footprint(optimizer, PARAMS, foreach=False).state_bytes == real_bytes(optimizer)


class Lion(Optimizer):
    """An optimizer of somebody else."""

    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 0.1)
                param.add_(momentum.sign(), alpha=-group["lr"])


def test_an_optimizer_of_somebody_else_is_measured() -> None:
    params = [Param(shape=(64, 32)), Param(shape=(8, 32))]
    for optimizer in (Lion, Lion(real_params())):
        footprint = optimizer_footprint(optimizer, params, foreach=True)
        assert (footprint.state_bytes, footprint.step_extra_bytes) == (4 * 72 * 32, 4 * 64 * 32)


def test_what_has_no_gradient_or_no_elements_does_not_count() -> None:
    more = [*PARAMS, Param(shape=(50, 50), trainable=False), Param(shape=(0, 5))]
    assert optimizer_footprint("adamw", more, foreach=True) == optimizer_footprint("AdamW", PARAMS, foreach=True)
    frozen = [nn.Parameter(torch.ones(3), requires_grad=False)]
    assert optimizer_footprint("AdamW", frozen, foreach=True).state_bytes == 0


def test_stepping_over_all_parameters_at_once_takes_more() -> None:
    params = [Param(shape=(256, 256))] * 8
    at_once, one_by_one = (optimizer_footprint("AdamW", params, foreach=foreach) for foreach in (True, False))
    assert at_once.state_bytes == one_by_one.state_bytes == 8 * (2 * 4 * 256 * 256 + 4)
    assert at_once.step_extra_bytes == pytest.approx(8 * 4 * 256 * 256, rel=0.01)
    assert one_by_one.step_extra_bytes < at_once.step_extra_bytes / 2


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_what_cannot_step_is_estimated(name: str) -> None:
    footprint = optimizer_footprint(name, PARAMS, foreach=False)
    assert footprint.is_estimate
    assert footprint.state_bytes == 2 * 4 * sum(param.numel for param in PARAMS)


def test_equal_questions_are_answered_once() -> None:
    first = optimizer_footprint("AdamW", PARAMS, foreach=True)
    assert optimizer_footprint("torch.optim.adamw", list(PARAMS), foreach=True) is first


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(MiCSConfigError, match=r"'adamww' is not known. Did you mean 'AdamW'\?"):
        optimizer_footprint("adamww", PARAMS, foreach=True)
    with pytest.raises(MiCSConfigError, match=r"Values that work: .*Adagrad"):
        optimizer_footprint("qqq", PARAMS, foreach=True)
    with pytest.raises(MiCSConfigError, match="Pass a name such as"):
        optimizer_footprint(3, PARAMS, foreach=True)  # type: ignore[arg-type]


def test_states_of_8_bits_have_scales_and_small_parameters_wide_ones() -> None:
    large, small = (optimizer_footprint("adamw8bit", [Param(shape=(size,))], foreach=True) for size in (2**20, 4095))
    assert large.state_bytes == 2 * (2**20 + 4 * 2**20 // 256)
    assert small.state_bytes == 2 * 4 * 4095
    assert large.step_extra_bytes == 0
