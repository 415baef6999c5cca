"""Layers around a sharded model that nobody shards: every rank holds them whole, and all average their gradients.

A sharded model is told of them where it can be seen that they belong together:

- a front end was given the module that holds both;
- a module that holds both is called, from the first forward pass on;
- an optimizer holds the parameters of both, from its making on;
- an optimizer is made of parameters that were put into a model after it was sharded.

From then on they are like parameters that stay whole inside of the model: equal to rank 0's at first, and averaged at
the end of each window. A model that nothing ties to a sharded one is left alone.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mics.core._torch import outside_graphs
from lightning_mics.core.clipping import clip_whole_beside_shards
from lightning_mics.core.gradients.step import before_each_step
from lightning_mics.core.gradients.whole import is_taken
from lightning_mics.core.mesh import communication_device
from lightning_mics.core.replicas import equalize_replicas
from lightning_mics.core.runtime import MiCSRuntime, own_runtime, runtime_of
from lightning_mics.core.whole import move_whole
from lightning_mics.errors import MiCSConfigError

# Roots around which no module was called yet, with the modules inside of each.
_UNSEEN: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
# Parameters that shards have replaced. Only those that somebody holds all the same are still there.
_REPLACED: Any = WeakIdKeyDictionary()
# Sharded models in the order of sharding, which all ranks share.
_ROOTS: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def adopt(module: nn.Module, *, move: bool = False) -> None:
    """Averages the gradients of what is plain in a module with those of the sharded model in it. Collective.

    Args:
        module: A module that holds a sharded model.
        move: Whether to put plain layers on the device where the sharded model trains.

    Raises:
        MiCSConfigError: If a plain layer has no memory yet, or shares a parameter with the sharded model.
    """
    runtime = runtime_of(module)
    outside = list(_outside(module))
    if move:
        _move([layer for _, layer in outside], communication_device(runtime.mesh.device_mesh.device_type))
    params: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    for name, layer in outside:
        params.update(layer.named_parameters(name, recurse=False))
        buffers.update(layer.named_buffers(name, recurse=False))
    _take(runtime, params, buffers)


def _outside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that are not inside of a sharded one, each once, with their names."""
    inside = {inner for root in module.modules() if own_runtime(root) is not None for inner in root.modules()}
    return ((name, layer) for name, layer in module.named_modules() if layer not in inside)


def _move(layers: Iterable[nn.Module], device: torch.device) -> None:
    layers = list(layers)
    own = [param for layer in layers for param in layer.parameters(recurse=False)]
    move_whole([param for param in own if not isinstance(param, DTensor)], device)
    for layer in layers:
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.to(device))


def _take(runtime: MiCSRuntime, params: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]) -> list[str]:
    fresh = {name: param for name, param in params.items() if _is_plain(param) and not is_taken(param)}
    for name, tensor in [*fresh.items(), *buffers.items()]:
        if tensor.is_meta:
            raise MiCSConfigError(
                f"{name} lies beside a sharded module and is on the meta device. Build what is not sharded on a real "
                "device, or shard the whole model."
            )
        if tensor in _REPLACED:
            raise MiCSConfigError(
                f"{name} is shared with a module that was sharded without it, so there are two of it now. Shard a "
                "module that holds both, such as the whole model."
            )
    if fresh:
        device = communication_device(runtime.mesh.device_mesh.device_type)
        equalize_replicas({**fresh, **buffers}.items(), device)
        runtime.window.whole.add(fresh)
        clip_whole_beside_shards()
    return list(fresh)


def _is_plain(param: Tensor) -> bool:
    return not isinstance(param, DTensor) and (param.is_floating_point() or param.is_complex())


# Modules that hold a sharded model.


def note_replaced(model: nn.Module) -> None:
    """Remembers the parameters of a model that is about to be sharded, for as long as anybody holds them."""
    note_replaced_params(
        param
        for param in model.parameters()
        if not param.is_meta  # swapped for real ones: no weak reference to those
    )


def note_replaced_params(params: Iterable[nn.Parameter]) -> None:
    """Remembers parameters that shards replace, for as long as anybody holds them."""
    for param in params:
        _REPLACED[param] = True


def watch(root: nn.Module) -> None:
    """Looks out for what belongs to a model that was just sharded."""
    for param in root.parameters():
        _REPLACED.pop(param, None)  # it stays whole
    _ROOTS[root] = True
    _UNSEEN[root] = {id(module) for module in root.modules()}
    _watch_modules()
    _watch_optimizers()


_HANDLES: list[Any] = []


def _watch_modules() -> None:
    if not _HANDLES:
        _HANDLES.append(register_module_forward_pre_hook(outside_graphs(_before_forward)))


def _before_forward(module: nn.Module, args: Any) -> None:
    """Sees modules before those inside of them: what holds a sharded model comes before it."""
    if not torch.is_grad_enabled():
        return
    for root, inside in list(_UNSEEN.items()):
        if id(module) in inside:
            _UNSEEN.pop(root, None)
        elif any(inner is root for inner in module.modules()):
            _UNSEEN.pop(root, None)
            adopt(module)
    if not _UNSEEN and _HANDLES:
        _HANDLES.pop().remove()


# Optimizers that hold a sharded model's parameters.


@functools.cache
def _watch_optimizers() -> None:
    add = Optimizer.add_param_group

    @functools.wraps(add)
    def add_and_look(self: Optimizer, param_group: dict[str, Any]) -> None:
        add(self, param_group)
        adopt_beside_shards(self, alone=True)

    Optimizer.add_param_group = add_and_look  # type: ignore[method-assign]
    before_each_step(_adopt_late)


def _adopt_late(optimizer: Optimizer) -> None:
    """Sees what groups got by hand, before a step on gradients that no other rank knows."""
    found = adopt_beside_shards(optimizer)
    if found is not None and not found.window.pending:
        found.window.synchronize()


def adopt_beside_shards(optimizer: Optimizer, *, alone: bool = False) -> MiCSRuntime | None:
    """Averages the gradients of plain parameters that an optimizer holds beside sharded ones.

    Collective if any are new.

    Args:
        optimizer: The optimizer.
        alone: Whether plain parameters count also where it holds no others, if a sharded model has them.

    Returns:
        The sharded model to which new ones belong from now on, if there are any.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    plain = [param for param in params if not isinstance(param, DTensor)]
    if not plain or (len(plain) == len(params) and not alone) or all(map(is_taken, plain)):
        return None
    ids = set(map(id, params))
    inside = {root: set(map(id, root.parameters())) for root in _ROOTS}
    owner = next((root for root, held in inside.items() if not ids.isdisjoint(held)), None)
    runtime = None if owner is None else own_runtime(owner)
    if runtime is None:
        return None
    # After a forward pass parameters of a sharded model may look plain. What took the place of one that stays whole is.
    windows = [found.window for found in map(own_runtime, _ROOTS) if found is not None]
    gathered = {id(whole) for window in windows for whole, _ in window.gathered()}
    named = {
        f"parameter {index} of {type(optimizer).__name__}": param
        for index, param in enumerate(plain)
        if id(param) not in gathered
    }
    return runtime if _take(runtime, named, {}) else None
