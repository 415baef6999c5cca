"""Hooks on tensors: where PyTorch keeps them, and how what users register is kept from autograd."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mics.core._needs import require

require(torch.Tensor, "_backward_hooks", "_post_accumulate_grad_hooks")

Hooks = OrderedDict[Any, Callable[[Any], Any]]


class ParamHooks(NamedTuple):
    """What users registered on a parameter, in dictionaries that their handles take it out of.

    Attributes:
        on_gradient: By ``register_hook``.
        on_accumulated: By ``register_post_accumulate_grad_hook``.
    """

    on_gradient: list[Hooks]
    on_accumulated: list[Hooks]

    @classmethod
    def none(cls) -> ParamHooks:
        """Returns a place for hooks to come."""
        return cls([OrderedDict()], [OrderedDict()])

    @property
    def are_there(self) -> bool:
        """Whether there are any."""
        return any(self.on_gradient) or any(self.on_accumulated)

    def carry(self, earlier: ParamHooks) -> None:
        """Puts hooks that were registered before in front."""
        self.on_gradient[:0] = earlier.on_gradient
        self.on_accumulated[:0] = earlier.on_accumulated


class _Diverted(OrderedDict[Any, Callable[[Any], Any]]):
    """Takes the place of a tensor's own dictionary: autograd calls ``own``, and what is registered goes elsewhere.

    Args:
        registered: Where it goes.
        own: Called by autograd, with the gradient.
        on_registered: Called when something is registered.
    """

    def __init__(self, registered: Hooks, own: Callable[[Any], Any] | None, on_registered: Callable[[], None]) -> None:
        super().__init__()
        self._registered, self._on_registered = registered, on_registered
        if own is not None:
            super().__setitem__("own", own)

    def __setitem__(self, key: Any, hook: Callable[[Any], Any]) -> None:
        self._registered[key] = hook
        self._on_registered()

    def __contains__(self, key: object) -> bool:
        return key in self._registered

    def __delitem__(self, key: Any) -> None:
        del self._registered[key]


def are_diverted(hooks: object) -> bool:
    """Returns whether a tensor's dictionary of hooks is one of :func:`divert_hooks`."""
    return isinstance(hooks, _Diverted)


def registered_hooks(param: Tensor) -> ParamHooks | None:
    """Returns the hooks of a parameter that nobody diverted; ``None`` where there are none."""
    tensor: Any = param
    hooks = tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)
    if not any(hooks) or are_diverted(hooks[0]):
        return None
    return ParamHooks(*([] if found is None else [found] for found in hooks))


def divert_hooks(
    param: nn.Parameter,
    registered: ParamHooks,
    on_registered: Callable[[], None],
    own: Callable[[Tensor], Tensor | None] | None = None,
    own_accumulated: Callable[[Tensor], None] | None = None,
) -> None:
    """Keeps what users register on a parameter from being called by autograd.

    Args:
        param: The parameter; what it has already must be in ``registered``.
        registered: Where it goes: into the last dictionaries.
        on_registered: Called when something is registered.
        own: Called by autograd with a gradient on its way to the parameter, in place of users' hooks.
        own_accumulated: Called by autograd when the gradient was added, with the parameter.
    """
    tensor: Any = param
    if own is not None:
        own.__torch_unserializable__ = True  # type: ignore[attr-defined]  # pickling the parameter warns of others
    tensor._backward_hooks = _Diverted(registered.on_gradient[-1], own, on_registered)
    tensor._post_accumulate_grad_hooks = _Diverted(registered.on_accumulated[-1], own_accumulated, on_registered)
