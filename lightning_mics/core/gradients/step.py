"""The guard of the optimizer step: no step on gradients that replicas have not exchanged, or on stale parameters."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.errors import MiCSError

_WINDOWS: weakref.WeakSet[AccumulationWindow] = weakref.WeakSet()


def guard_steps(window: AccumulationWindow) -> None:
    """Prepares every optimizer step on a window's parameters, for as long as the window lives."""
    _WINDOWS.add(window)
    _install()


@functools.cache
def _install() -> None:
    # One hook for all, and for good: PyTorch goes through its hooks while windows may be collected.
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With a closure, the backward pass runs inside the step, so the guard's question is asked after it."""
    _refuse_lbfgs(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _prepare(optimizer)
        return None

    @functools.wraps(closure)
    def checked_closure() -> Any:
        result = closure()
        _prepare(optimizer)
        return result

    return args[:1], {**kwargs, "closure": checked_closure}


def _prepare(optimizer: torch.optim.Optimizer) -> None:
    params = _ids(optimizer)
    for window in list(_WINDOWS):
        window.prepare_step(params)


def _ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _refuse_lbfgs(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS) and any(window.owns(_ids(optimizer)) for window in list(_WINDOWS)):
        raise MiCSError("LBFGS needs the whole gradient as one vector, which no rank has. Use another optimizer.")
