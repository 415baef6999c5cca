"""Which parameters stay whole on every rank: those that FSDP2 cannot shard, and those that a user wants so.

Two parameters may be one memory, such as a matrix and its transpose (adapters of PEFT on an embedding and on the head
tied to it). Shards would be copies, which drift apart. Whole ones stay one memory.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.core._torch import BatchNorm, is_unread, outside_graphs, parameter_registry, plain_name
from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import did_you_mean

# Errors name as many parameters as fit into a line.
_NAMED = 12


def whole_parameters(model: nn.Module, config: MiCSConfig) -> dict[str, nn.Parameter]:
    """Returns the parameters that stay whole, by name.

    Args:
        model: The model, not sharded yet.
        config: The settings; ``ignore`` counts.

    Raises:
        MiCSConfigError: If an entry of ``ignore`` selects nothing, or no parameter is left to shard.
    """
    params = dict(model.named_parameters())
    chosen = {param for entry in _entries(config.ignore) for param in _selected(model, params, entry)}
    chosen |= sharing_memory(params.values())
    whole = {name: param for name, param in params.items() if param in chosen or not can_be_sharded(param)}
    if params and len(whole) == len(params):
        raise MiCSConfigError(
            f"ignore={config.ignore!r} leaves no parameter of {type(model).__name__} to shard: a scalar, one without "
            "elements, a complex one and those that share memory stay whole by themselves. Leave some to shard.",
            setting="ignore",
        )
    return whole


def can_be_sharded(param: Tensor) -> bool:
    """Returns whether FSDP2 can shard a parameter and reduce its gradients."""
    return param.dim() > 0 and param.numel() > 0 and not param.is_complex()


def sharing_memory(params: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Returns the parameters whose memory overlaps that of others."""
    spans: dict[StorageWeakRef, list[tuple[int, int, nn.Parameter]]] = {}
    for param in params:
        if not is_unread(param) and param.numel() and not param.is_meta:
            begin = int(param.storage_offset()) * param.itemsize
            last = sum((int(size) - 1) * int(step) for size, step in zip(param.shape, param.stride(), strict=True))
            storage = StorageWeakRef(param.untyped_storage())
            spans.setdefault(storage, []).append((begin, begin + (last + 1) * param.itemsize, param))
    found: set[nn.Parameter] = set()
    for members in spans.values():
        furthest, holder = 0, members[0][2]
        for begin, end, param in sorted(members, key=lambda span: span[:2]):
            if begin < furthest:
                found |= {holder, param}
            if end > furthest:
                furthest, holder = end, param
    return found


def move_whole(params: Iterable[nn.Parameter], device: torch.device) -> None:
    """Puts parameters on a device; those that share memory go on sharing it."""
    moved: dict[StorageWeakRef, Tensor] = {}
    params = list(params)
    shared = sharing_memory(params)
    for param in params:
        if param.device == device:
            continue
        if param not in shared:
            param.data = param.data.to(device)
            continue
        storage, size, stride = param.untyped_storage(), param.size(), param.stride()
        flat = param.data.as_strided((storage.nbytes() // param.itemsize,), (1,), 0)
        flat = moved.setdefault(StorageWeakRef(storage), flat.to(device))
        param.data = flat.as_strided(size, stride, param.storage_offset())


def _entries(ignore: Any) -> list[Any]:
    is_one = isinstance(ignore, str | type | nn.Module | Tensor) or callable(ignore)
    return [ignore] if is_one else list(ignore)


def _selected(model: nn.Module, params: dict[str, nn.Parameter], entry: Any) -> list[nn.Parameter]:
    if isinstance(entry, Tensor):
        found = [param for param in params.values() if param is entry]
    elif isinstance(entry, nn.Module):
        found = list(entry.parameters()) if any(module is entry for module in model.modules()) else []
    elif isinstance(entry, str):
        found = _named(model, params, entry)
    elif isinstance(entry, type):
        found = [param for module in model.modules() if isinstance(module, entry) for param in module.parameters()]
    else:
        return _told(model, params, entry)
    if not found:
        shown = tuple(entry.shape) if isinstance(entry, Tensor) else entry
        known = [plain_name(name) for name in params]
        hint = did_you_mean(str(entry), known, f"It has: {', '.join(known[:_NAMED])}.")
        raise MiCSConfigError(
            f"ignore={shown!r} selects no parameter of {type(model).__name__}. {hint} Names, patterns such as "
            "'*.bias', names and classes of modules work.",
            setting="ignore",
        )
    return found


def _named(model: nn.Module, params: dict[str, nn.Parameter], entry: str) -> list[nn.Parameter]:
    """Returns the parameters of a name or pattern, or those inside the modules of a name, pattern or class name."""
    found = [param for name, param in params.items() if _matches(name, entry)]
    for name, module in model.named_modules():
        if (name and _matches(name, entry)) or entry in {cls.__name__ for cls in type(module).__mro__[:-1]}:
            found += module.parameters()
    return found


def _matches(name: str, entry: str) -> bool:
    return entry in (name, plain_name(name)) or fnmatch.fnmatchcase(plain_name(name), entry)


def _told(model: nn.Module, params: dict[str, nn.Parameter], function: Any) -> list[nn.Parameter]:
    """Asks a function of a module, or of a parameter's name and the parameter."""
    if len(inspect.signature(function).parameters) > 1:
        return [param for name, param in params.items() if function(plain_name(name), param)]
    return [param for module in model.modules() if function(module) for param in module.parameters()]


def compute_in_param_dtype(model: nn.Module, whole: Collection[nn.Parameter], config: MiCSConfig) -> None:
    """Lets modules compute with their whole parameters in ``param_dtype``, as they do with those that are gathered.

    What is not read in the forward pass of the module that owns it keeps its dtype.
    """
    dtype = as_dtype(config.param_dtype)
    if dtype is None or not whole:
        return
    for module in model.modules():
        names = [name for name, param in module.named_parameters(recurse=False) if param in whole]
        if names and not isinstance(module, BatchNorm):
            _CastInForward(module, names, dtype)


class _CastInForward:
    """Puts copies of a module's parameters in another dtype in their place while its forward pass runs."""

    def __init__(self, module: nn.Module, names: list[str], dtype: torch.dtype) -> None:
        self._names, self._dtype = names, dtype
        self._kept: list[dict[str, Any]] = []
        module.register_forward_pre_hook(outside_graphs(self._cast))
        module.register_forward_hook(outside_graphs(self._restore), always_call=True)

    def _cast(self, module: nn.Module, args: Any) -> None:
        held = parameter_registry(module)
        kept = {name: held[name] for name in self._names if name in held}
        self._kept.append(kept)
        for name, param in kept.items():
            if isinstance(param, Tensor) and param.is_floating_point() and param.dtype != self._dtype:
                held[name] = param.to(self._dtype)

    def _restore(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._kept:
            parameter_registry(module).update(self._kept.pop())
