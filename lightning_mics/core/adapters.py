"""What PEFT does to a model that is sharded: it adds adapters, mixes them, and leaves the model that they were in.

PEFT is not imported; its methods are known by their names. What is added is plain, so it stays whole on every rank; an
optimizer that holds it makes it averaged (``core/plain.py``). What is left of a model without its adapters lies inside
of the sharded one, so its passes are made those of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from lightning_mics.core._torch import parameter_registry
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.log import inform
from lightning_mics.core.mesh import communication_device
from lightning_mics.core.quantized import holds_quantized
from lightning_mics.core.replicas import equalize_replicas
from lightning_mics.core.runtime import attach, register_forward_method, runtime_of
from lightning_mics.core.units import is_adapter
from lightning_mics.errors import MiCSError

_ADDS, _MIXES = ("add_adapter", "load_adapter"), "add_weighted_adapter"
_MERGES, _LEAVES = ("merge_adapter", "unmerge_adapter"), ("merge_and_unload", "unload")
_OF_THEIR_OWN = ("gaussian", "orthogonal")
_ROOT = "_mics_left_root"  # keeps the sharded model alive for what is left of it


def prepare_adapters(model: nn.Module) -> None:
    """Lets adapters be added to a sharded model, mixed, merged and unloaded.

    Args:
        model: The root.
    """
    for module in model.modules():
        for name in (*_ADDS, _MIXES):
            _wrap(module, name, functools.partial(_add, model, name))
        for name in (*_MERGES, *_LEAVES) if hasattr(module, "peft_config") else ():
            _wrap(module, name, functools.partial(_leave, model, name))


def _wrap(module: nn.Module, name: str, around: Callable[..., Any]) -> None:
    if callable(getattr(type(module), name, None)):
        method = getattr(module, name)
        module.__dict__[name] = functools.wraps(method)(functools.partial(around, method))


def _add(model: nn.Module, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Adds an adapter; collective. Its values become rank 0's."""
    _refuse_shards_of_base(name, [*args, *kwargs.values()])
    before = set(model.parameters())
    mixes = name == _MIXES
    with on_all_ranks(name), implicit_replication(), _whole_adapters(model) if mixes else nullcontext():
        result = method(*args, **kwargs)
        added = _made_whole(model, before)
        if added:
            device = communication_device(runtime_of(model).mesh.device_mesh.device_type)
            equalize_replicas(added.items(), device)
            size = sum(param.nbytes for param in added.values())
            inform(f"{name}: {len(added)} parameters ({size / 2**20:.1f} MiB) were added, whole on every rank.")
    return result


def _refuse_shards_of_base(name: str, arguments: list[Any]) -> None:
    """Refuses initial values that are factors of the weights, which are shards by now."""
    for argument in arguments:
        initial = getattr(argument, "init_lora_weights", True)
        if isinstance(initial, str) and initial.lower() not in _OF_THEIR_OWN:
            raise MiCSError(
                f"{name} with init_lora_weights={initial!r} takes the initial values from whole weights, but they are "
                "shards now. Add the adapter before the model is sharded, and choose it later by set_adapter; "
                f"init_lora_weights=True and {', '.join(map(repr, _OF_THEIR_OWN))} work here."
            )


def _made_whole(model: nn.Module, before: set[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Returns what was added; copies of shards, which are no unit's, become whole."""
    for module in model.modules():
        own = parameter_registry(module)
        for name, param in list(own.items()):
            if isinstance(param, DTensor) and param not in before:
                own[name] = nn.Parameter(param.full_tensor(), requires_grad=param.requires_grad)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if isinstance(buffer, DTensor):
                setattr(module, name, buffer.full_tensor())
    return {name: param for name, param in model.named_parameters() if param not in before}


@contextmanager
def _whole_adapters(model: nn.Module) -> Iterator[None]:
    """Puts whole values in the place of adapters' shards; adapters are small."""
    replaced: list[tuple[dict[str, Any], str, Any, nn.Parameter]] = []
    for layer in model.modules():
        children = layer.named_children() if is_adapter(layer) else ()
        for module in [inner for name, child in children if name != "base_layer" for inner in child.modules()]:
            own = parameter_registry(module)
            for name, param in list(own.items()):
                if isinstance(param, DTensor):
                    own[name] = nn.Parameter(param.full_tensor().detach(), requires_grad=param.requires_grad)
                    replaced.append((own, name, param, own[name]))
    try:
        yield
    finally:
        for own, name, param, stand_in in replaced:
            if own.get(name) is stand_in:
                own[name] = param


def _leave(model: nn.Module, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Merges or unloads adapters; collective, and weights stay shards."""
    if name != "unload" and any(map(holds_quantized, model.modules())):
        raise MiCSError(
            f"{name} writes to weights of 4 or 8 bits, which are shards now. Save the adapters by save_pretrained, and "
            "merge them in one process."
        )
    units: list[Any] = [layer for layer in model.modules() if is_adapter(layer) and isinstance(layer, FSDPModule)]
    with on_all_ranks(name), implicit_replication():
        left = method(*args, **kwargs)
    for layer in set(units).difference(model.modules()):
        _hand_over(layer, layer.get_base_layer())
    if isinstance(left, nn.Module) and left is not model and _ROOT not in left.__dict__:
        register_forward_method(left, "forward")
        left.__dict__[_ROOT] = model
        attach(left, runtime_of(model))
    return left


def _hand_over(unit: nn.Module, layer: nn.Module) -> None:
    """Lets a layer gather what its unit gathered, when that is gone from the model."""
    entry = "_mics_left_forward"
    setattr(unit, entry, layer.forward)
    register_fsdp_forward_method(unit, entry)
    layer.forward = getattr(unit, entry)
