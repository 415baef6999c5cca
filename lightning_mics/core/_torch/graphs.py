"""Autograd's graphs: what a backward pass in progress will do, and when a node was made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_mics.core._needs import require

require(torch._C, "_will_engine_execute_node", "_current_autograd_node", "_are_functorch_transforms_active")
require(torch._C._autograd, "_get_sequence_nr")
require(torch.autograd, "_engine_run_backward")


def sequence_number() -> int:
    """Returns a number that nodes made from now on have or exceed."""
    return torch._C._autograd._get_sequence_nr()


def is_newer(tensor: Tensor, number: int) -> bool:
    """Returns whether a tensor has a graph whose last node was made since :func:`sequence_number` was ``number``."""
    node: Any = tensor.grad_fn
    return node is not None and node._sequence_nr() >= number


def watch_base(tensor: Tensor, told: Callable[[Any], Any]) -> None:
    """Calls ``told(None)`` before a backward pass comes to what a view was taken of, if ``tensor`` is one."""
    base = tensor._base
    if base is not None and base.grad_fn is not None:
        base.grad_fn.register_prehook(lambda gradients: told(None))


def in_function_transform() -> bool:
    """Returns whether ``torch.func`` transforms what runs."""
    return torch._C._are_functorch_transforms_active()


def adds_gradients(leaves: Iterable[Tensor]) -> bool:
    """Returns whether the backward pass in progress adds to gradients, of some leaves or of any.

    ``torch.autograd.grad`` adds to none, and a pass with ``inputs=`` to none but these. A pass that goes everywhere
    adds to gradients, whether it comes to these leaves or not.
    """
    for leaf in leaves:
        try:
            if torch._C._will_engine_execute_node(get_gradient_edge(leaf).node):
                return True
        except RuntimeError:  # what torch.autograd.grad returns the gradient of
            return False
    return _goes_everywhere(torch._C._current_autograd_node())


def _goes_everywhere(start: Any) -> bool:
    """Returns whether the pass comes to all that is behind a node."""
    waiting, seen = [start], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        try:
            if not torch._C._will_engine_execute_node(node):
                return False
        except RuntimeError:
            return False
        waiting += [following for following, _ in node.next_functions]
    return True


def run_backward_passes_by(around: Callable[..., Any]) -> None:
    """Has ``around(run, outputs, grads, retain_graph, create_graph, inputs, allow_unused, accumulate_grad)`` run them.

    ``run`` takes the rest, and is what ``torch.autograd.grad`` and every ``backward`` call.
    """
    autograd: Any = torch.autograd
    autograd._engine_run_backward = functools.partial(around, autograd._engine_run_backward)
