"""Gradients that hop one does not bring, and users' hooks on gradients.

Autograd adds to a shard's gradient by itself what comes of ``full_tensor()`` and of other operations on the shard, at
any moment of a backward pass. It tells so here, before it does: what writes into the gradient ends first, and hop two,
if it was launched already, is launched once more.

What users register on a parameter, gathered or not, is called here as well, once a backward pass, with the gradient
that one process would have: the whole mean over all ranks. So with such a hook every microstep is synchronised, as a
function of the mean need not be the mean of the function.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mics.core._torch import (
    ParamHooks,
    UnitParam,
    current_backward_id,
    divert_hooks,
    implicit_replication,
    local_tensor,
    placed_like,
    queue_backward_callback,
    registered_hooks,
)
from lightning_mics.core.gradients.unit import UnitGradients

# Hooks of parameters, by the module that owns one and its name there.
ModuleHooks = dict[tuple[nn.Module, str], ParamHooks]


def hooks_in(model: nn.Module) -> ModuleHooks:
    """Returns the hooks that were registered on a model's parameters, which are about to be replaced by shards."""
    found: ModuleHooks = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            hooks = registered_hooks(param)
            if hooks is not None:
                found[module, name] = hooks
    return found


class _Place(NamedTuple):
    """A parameter: the number of its unit, and its own in that. All ranks go through them in one order."""

    unit: int
    param: int


class OutsideGradients:
    """Hears of every gradient that autograd adds to a shard, and calls users' hooks.

    Args:
        units: The gradients of each FSDP unit, the same ones in the same order on all ranks.
        is_running: Tells whether a backward pass of the model is under way.
        only_looks: Tells whether the last one is a ``torch.autograd.grad``, which adds to no gradient.
        end_pass: Called at the end of a backward pass that reached shards, but not the model.

    Attributes:
        is_calling: Whether hooks on accumulated gradients are being called.
    """

    def __init__(
        self,
        units: Sequence[UnitGradients],
        is_running: Callable[[], bool],
        only_looks: Callable[[], bool],
        end_pass: Callable[[], None],
    ) -> None:
        self._is_running, self._only_looks, self._end_pass = is_running, only_looks, end_pass
        self._params = {
            _Place(number, index): (unit, param)
            for number, unit in enumerate(units)
            for index, param in enumerate(unit.group.params)
        }
        self._units = units
        self._hooks = {place: ParamHooks.none() for place in self._params}
        self._hooked: set[_Place] = set()
        self._earlier: dict[_Place, Tensor | None] = {}
        self.is_calling = False
        self._task = -1  # the backward pass that the following is about
        self._before: dict[_Place, tuple[int, ...] | None] = {}
        self.watch()
        for number, unit in enumerate(units):
            unit.group.when_gathered(functools.partial(_weakly(self._watch_gathered), number))

    # Watching.

    def watch(self) -> None:
        """Watches shards that it does not watch yet: all, and later what replaced one."""
        arrives = _weakly(self._arrives)
        for number, unit in enumerate(self._units):
            if not unit.group.diverts_hooks:
                for index, param in enumerate(unit.group.params):
                    place = _Place(number, index)
                    self._divert(place, param.sharded, functools.partial(arrives, place))

    def _watch_gathered(self, number: int) -> None:
        for index, param in enumerate(self._units[number].group.params):
            if param.gathered is not None:
                self._divert(_Place(number, index), param.gathered)

    def _divert(self, place: _Place, param: nn.Parameter, own: Callable[[Tensor], Tensor | None] | None = None) -> None:
        self._carry(place, registered_hooks(param))
        divert_hooks(param, self._hooks[place], functools.partial(_weakly(self._note_hook), place), own)

    def carry(self, hooks: ModuleHooks) -> None:
        """Takes over what was registered before the parameters became shards."""
        for place, (_, param) in self._params.items():
            self._carry(place, hooks.get(param.place))

    def _carry(self, place: _Place, hooks: ParamHooks | None) -> None:
        if hooks is not None:
            self._hooks[place].carry(hooks)
            self._hooked.add(place)

    def _note_hook(self, place: _Place) -> None:
        self._hooked.add(place)

    @property
    def has_hooks(self) -> bool:
        """Whether users' hooks want to see gradients; one that is taken out in a pass does until its end."""
        return bool(self._earlier) or (bool(self._hooked) and any(self._hooks[at].are_there for at in self._hooked))

    def hooked(self) -> list[str]:
        """Returns the names of parameters with hooks, in the order of all ranks."""
        return [self._params[place][1].name for place in sorted(self._hooked) if self._hooks[place].are_there]

    # What autograd adds.

    @torch.no_grad()
    def _arrives(self, place: _Place, grad: Tensor) -> Tensor | None:
        """Makes way for a gradient; returns it as a shard, if it is none."""
        unit, param = self._params[place]
        if self._is_running() and self._only_looks():
            return None
        self.begin()
        unit.admit(place.param)
        if not self._is_running():
            self._note_lone(place)
        shard = placed_like(grad, param.sharded)
        return None if shard is grad else shard

    def _note_lone(self, place: _Place) -> None:
        """Lets the end of a pass that may never reach the model count as that of a microstep."""
        if self._task != current_backward_id():
            self._task = current_backward_id()
            self._before.clear()
            queue_backward_callback(_weakly(self._after_lone))
        self._before.setdefault(place, _state(self._params[place][1]))

    def _after_lone(self) -> None:
        before, self._before, self._task = self._before, {}, -1
        if self._is_running():  # the model's own pass began later, and ends later
            return
        if any(_state(self._params[place][1]) != state for place, state in before.items()):
            self._end_pass()
        else:  # torch.autograd.grad() only looks
            self.restore()

    # Hooks.

    def begin(self) -> None:
        """Sets aside the gradients of earlier microsteps where a hook wants that of this one."""
        for place in self._hooked if self._hooked else ():
            if place not in self._earlier and self._hooks[place].are_there:
                shard = self._params[place][1].sharded
                self._earlier[place], shard.grad = shard.grad, None

    def restore(self) -> None:
        """Forgets the gradients of a microstep that came to nothing."""
        for place, grad in self._earlier.items():
            self._params[place][1].sharded.grad = grad
        self._earlier.clear()

    @torch.no_grad()
    def call_hooks(self) -> None:
        """Calls hooks with the gradients of the microstep, and adds these to the earlier ones. Collective."""
        earlier, self._earlier = self._earlier, {}
        accumulated = []
        for place in sorted(earlier):
            param, hooks = self._params[place][1], self._hooks[place]
            if param.sharded.grad is None:
                param.sharded.grad = earlier[place]
                continue
            self._add(param, hooks, earlier[place])
            accumulated.append((param, hooks))
        self.is_calling = True
        try:
            for param, hooks in accumulated:
                for hook in [hook for registered in hooks.on_accumulated for hook in registered.values()]:
                    hook(param.sharded)
        finally:
            self.is_calling = False

    def _add(self, param: UnitParam, hooks: ParamHooks, earlier: Tensor | None) -> None:
        grad = _called(hooks, param.sharded)
        if earlier is not None:
            local_tensor(earlier).add_(local_tensor(grad))
            grad = earlier
        param.sharded.grad = grad


def _called(hooks: ParamHooks, shard: nn.Parameter) -> Tensor:
    """Returns what hooks make of a shard's gradient."""
    grad: torch.Tensor | None = shard.grad
    assert grad is not None
    if not any(hooks.on_gradient):
        return grad
    whole = grad.full_tensor()  # type: ignore[attr-defined]
    with implicit_replication():  # they may also ask the shard, as pruning does
        for hook in [hook for registered in hooks.on_gradient for hook in registered.values()]:
            result = hook(whole)
            whole = whole if result is None else result
    return placed_like(whole, grad)


def _state(param: UnitParam) -> tuple[int, ...] | None:
    """Returns what changes when a gradient does."""
    grad = param.sharded.grad
    return None if grad is None else (id(grad), grad._version, local_tensor(grad)._version)


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a bound method that does not keep its object alive: parameters outlive the model's runtime."""
    reference = weakref.WeakMethod(method)

    def call(*args: object) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return call
