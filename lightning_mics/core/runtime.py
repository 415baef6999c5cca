"""What belongs to one sharded model: its settings, groups, ledger and accumulation window, in one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from lightning_mics.config import MiCSConfig
from lightning_mics.core._torch import is_compiled
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
        unit_names: Names of its FSDP units, root first (the root's name is ``"(root)"``).
        window: Its gradients.
        passes: What watches the root's forward and backward passes.
        choice: What ``shard_size="auto"`` decided, and why; ``config`` holds the number.
    """

    config: MiCSConfig
    mesh: MiCSMesh
    ledger: CommLedger
    unit_names: tuple[str, ...]
    window: AccumulationWindow = field(repr=False)
    passes: RootPasses = field(repr=False)
    choice: Any = None


# The module owns its runtime, which refers to its parameters and must not keep it alive when its user drops it.
_ATTRIBUTE = "_mics_runtime"


def attach(model: nn.Module, runtime: MiCSRuntime) -> None:
    """Makes a runtime that of ``model``."""
    model.__dict__[_ATTRIBUTE] = runtime


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


def register_forward_method(module: nn.Module, name: str) -> None:
    """Makes a method gather parameters as ``forward`` does, also if it calls ``forward``, and whatever it raises.

    Args:
        module: A sharded model; where nothing is sharded, nothing changes.
        name: Name of the method.
    """
    runtime = own_runtime(module)
    if runtime is not None:
        setattr(module, name, runtime.passes.telling(getattr(module, name)))
    register_fsdp_forward_method(module, name)


def compile_units(model: nn.Module, **options: Any) -> None:
    """Compiles the units of a sharded model in place, except the root and those that are compiled already.

    Args:
        model: The model.
        **options: Those of ``torch.compile``.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and own_runtime(module) is None and not is_compiled(module):
            module.compile(**options)
