"""What belongs to one sharded model: its settings, groups, ledger and accumulation window, in one object."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from lightning_mics.config import MiCSConfig
from lightning_mics.core._torch import is_compiled
from lightning_mics.core.gathers import Gathers
from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.core.mesh import MiCSMesh
from lightning_mics.core.passes import RootPasses
from lightning_mics.errors import MiCSError
from lightning_mics.metrics import CommLedger


@dataclass(frozen=True)
class MiCSRuntime:
    """What belongs to one sharded model.

    Attributes:
        config: The settings it was sharded with.
        mesh: The groups it communicates in.
        ledger: The counts of its collectives.
        window: Its gradients.
        passes: What watches the root's forward and backward passes.
        gathers: What its units gather.
        choice: What ``shard_size="auto"`` decided, and why; ``config`` holds the number.
    """

    config: MiCSConfig
    mesh: MiCSMesh
    ledger: CommLedger
    window: AccumulationWindow = field(repr=False)
    passes: RootPasses = field(repr=False)
    gathers: Gathers = field(repr=False)
    choice: Any = None


# The module owns its runtime, which refers to its parameters and must not keep it alive when its user drops it.
_ATTRIBUTE = "_mics_runtime"
_ROOTS: WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = WeakKeyDictionary()


def attach(model: nn.Module, runtime: MiCSRuntime) -> None:
    """Makes a runtime that of ``model``."""
    model.__dict__[_ATTRIBUTE] = runtime
    for module in model.modules():
        _ROOTS.setdefault(module, weakref.ref(model))


def own_runtime(module: nn.Module) -> MiCSRuntime | None:
    """Returns the runtime of exactly this module; ``None`` if it is not the root of a sharded model."""
    return module.__dict__.get(_ATTRIBUTE)


def runtimes_in(model: nn.Module) -> list[MiCSRuntime]:
    """Returns the runtime of a sharded model, or those of all sharded models inside a module.

    Raises:
        MiCSError: If there is none.
    """
    own = own_runtime(model)  # no sharded model has another one in it
    found = [own] if own is not None else [run for run in map(own_runtime, model.modules()) if run is not None]
    if not found:
        raise MiCSError(f"{type(model).__name__} is not sharded by MiCS. Call mics_shard(model, config) first.")
    return found


def runtime_of(model: nn.Module) -> MiCSRuntime:
    """Returns the runtime of a sharded model, or of the first sharded module in it.

    Raises:
        MiCSError: If nothing in ``model`` is sharded by MiCS.
    """
    return runtimes_in(model)[0]


def is_sharded(model: nn.Module) -> bool:
    """Returns whether ``model`` or a module in it is sharded by MiCS."""
    return any(own_runtime(module) is not None for module in model.modules())


def communication_ledger(model: nn.Module) -> CommLedger:
    """Returns the counts of a sharded model's collectives.

    Raises:
        MiCSError: If nothing in ``model`` is sharded by MiCS.
    """
    return runtime_of(model).ledger


def adopt_masters(model: nn.Module) -> None:
    """Makes what was read into the masters of a model that of its shards. Collective over the world."""
    if is_sharded(model):
        for runtime in runtimes_in(model):
            runtime.window.adopt_masters()


def register_forward_method(module: nn.Module, name: str) -> None:
    """Makes a method gather parameters as ``forward`` does, also if it calls ``forward``, and whatever it raises.

    Args:
        module: A sharded model, or a module in one: its method is then a pass of the whole model, unless it runs inside
            of one. Where nothing is sharded, nothing changes.
        name: Name of the method.
    """
    runtime, root = own_runtime(module), _root_of(module)
    if runtime is not None:
        method = getattr(module, name)
        setattr(module, name, runtime.passes.telling(method))
        register_fsdp_forward_method(module, name)
        # Who asks what a method takes (Lightning: also the batch's index?) looks beneath one decorator.
        registered = getattr(module, name)
        vars(getattr(registered, "__func__", registered))["__wrapped__"] = getattr(method, "__wrapped__", method)
    elif root is not None:
        _register_inner_method(root, module, name)
    else:
        register_fsdp_forward_method(module, name)


def _root_of(module: nn.Module) -> nn.Module | None:
    """Returns the sharded model that a module lies in, as long as it lives."""
    found = _ROOTS.get(module)
    return None if found is None else found()


def _register_inner_method(root: nn.Module, module: nn.Module, name: str) -> None:
    method, entry = getattr(module, name), f"_mics_{name}_{id(module)}"
    setattr(root, entry, method)
    register_forward_method(root, entry)
    weak = weakref.ref(root)

    @functools.wraps(method)
    def pass_of_the_root(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(weak(), entry)(*args, **kwargs)

    setattr(module, name, MethodType(pass_of_the_root, module))


def prepare_generation(model: nn.Module) -> None:
    """Makes ``generate`` of a sharded model, and of models in it, a pass of it, wherever it is called.

    With models of transformers it is one on every rank until the last is done: they see to that where a module says
    that it is managed.
    """
    for module in model.modules():
        if not callable(getattr(type(module), "generate", None)):
            continue
        module._is_fsdp_managed_module = True  # type: ignore[assignment]  # transformers asks for this name
        register_forward_method(module, "generate")
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "GenerationMixin" in kinds:  # no backward pass comes: the root is freed then
            method: Any = module.generate
            module.generate = MethodType(torch.no_grad()(method.__func__), module)  # type: ignore[assignment]
            _end_sequences_together(module)


def _end_sequences_together(module: Any) -> None:
    """Lets ``generate`` ask the ranks that run it, where some may run none: transformers asks the whole world."""
    if not hasattr(module, "_has_unfinished_sequences"):
        return

    def has_unfinished_sequences(module: nn.Module, is_done: Any, synced_gpus: bool, *args: Any, **kwargs: Any) -> bool:
        root = _root_of(module)
        runtime = None if root is None else own_runtime(root)
        if not synced_gpus or runtime is None or runtime.gathers.any_unfinished is None:
            return type(module)._has_unfinished_sequences(module, is_done, synced_gpus, *args, **kwargs)  # type: ignore
        return runtime.gathers.any_unfinished(not is_done)

    module._has_unfinished_sequences = MethodType(has_unfinished_sequences, module)


def compile_units(model: nn.Module, **options: Any) -> None:
    """Compiles the units of a sharded model in place, except the root and those that are compiled already.

    Args:
        model: The model.
        **options: Those of ``torch.compile``.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and own_runtime(module) is None and not is_compiled(module):
            module.compile(**options)
