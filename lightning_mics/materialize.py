"""From the meta device to real memory, one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.errors import MiCSConfigError


def has_meta_tensors(module: nn.Module) -> bool:
    """Returns whether the module itself owns a parameter or buffer on the meta device."""
    return any(tensor.is_meta for _, tensor in _own_tensors(module))


def materialize(model: nn.Module, modules: Iterable[nn.Module], device: torch.device) -> None:
    """Gives the own parameters and buffers of ``modules`` memory and their initial values.

    A Hugging Face model initialises its modules with ``_init_weights``, any other module with ``reset_parameters``.
    Values are checked: what nobody initialised is an error, not noise.

    Args:
        model: The root, which may know how to initialise its modules.
        modules: Modules with tensors on the meta device, and others, which are left alone.
        device: Where the tensors go.

    Raises:
        MiCSConfigError: If a module does not initialise one of its tensors.
    """
    initializers = _huggingface_initializers(model)
    for module in modules:
        if not has_meta_tensors(module):
            continue
        fresh = _to_empty(module, device)
        with torch.no_grad():
            for tensor in fresh.values():
                _mark_uninitialized(tensor)
            _initialize(module, initializers.get(module))
        for name, tensor in fresh.items():
            current = dict(_own_tensors(module))[name]
            if current is tensor and _is_marked(tensor):
                raise MiCSConfigError(
                    f"{type(module).__name__}.{name} was built on the meta device and nothing initialises it. Give "
                    f"{type(module).__name__} a reset_parameters() method that sets it, or build the module on a real "
                    "device."
                )


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _to_empty(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Replaces the memory of meta tensors, keeping parameters that are shared one object."""
    fresh: dict[str, Tensor] = {}
    for name, tensor in _own_tensors(module):
        if not tensor.is_meta:
            continue
        empty = torch.empty_like(tensor, device=device)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            torch.utils.swap_tensors(tensor, empty)
            fresh[name] = tensor
        else:
            module._buffers[name] = fresh[name] = empty
    return fresh


def _mark_uninitialized(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(math.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).min)


def _is_marked(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    if tensor.dtype == torch.bool or tensor.dtype == torch.uint8:
        return False
    return bool((tensor == torch.iinfo(tensor.dtype).min).any())


def _huggingface_initializers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Maps modules to the Hugging Face model around them."""
    result: dict[nn.Module, nn.Module] = {}
    for outer in model.modules():
        if hasattr(outer, "_init_weights") and hasattr(outer, "_no_split_modules"):
            for module in outer.modules():
                result.setdefault(module, outer)
    return result


def _initialize(module: nn.Module, huggingface: nn.Module | None) -> None:
    if huggingface is not None:
        initialize: Any = huggingface._init_weights
        initialize(module)
        return
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            reset()
            return
