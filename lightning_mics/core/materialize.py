"""From the meta device to real memory, one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.errors import MiCSConfigError


def has_meta_tensors(module: nn.Module) -> bool:
    """Returns whether the module itself owns a parameter or buffer on the meta device."""
    return any(tensor.is_meta for _, tensor in _own_tensors(module))


def check_initializers(model: nn.Module) -> None:
    """Checks that something could initialise each module on the meta device: itself, or a module around it.

    Raises:
        MiCSConfigError: If nothing could.
    """
    initializers = _huggingface_initializers(model)

    def check(module: nn.Module, is_initialized: bool) -> None:
        is_initialized = is_initialized or module in initializers or _own_initializer(module) is not None
        if not is_initialized:
            for name, tensor in _own_tensors(module):
                if tensor.is_meta:
                    raise _not_initialized(module, name)
        for child in module.children():
            check(child, is_initialized)

    check(model, False)


def materialize(
    model: nn.Module,
    modules: Iterable[nn.Module],
    device: torch.device,
    filled_later: Collection[nn.Parameter] = (),
) -> None:
    """Gives the own parameters and buffers of ``modules`` memory and their initial values.

    A Hugging Face model initialises its modules with ``_init_weights``, any other module with ``reset_parameters``.
    As in a constructor, a module's turn comes after its children's: some set values in them. Values are checked: what
    nobody initialised is an error, not noise.

    Args:
        model: The root, which may know how to initialise its modules.
        modules: Modules with tensors on the meta device, children before parents, and others, which are left alone.
        device: Where the tensors go.
        filled_later: Parameters on the meta device that need no values, only memory.

    Raises:
        MiCSConfigError: If a module does not initialise one of its tensors.
    """
    filled_later, initializers = set(filled_later), None
    fresh: dict[nn.Module, dict[str, tuple[Tensor, int]]] = {}
    for module in modules:
        if module in fresh or not (has_meta_tensors(module) or _is_frame_of(module, fresh)):
            continue
        with torch.no_grad():
            tensors = _to_empty(module, device)
            if tensors and all(tensor in filled_later for tensor in tensors.values()):
                continue
            tensors = {name: tensor for name, tensor in tensors.items() if tensor not in filled_later}
            for tensor in tensors.values():
                tensor.copy_(_mark_like(tensor))
            fresh[module] = {name: (tensor, tensor._version) for name, tensor in tensors.items()}
            if initializers is None:
                initializers = _huggingface_initializers(model)
            _initialize(module, initializers.get(module))
    for module, marked in fresh.items():
        _check_initialized(module, marked)


def _is_frame_of(module: nn.Module, fresh: Container[nn.Module]) -> bool:
    """Returns whether a module owns no tensor, and everything inside of it that does is fresh."""
    owners = [inner for inner in module.modules() if _own_tensors(inner)]
    return bool(owners) and all(inner in fresh for inner in owners)


def _check_initialized(module: nn.Module, marked: dict[str, tuple[Tensor, int]]) -> None:
    own = dict(_own_tensors(module))
    for name, (tensor, version) in marked.items():
        if own.get(name) is tensor and _is_untouched(tensor, version):
            raise _not_initialized(module, name)


def _not_initialized(module: nn.Module, name: str) -> MiCSConfigError:
    kind = type(module).__name__
    return MiCSConfigError(
        f"{kind}.{name} was built on the meta device and nothing initialises it. Give {kind} a reset_parameters() "
        "method that sets it, or build the module on a real device."
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
            setattr(module, name, empty)
            fresh[name] = empty
    return fresh


def _mark_like(tensor: Tensor) -> Tensor:
    """Returns values that no initialisation leaves behind: NaN, the least integer, or for bytes and flags a pattern."""
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.full_like(tensor, math.nan)
    if tensor.dtype in (torch.bool, torch.uint8):
        return (torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape) % 3 == 0).to(tensor.dtype)
    return torch.full_like(tensor, torch.iinfo(tensor.dtype).min)


def _is_untouched(tensor: Tensor, version: int) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    # Small integer tensors may rightly hold what marks them; writing bumps the version, except through ``.data``.
    return tensor._version == version and torch.equal(tensor, _mark_like(tensor))


def _huggingface_initializers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Maps modules to the Hugging Face model around them."""
    result: dict[nn.Module, nn.Module] = {}
    for outer in model.modules():
        if hasattr(outer, "_init_weights") and hasattr(outer, "_no_split_modules"):
            for module in outer.modules():
                result[module] = outer  # the innermost model wins
    return result


def _initialize(module: nn.Module, huggingface: nn.Module | None) -> None:
    if huggingface is not None:
        initialize: Any = huggingface._init_weights
        initialize(module)
        return
    reset = _own_initializer(module)
    if reset is not None:
        reset()


def _own_initializer(module: nn.Module) -> Callable[[], object] | None:
    methods = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return next(filter(callable, methods), None)
