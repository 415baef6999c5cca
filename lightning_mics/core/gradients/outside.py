"""Gradients that hop one does not bring, and users' hooks on gradients.

Autograd adds to a shard's gradient by itself what comes of ``full_tensor()`` and of other operations on the shard, at
any moment of a backward pass. It tells so here, before it does: what writes into the gradient ends first, and hop two,
if it was launched already, is launched once more.

What users register on a parameter, sharded, gathered or whole on every rank, is called here as well, once a backward
pass, with the gradient that one process would have: the whole mean over all ranks. So with such a hook every microstep
is synchronised, as a function of the mean need not be the mean of the function.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
from lightning_mics.core.gradients.whole import WholeGradients
from lightning_mics.core.masters import refuse_gradient

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
    """A parameter: the number of its unit, and its own in that. All ranks go through them in one order.

    Behind the last unit are parameters that every rank holds whole.
    """

    unit: int
    param: int


class _Hooked(NamedTuple):
    """A parameter, a shard or a whole one, and users' hooks on it."""

    name: str
    param: nn.Parameter
    hooks: ParamHooks


class OutsideGradients:
    """Hears of every gradient that autograd adds to a shard, and calls users' hooks.

    Args:
        units: The gradients of each FSDP unit, the same ones in the same order on all ranks.
        whole: Those of parameters that are not sharded.
        is_running: Tells whether a backward pass of the model is under way.
        only_looks: Tells whether the last one is a ``torch.autograd.grad``, which adds to no gradient.
        end_pass: Called at the end of a backward pass that reached shards, but not the model.

    Attributes:
        is_calling: Whether hooks on accumulated gradients are being called.
    """

    def __init__(
        self,
        units: Sequence[UnitGradients],
        whole: WholeGradients,
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
        self._units, self._whole = units, whole
        self._hooks = {place: ParamHooks.none() for place in self._params}
        self._hooked_shards: set[_Place] = set()
        self._earlier: dict[_Place, tuple[_Hooked, Tensor | None]] = {}
        self.is_calling = False
        self._task = -1  # the backward pass that the following is about
        self._before: dict[_Place, tuple[int, ...] | None] = {}
        self.watch()
        for number, unit in enumerate(units):
            unit.group.when_gathered(functools.partial(weakly(self._watch_gathered), number))

    # Watching.

    def watch(self) -> None:
        """Watches shards that it does not watch yet: all, and later what replaced one."""
        arrives = weakly(self._arrives)
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
        divert_hooks(param, self._hooks[place], functools.partial(weakly(self._note_hook), place), own)

    def carry(self, hooks: ModuleHooks) -> None:
        """Takes over what was registered before the parameters became shards."""
        for place, (_, param) in self._params.items():
            self._carry(place, hooks.get(param.place))

    def _carry(self, place: _Place, hooks: ParamHooks | None) -> None:
        if hooks is not None:
            self._hooks[place].carry(hooks)
            self._hooked_shards.add(place)

    def _note_hook(self, place: _Place) -> None:
        self._hooked_shards.add(place)

    def _hooked(self) -> dict[_Place, _Hooked]:
        """Returns the parameters with hooks, in the order of all ranks."""
        found: dict[_Place, _Hooked] = {}
        if not self._hooked_shards and not self._whole.hooked:
            return found
        for place in sorted(self._hooked_shards):
            param, hooks = self._params[place][1], self._hooks[place]
            if hooks.are_there:
                found[place] = _Hooked(param.name, param.sharded, hooks)
        for index, name in enumerate(self._whole.params):
            hooks = self._whole.hooks[name]
            if hooks.are_there:
                found[_Place(len(self._units), index)] = _Hooked(name, self._whole.params[name], hooks)
        return found

    @property
    def has_hooks(self) -> bool:
        """Whether users' hooks want to see gradients; one that is taken out in a pass does until its end."""
        return bool(self._earlier) or bool(self._hooked())

    def hooked(self) -> list[str]:
        """Returns the names of parameters with hooks, in the order of all ranks."""
        return [hooked.name for hooked in self._hooked().values()]

    # What autograd adds.

    @torch.no_grad()
    def _arrives(self, place: _Place, grad: Tensor) -> Tensor | None:
        """Makes way for a gradient; returns it as a shard, if it is none."""
        unit, param = self._params[place]
        if self._is_running() and self._only_looks():
            return None
        refuse_gradient(param.sharded, param.name)
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
            queue_backward_callback(weakly(self._after_lone))
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
        for place, hooked in self._hooked().items():
            if place not in self._earlier:
                self._earlier[place] = hooked, hooked.param.grad
                hooked.param.grad = None

    def restore(self) -> None:
        """Forgets the gradients of a microstep that came to nothing."""
        for hooked, grad in self._earlier.values():
            hooked.param.grad = grad
        self._earlier.clear()

    @torch.no_grad()
    def call_hooks(self) -> None:
        """Calls hooks with the gradients of the microstep, and adds these to the earlier ones. Collective."""
        earlier, self._earlier = self._earlier, {}
        accumulated = []
        for place in sorted(earlier):
            hooked, before = earlier[place]
            if hooked.param.grad is None:
                hooked.param.grad = before
                continue
            grad = _called(hooked)
            hooked.param.grad = grad if before is None else _added(before, grad)
            accumulated.append(hooked)
        self.is_calling = True
        try:
            for hooked in accumulated:
                for hook in [hook for registered in hooked.hooks.on_accumulated for hook in registered.values()]:
                    hook(hooked.param)
        finally:
            self.is_calling = False


def _added(earlier: Tensor, grad: Tensor) -> Tensor:
    local_tensor(earlier).add_(local_tensor(grad))
    return earlier


def _called(hooked: _Hooked) -> Tensor:
    """Returns what hooks make of a gradient."""
    grad: torch.Tensor | None = hooked.param.grad
    assert grad is not None
    if not any(hooked.hooks.on_gradient):
        return grad
    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
    with implicit_replication():  # they may also ask the shard, as pruning does
        for hook in [hook for registered in hooked.hooks.on_gradient for hook in registered.values()]:
            result = hook(whole)
            whole = whole if result is None else result
    return placed_like(whole, grad) if isinstance(grad, DTensor) else whole


def _state(param: UnitParam) -> tuple[int, ...] | None:
    """Returns what changes when a gradient does."""
    grad = param.sharded.grad
    return None if grad is None else (id(grad), grad._version, local_tensor(grad)._version)


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a bound method that does not keep its object alive: parameters outlive the model's runtime."""
    reference = weakref.WeakMethod(method)

    def call(*args: object) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return call
