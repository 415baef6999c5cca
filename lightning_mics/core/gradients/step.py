"""The guard of the optimizer step: no step on gradients that replicas have not exchanged, or on stale parameters."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.errors import MiCSError


def guard_steps(window: AccumulationWindow) -> None:
    """Prepares every optimizer step on a window's parameters, for as long as the window lives."""
    reference = weakref.ref(window)

    def before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        alive = reference()
        return None if alive is None else _before_step(alive, optimizer, args, kwargs)

    weakref.finalize(window, register_optimizer_step_pre_hook(before_step).remove)


def _before_step(
    window: AccumulationWindow, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """With a closure, the backward pass runs inside the step, so the guard's question is asked after it."""
    _refuse_lbfgs(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _prepare(window, optimizer)
        return None

    @functools.wraps(closure)
    def checked_closure() -> Any:
        result = closure()
        _prepare(window, optimizer)
        return result

    return args[:1], {**kwargs, "closure": checked_closure}


def _prepare(window: AccumulationWindow, optimizer: torch.optim.Optimizer) -> None:
    window.prepare_step({id(param) for group in optimizer.param_groups for param in group["params"]})


def _refuse_lbfgs(optimizer: torch.optim.Optimizer) -> None:
    params = (param for group in optimizer.param_groups for param in group["params"])
    if isinstance(optimizer, torch.optim.LBFGS) and any(isinstance(param, DTensor) for param in params):
        raise MiCSError("LBFGS needs the whole gradient as one vector, which no rank has. Use another optimizer.")
