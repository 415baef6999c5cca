"""The guard of the optimizer step: no step on gradients that replicas have not exchanged, or on stale parameters."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_mics.core.gradients.inputs import answer_for_shards
from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.core.optimizers import widen_initial_states
from lightning_mics.core.owners import step_on_whole
from lightning_mics.core.slices import divide_states
from lightning_mics.core.stand_ins import StandIn, is_elementwise, stand_in_for, stands_in, steps_on_whole
from lightning_mics.errors import MiCSError

_BEFORE: list[Callable[[torch.optim.Optimizer], None]] = []
# In the order in which they were made, which is the same on all ranks: what happens around a step may be collective.
_WINDOWS: weakref.WeakValueDictionary[int, AccumulationWindow] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def guard_steps(window: AccumulationWindow) -> None:
    """Prepares every optimizer step on a window's parameters, for as long as the window lives."""
    _WINDOWS[next(_numbers)] = window
    _install()


def before_each_step(look: Callable[[torch.optim.Optimizer], None]) -> None:
    """Has a function look at every optimizer before it steps."""
    _BEFORE.append(look)


@functools.cache
def _install() -> None:
    # One hook for all, and for good: PyTorch goes through its hooks while windows may be collected.
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    answer_for_shards(lambda: list(_WINDOWS.values()))


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With a closure, the backward pass runs inside the step, so the guard's question is asked after it."""
    if stands_in(optimizer):  # a step that calls that of its base class
        return None
    _refuse_lbfgs(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    widen_initial_states(optimizer)
    divide_states(optimizer)
    if steps_on_whole(optimizer):
        result = None if closure is None else closure()
        _prepare(optimizer)
        for window in list(_WINDOWS.values()):
            window.restore_rows()
        return _stepping(step_on_whole(optimizer), args, kwargs, None if closure is None else lambda: result)
    if closure is None:
        _prepare(optimizer)
        stand_in = stand_in_for(optimizer)
        if stand_in is None:
            return None
        stand_in.take_gradients()
        return (stand_in.optimizer, *args[1:]), kwargs
    stand_in = stand_in_for(optimizer)

    @functools.wraps(closure)
    def checked_closure() -> Any:
        result = closure()
        _prepare(optimizer)
        if stand_in is not None:
            stand_in.take_gradients()
        return result

    return _stepping(stand_in, args, kwargs, checked_closure)


def _stepping(
    stand_in: StandIn | None, args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a step that a stand-in takes, or the optimizer itself, with a closure."""
    stepping = args[0] if stand_in is None else stand_in.optimizer
    return (stepping, *args[2:]), kwargs if closure is None else {**kwargs, "closure": closure}


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if args[0] is not optimizer and stands_in(args[0]):
        StandIn.of(args[0]).hand_back()
    if not stands_in(optimizer):
        params, only_with_gradient, exact = _ids(optimizer), is_elementwise(optimizer), steps_on_whole(optimizer)
        for window in list(_WINDOWS.values()):
            window.end_step(optimizer, params, only_with_gradient=only_with_gradient, exact=exact)


def _prepare(optimizer: torch.optim.Optimizer) -> None:
    for look in _BEFORE:
        look(optimizer)
    params = _ids(optimizer)
    for window in list(_WINDOWS.values()):
        window.prepare_step(params)


def _ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _refuse_lbfgs(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS) and any(
        window.owns(_ids(optimizer)) for window in list(_WINDOWS.values())
    ):
        raise MiCSError("LBFGS needs the whole gradient as one vector, which no rank has. Use another optimizer.")


def shards_of(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Returns the shards of parameters that a pass has gathered, and others as they are."""
    if all(isinstance(param, DTensor) for param in params):
        return list(params)
    shards = {id(whole): shard for window in list(_WINDOWS.values()) for whole, shard in window.gathered()}
    return [shards.get(id(param), param) for param in params]
