"""From a model of FSDP2's units to one that MiCS drives: its collectives, gradients, passes and runtime."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.core import transport
from lightning_mics.core._torch import (
    FSDP_MODULES,
    ReduceScatter,
    UnitParamGroup,
    answer_for_the_whole,
    average_gradients_over,
    name_params,
    reduce_unused_params,
    unit_param_groups,
)
from lightning_mics.core.apply import owned_modules
from lightning_mics.core.clipping import clip_whole_beside_shards
from lightning_mics.core.collectives import OnCall
from lightning_mics.core.copies import watch_copies
from lightning_mics.core.cpu.prefetch import ForwardPrefetch
from lightning_mics.core.drift import DriftCheck
from lightning_mics.core.failures import explaining
from lightning_mics.core.gathers import Gathers
from lightning_mics.core.gradients.agreement import CollectiveOrder
from lightning_mics.core.gradients.outside import weakly
from lightning_mics.core.gradients.second_hop import (
    AllReduce,
    AllReduceOfWideSums,
    ReduceToSlices,
    SecondHop,
    dtype_of_sums,
)
from lightning_mics.core.gradients.step import guard_steps
from lightning_mics.core.gradients.unit import UnitGradients
from lightning_mics.core.gradients.whole import WholeGradients
from lightning_mics.core.gradients.window import AccumulationWindow, WindowObserver
from lightning_mics.core.log import inform
from lightning_mics.core.masters import keep_masters
from lightning_mics.core.mesh import MiCSMesh
from lightning_mics.core.outputs import UnitOutputs
from lightning_mics.core.parameters import Parameters
from lightning_mics.core.passes import RootPasses
from lightning_mics.core.places import Call, of_world
from lightning_mics.core.row_norms import RowNorms
from lightning_mics.core.runtime import MiCSRuntime, attach
from lightning_mics.core.self_check import SelfCheck
from lightning_mics.core.slices import Slices
from lightning_mics.core.stages import choose_stages
from lightning_mics.core.units import Unit, backward_order, unit_names
from lightning_mics.errors import MiCSConfigError
from lightning_mics.metrics import CommLedger, Hop


@dataclass
class _Unit:
    """One FSDP unit on its way to being connected.

    Attributes:
        name: Its name.
        modules: Its modules.
        groups: Its parameters.
        two_stages: Whether its collectives run in two stages.
    """

    name: str
    modules: Unit
    groups: list[UnitParamGroup]
    two_stages: bool = False

    @property
    def module(self) -> nn.Module:
        """Its first module, which stands for it: ``fully_shard`` leaves one state for a group of modules."""
        return self.modules[0]

    @property
    def only_group(self) -> UnitParamGroup | None:
        """Its parameters, if they are one group."""
        return self.groups[0] if len(self.groups) == 1 else None


def _counting(unit: _Unit, index: int, hop: Hop, ledger: CommLedger, order: CollectiveOrder) -> OnCall:
    """Returns what is told of the bytes of each of a unit's collectives."""
    sizes, kind = ledger.sizes(unit.name, hop, hierarchical=unit.two_stages), int(hop is Hop.PARTITION_REDUCE)

    def count(message_bytes: int) -> None:
        sizes[message_bytes] += 1
        order.note(index, kind)

    return count


def connect(
    model: nn.Module,
    units: Sequence[Unit],
    config: MiCSConfig,
    mesh: MiCSMesh,
    *,
    observers: Sequence[WindowObserver] = (),
    choice: Any = None,
    whole: Mapping[str, nn.Parameter] | None = None,
) -> MiCSRuntime:
    """Gives the units of a sharded model their collectives, and the model its runtime.

    Args:
        model: The model, whose units FSDP2 shards already.
        units: Its units without the root.
        config: The settings.
        mesh: The groups.
        observers: What watches the first windows, beside the self-check.
        choice: What ``shard_size="auto"`` decided.
        whole: Parameters that are not sharded, by name.
    """
    found = _find_units(model, units, config, mesh)
    wire, reduce_dtype = as_dtype(config.replication_reduce_dtype), as_dtype(config.reduce_dtype) or torch.float32
    widening = 1 if wire is None else dtype_of_sums(wire, reduce_dtype).itemsize // wire.itemsize
    divided = mesh.layout.resolve_optimizer_shard_size(config.optimizer_shard_size)
    ledger = CommLedger(mesh.layout, divided, widening)
    order = CollectiveOrder()
    carrier = transport.transport_for(
        mesh.partition_group, mesh.device_mesh.device_type, cpu_offload=config.cpu_offload
    )
    slices, second_hop = _second_hop(mesh, carrier, wire, _gather_wire(config, mesh))
    if slices is not None and config.master_weights == "owners":
        keep_masters(model, [group for unit in found for group in unit.groups], slices)
    prefetch = carrier.prefetch([(unit.module, unit.only_group) for unit in found])
    gathers = Gathers([group for unit in found for group in unit.groups], mesh.layout.shard_size)
    reduce_scatters = _set_collectives(found, mesh, carrier, prefetch, ledger, order, gathers)
    name_params(model)
    reduce_unused_params(model)
    average_gradients_over(mesh.shard_mesh)
    _ignore_view_warnings()
    whole_gradients = WholeGradients(mesh, ledger, as_dtype(config.reduce_dtype))
    if whole:
        whole_gradients.add(whole)
        clip_whole_beside_shards()
    row_norms = RowNorms(model, mesh)
    window = AccumulationWindow(
        mesh,
        _gradients(found, reduce_scatters, carrier, config, second_hop),
        ledger,
        order,
        whole_gradients,
        overlap=not config.cpu_offload,
        slices=slices,
        observers=[*_checks(found, config, mesh, ledger), *observers, row_norms],
    )
    if slices is not None and slices.with_masters:
        fetch_stale = weakly(window.fetch_stale)  # what was loaded may be this rank's rows alone
        model.register_load_state_dict_post_hook(lambda *unused: fetch_stale())
    guard_steps(window)
    answer_for_the_whole(model.parameters(), explaining)
    parameters = Parameters(gathers.groups, list(map(row_norms.owned, gathers.groups)), order)
    window.watch_gathers()
    passes = RootPasses(model, window, prefetch, parameters)
    _watch_outputs(found, units, window)
    whole_gradients.on_backward = weakref.WeakMethod(passes.begin_backward_outside)
    runtime = MiCSRuntime(config, mesh, ledger, window, passes, gathers, choice)
    attach(model, runtime)
    watch_copies(model)
    return runtime


def _second_hop(
    mesh: MiCSMesh, carrier: transport.Transport, wire: torch.dtype | None, gather_wire: torch.dtype | None
) -> tuple[Slices | None, SecondHop]:
    """Returns how optimizer states are divided further than parameters, if they are, and the hop that leads there."""
    if mesh.optimizer_mesh is None or mesh.instance_group is None:
        group = mesh.replication_group
        if wire is None:
            return None, AllReduce(group)
        return None, AllReduceOfWideSums(group, wire, *carrier.replication(group, widens=True))
    group = mesh.optimizer_mesh.get_group("slice")
    all_gather, reduce_scatter = carrier.replication(group, widens=wire is not None)
    slices = Slices(mesh.optimizer_mesh, all_gather, gather_wire)
    clip_whole_beside_shards()
    answer_for_the_whole([slices.like(torch.empty(0), torch.empty(0))])
    return slices, ReduceToSlices(slices, reduce_scatter, mesh.instance_group, wire)


def _gather_wire(config: MiCSConfig, mesh: MiCSMesh) -> torch.dtype | None:
    """Returns the dtype in which rows that others have stepped on are fetched; ``None`` for their own.

    Raises:
        MiCSConfigError: If nothing is fetched, or forward passes would see other values than without it.
    """
    wire = as_dtype(config.replication_gather_dtype)
    if wire is None or mesh.layout.num_replicas == 1:
        return None
    name = str(wire).removeprefix("torch.")
    if mesh.optimizer_mesh is None:
        raise MiCSConfigError(
            f"replication_gather_dtype={name!r} has nothing to act on: with optimizer_shard_size="
            f"{config.optimizer_shard_size!r} no rows are fetched after a step. Use optimizer_shard_size='world', or "
            "leave it out.",
            setting="replication_gather_dtype",
        )
    if as_dtype(config.param_dtype) != wire:
        raise MiCSConfigError(
            f"replication_gather_dtype={name!r}, but parameters are computed with in another dtype (param_dtype="
            f"{config.param_dtype}), so forward passes would see other values. Use param_dtype={name!r} or such a "
            "precision, or leave it out.",
            setting="replication_gather_dtype",
        )
    return wire


def _checks(units: Sequence[_Unit], config: MiCSConfig, mesh: MiCSMesh, ledger: CommLedger) -> Iterator[WindowObserver]:
    """Yields what the settings want to have checked during training."""
    if config.verify:
        yield SelfCheck(mesh, ledger, [unit.module for unit in units])
    if config.verify_every and mesh.layout.num_replicas > 1:
        yield DriftCheck(mesh, config)
    elif config.verify_every:
        inform(f"verify_every={config.verify_every} has nothing to compare: shard_size is the world, of one replica.")
    elif config.on_mismatch != "raise":
        inform(f"on_mismatch={config.on_mismatch!r} does nothing without verify_every: try verify_every=100.")


def _set_collectives(
    found: Sequence[_Unit],
    mesh: MiCSMesh,
    carrier: transport.Transport,
    prefetch: ForwardPrefetch | None,
    ledger: CommLedger,
    order: CollectiveOrder,
    gathers: Gathers,
) -> list[ReduceScatter]:
    """Gives each unit its gather and its reduce-scatter; returns the latter."""
    reduce_scatters = []
    calls = _calls(found, mesh)
    for index, unit in enumerate(found):
        on_gather, on_reduce = (
            _counting(unit, index, hop, ledger, order) for hop in (Hop.PARTITION_GATHER, Hop.PARTITION_REDUCE)
        )
        if prefetch is not None:
            on_gather = prefetch.noting(index, on_gather)
        if unit.only_group is not None:
            on_gather = gathers.telling(unit.only_group, on_gather)
        stages = mesh.stages(unit.two_stages)
        gather, reduce = calls[index]
        reduce_scatters.append(carrier.reduce_scatter(stages, on_reduce, reduce))
        assert isinstance(unit.module, FSDPModule)
        unit.module.set_custom_all_gather(carrier.all_gather(stages, on_gather, gather))
        unit.module.set_custom_reduce_scatter(reduce_scatters[-1])
    return reduce_scatters


def _watch_outputs(found: Sequence[_Unit], units: Sequence[Unit], window: AccumulationWindow) -> None:
    """Lets backward passes find what units leave where FSDP2 does not look."""
    told = weakly(window.begin_backward)
    for index, unit in enumerate(found):
        modules = owned_modules(unit.modules, units)
        for group in unit.groups:
            UnitOutputs(unit.modules, modules, group, told, is_root=index == 0)


def _calls(found: Sequence[_Unit], mesh: MiCSMesh) -> list[tuple[Call, Call]]:
    """Returns what each unit's gather and reduce-scatter are to the watch over ranks that wait."""
    world = of_world()
    world.models += 1
    ranks = dist.get_process_group_ranks(mesh.partition_group)

    def call(what: str, unit: _Unit) -> Call:
        return Call("unit", f"the {what} of unit {unit.name!r}", ranks, mesh.stages(unit.two_stages), world.models)

    return [(call("gather", unit), call("reduction", unit)) for unit in found]


def _ignore_view_warnings() -> None:
    """Keeps FSDP2 from warning of units that return views.

    The hazard it tells of, that changing such a view in place takes FSDP2's hook out of the graph, is mended: there is
    another one behind it.
    """
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view", module=FSDP_MODULES)


def _find_units(model: nn.Module, units: Sequence[Unit], config: MiCSConfig, mesh: MiCSMesh) -> list[_Unit]:
    """Returns the units, root first, then in the order of a forward pass."""
    leaders = [(model,), *backward_order(model, units)[::-1]]
    names = unit_names(model, leaders)
    found = [_Unit(name, unit, unit_param_groups(unit[0])) for unit, name in zip(leaders, names, strict=True)]
    if mesh.hierarchical:
        dtype = as_dtype(config.param_dtype)
        sizes = [sum(group.gathered_bytes(dtype) for group in unit.groups) for unit in found]
        stages = [True] * len(found) if config.hierarchical is True else choose_stages(mesh, sizes)
        for unit, two_stages in zip(found, stages, strict=True):
            unit.two_stages = two_stages
    return found


def _gradients(
    units: Sequence[_Unit],
    reduce_scatters: Sequence[ReduceScatter],
    carrier: transport.Transport,
    config: MiCSConfig,
    second_hop: SecondHop,
) -> list[UnitGradients]:
    """Returns the gradients of all units in the order in which a backward pass finishes them, the root last."""
    dtype = as_dtype(config.reduce_dtype)
    found = []
    for unit, reduce_scatter in zip(units, reduce_scatters, strict=True):
        for group in unit.groups:
            group.unshard_outside_inference_mode()
            reductions = carrier.reductions(group, reduce_scatter)
            found.append(UnitGradients(unit.name, group, dtype, second_hop, reductions))
    return found[::-1]
