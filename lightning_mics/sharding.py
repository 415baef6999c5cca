"""``mics_shard``: from a plain module to a sharded one, with hierarchical collectives and two-hop synchronisation."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.core._torch import (
    AllGather,
    gather_beside,
    tend_root,
    unit_param_groups,
    unshard_outside_inference_mode,
)
from lightning_mics.core.collectives import (
    DeferrableReduceScatter,
    FlatAllGather,
    FlatReduceScatter,
    HierarchicalAllGather,
    HierarchicalReduceScatter,
    OnCall,
)
from lightning_mics.core.cpu.prefetch import ForwardPrefetch
from lightning_mics.core.gradients.window import ReplicationSync, attach_sync, reshard
from lightning_mics.core.log import inform
from lightning_mics.core.materialize import has_meta_tensors, materialize
from lightning_mics.core.mesh import (
    MiCSMesh,
    build_mesh,
    communication_device,
    detect_topology,
    require_agreement,
    require_process_group,
    resolve_hierarchical,
)
from lightning_mics.core.self_check import SelfCheck, check_groups, equalize_replicas
from lightning_mics.core.stages import choose_stages
from lightning_mics.core.units import Unit, backward_order, is_batch_norm, plan_units, separate_batch_norms
from lightning_mics.errors import MiCSConfigError, MiCSError
from lightning_mics.metrics import CommLedger, Hop
from lightning_mics.topology import ClusterTopology, GroupLayout

if TYPE_CHECKING:
    from lightning_mics.auto import AutoChoice, MemoryCheck


@dataclass(frozen=True)
class MiCSRuntime:
    """What belongs to one sharded model.

    Attributes:
        config: The settings it was sharded with.
        mesh: The groups it communicates in.
        ledger: The counts of its collectives.
        unit_names: Names of its FSDP units, root first (the root's name is ``"(root)"``).
        choice: What ``shard_size="auto"`` decided, and why; ``config`` holds the number.
    """

    config: MiCSConfig
    mesh: MiCSMesh
    ledger: CommLedger
    unit_names: tuple[str, ...]
    choice: AutoChoice | None = None


_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, MiCSRuntime] = weakref.WeakKeyDictionary()


def runtime_of(model: nn.Module) -> MiCSRuntime:
    """Returns the runtime of a sharded model, or of the first sharded module in it.

    Raises:
        MiCSError: If nothing in ``model`` is sharded by MiCS.
    """
    for module in model.modules():
        if module in _RUNTIMES:
            return _RUNTIMES[module]
    raise MiCSError(f"{type(model).__name__} is not sharded by MiCS. Call mics_shard(model, config) first.")


def is_sharded(model: nn.Module) -> bool:
    """Returns whether ``model`` or a module in it is sharded by MiCS."""
    return any(module in _RUNTIMES for module in model.modules())


def communication_ledger(model: nn.Module) -> CommLedger:
    """Returns the counts of a sharded model's collectives.

    Raises:
        MiCSError: If nothing in ``model`` is sharded by MiCS.
    """
    return runtime_of(model).ledger


def mics_shard(
    model: nn.Module,
    config: MiCSConfig | None = None,
    *,
    topology: ClusterTopology | None = None,
    device_type: str | None = None,
    entries: Sequence[nn.Module] = (),
    optimizer: Optimizer | Sequence[Optimizer] | type[Optimizer] | str | None = None,
    sample: Any = None,
    rebind: bool = True,
) -> nn.Module:
    """Shards a model over its partition group and replicates it over the others. Collective over the world.

    Every rank passes the same model. Values need not be equal: what differs becomes rank 0's. Parameters on the meta
    device are materialised unit by unit, so that no rank ever holds the whole model.

    Args:
        model: The model; changed in place.
        config: The settings; :class:`~lightning_mics.MiCSConfig` with defaults if not given.
        topology: The cluster, if the caller knows it better than the launcher's variables and host names.
        device_type: Where to train, ``"cuda"`` or ``"cpu"``; by default CUDA where there is one.
        entries: Modules inside ``model`` that are called, and run backward, outside of ``model.forward``.
        optimizer: Optimizers over the model's parameters that have not taken a step; they are pointed to the shards.
            ``shard_size="auto"`` counts their states. A class will do for that, or a name from ``torch.optim``;
            without any of them it assumes AdamW.
        sample: A micro-batch as ``model`` takes it, for ``shard_size="auto"`` to count activations.
        rebind: Whether ``optimizer`` is to train the shards; with ``False`` its states are only counted.

    Returns:
        ``model``, whose parameters are now DTensors: shards on this rank's partition group.

    Raises:
        MiCSConfigError: On every rank, before anything is changed, if a setting does not fit the cluster or the model.

    Example::

        torch.distributed.init_process_group()
        model = mics_shard(model, MiCSConfig(shard_size=8))
        optimizer = torch.optim.AdamW(model.parameters())
    """
    config = config or MiCSConfig()
    require_process_group()
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.node_size is not None:
        topology = ClusterTopology(world_size=dist.get_world_size(), node_size=config.node_size)
    # What every rank can tell alone is checked before the first collective.
    known = topology or ClusterTopology(world_size=dist.get_world_size(), node_size=dist.get_world_size())
    if config.shard_size != "auto":
        known.layout(config.shard_size)
    check_model(model)
    optimizers = _check_optimizers(optimizer)
    bound = [entry for entry in optimizers if isinstance(entry, Optimizer)] if rebind else []
    check_rebinding(model, bound)
    units = plan_units(model, config.wrap, entries)
    if config.param_dtype is not None:
        units = separate_batch_norms(model, units)
    topology = topology or detect_topology()
    layout = check_layout(config, topology)
    # A function's repr holds its address; what it selects is compared instead. Ranks may differ in memory.
    require_agreement("settings", (repr(config.replace(wrap="auto", memory_limit=None)), layout or topology))
    require_agreement("the units that wrap= selects", _unit_names(model, units))
    require_agreement("the model's parameters", _structure(model))
    choice, check = None, None
    if layout is None:
        choice, check = _decide(model, config, topology, device_type, optimizers, sample)
        config = config.replace(shard_size=choice.shard_size)
        layout = topology.layout(choice.shard_size)
    del optimizer, optimizers  # what is only counted must not keep the whole parameters alive
    mesh = build_mesh(config, layout, device_type)
    if config.verify:
        check_groups(mesh)

    if config.activation_checkpointing:
        _checkpoint_activations([unit for unit in units if unit[0] not in entries])
    sharded = ShardedParams()
    with sharded.remember(model) if bound else nullcontext():
        _shard(model, units, config, mesh, choice, check)
    for entry in bound:
        sharded.rebind(entry)
    return model


def _check_optimizers(optimizer: Any) -> list[Any]:
    """Returns optimizers as a list.

    Raises:
        MiCSConfigError: If something else is among them.
    """
    entries = list(optimizer) if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]
    for entry in entries:
        is_class = isinstance(entry, type) and issubclass(entry, Optimizer)
        if not (isinstance(entry, Optimizer | str) or is_class):
            raise MiCSConfigError(
                f"optimizer={entry!r} is none. Values that work: an optimizer of torch.optim's kind or a list of them; "
                "for shard_size='auto' also a class, or a name such as 'AdamW'."
            )
    return entries


def check_layout(config: MiCSConfig, topology: ClusterTopology) -> GroupLayout | None:
    """Lays out a cluster; ``None`` where ``shard_size="auto"`` leaves that to the model.

    Raises:
        MiCSConfigError: If a setting does not fit the cluster.
    """
    layout = topology.layout("world" if config.shard_size == "auto" else config.shard_size)
    resolve_hierarchical(config, layout)
    return None if config.shard_size == "auto" else layout


def _decide(
    model: nn.Module,
    config: MiCSConfig,
    topology: ClusterTopology,
    device_type: str,
    optimizers: Sequence[Any],
    sample: Any,
) -> tuple[AutoChoice, MemoryCheck]:
    """Decides what ``shard_size="auto"`` leaves open, and says so; prepares to see how true it comes."""
    # Planning needs PyTorch's tracers, which other settings do without.
    from lightning_mics.auto import MemoryCheck, choose_shard_size
    from lightning_mics.core.resources import Usage

    choice = choose_shard_size(model, config, topology, device_type=device_type, optimizers=optimizers, sample=sample)
    inform(str(choice))
    return choice, MemoryCheck(choice, Usage(model, communication_device(device_type)))


def check_model(model: nn.Module) -> None:
    """Checks that a model can be sharded.

    Raises:
        MiCSConfigError: If it has no parameters, scalar or empty parameters, or is wrapped already.
    """
    for name, module in model.named_modules():
        for kind, label in (
            (DistributedDataParallel, "DistributedDataParallel"),
            (FullyShardedDataParallel, "FSDP1's FullyShardedDataParallel"),
            (FSDPModule, "FSDP2's fully_shard"),
        ):
            if isinstance(module, kind):
                by_us = " by mics_shard" if module in _RUNTIMES else ""
                raise MiCSConfigError(
                    f"The model is wrapped already{by_us}: {name or 'the root'!s} uses {label}. Pass the plain model."
                )
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise MiCSConfigError(
                f"{name or 'The model'} has sparse gradients, which cannot be reduce-scattered. Use sparse=False."
            )
    params = list(model.named_parameters())
    if not params:
        raise MiCSConfigError(
            f"{type(model).__name__} has no parameters, so there is nothing to shard. Create its layers before "
            "sharding (in Lightning: in __init__ or configure_model)."
        )
    for name, param in params:
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise MiCSConfigError(
                f"Parameter {name} of a lazy module has no shape yet. Run one batch through the model first."
            )
        if param.is_complex():
            raise MiCSConfigError(
                f"Parameter {name} is complex, which FSDP2 cannot reduce. Hold its real and imaginary parts as a real "
                "parameter, which torch.view_as_complex reads."
            )
        if isinstance(param, DTensor):
            raise MiCSConfigError(f"Parameter {name} is a DTensor already. Pass the plain model.")
        if param.dim() == 0:
            raise MiCSConfigError(f"Parameter {name} is a scalar, which FSDP2 cannot shard. Give it the shape (1,).")
        if param.numel() == 0:
            raise MiCSConfigError(f"Parameter {name} has no elements, so it cannot be sharded. Leave it out.")


def _unit_names(model: nn.Module, units: list[Unit]) -> list[str]:
    names = {module: name or "(root)" for name, module in model.named_modules()}
    return [" + ".join(names[module] for module in unit) for unit in units]


def _structure(model: nn.Module) -> list[str]:
    return [f"{n} {tuple(p.shape)} {p.dtype} grad={p.requires_grad}" for n, p in model.named_parameters()]


def _shard(
    model: nn.Module,
    units: list[Unit],
    config: MiCSConfig,
    mesh: MiCSMesh,
    choice: AutoChoice | None,
    check: MemoryCheck | None,
) -> None:
    device = communication_device(mesh.device_mesh.device_type)
    ledger = CommLedger(mesh.layout)
    for unit in [*units, (model,)]:
        _prepare_states(model, unit, units, config, device)
        _apply_fully_shard(unit, config, mesh, is_root=unit == (model,))
    # ``fully_shard`` leaves one state for a group of modules; its first module stands for it.
    leaders = [(model,), *backward_order(model, units)[::-1]]
    unit_names = _unit_names(model, leaders)
    if config.param_dtype is not None and config.cast_forward_inputs == "units":
        _cast_inputs_of_norms([module for module in _modules_outside(model, {m for unit in units for m in unit})])
    # The hazard it tells of, changing a returned view in place, ends in an error; and nothing need be done about it.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view")
    sync, prefetch = _connect(leaders, unit_names, config, mesh, ledger, check)
    tend_root(
        model,
        on_forward_begin=prefetch.forward_begins if prefetch is not None else _nothing,
        on_forward_end=prefetch.forward_ended if prefetch is not None else _nothing,
        on_backward=sync.begin_backward,
        on_failure=sync.abandon,
    )
    attach_sync(model, sync)
    _RUNTIMES[model] = MiCSRuntime(config, mesh, ledger, tuple(unit_names), choice)
    if check is not None:
        check.begin()


def _cast_inputs_of_norms(modules: list[nn.Module]) -> None:
    """Casts what reaches a norm of the root: on CPUs autocast, which looks after the root's inputs, passes it over."""

    def cast(norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.device.type == "cpu" and first.dtype != norm.weight.dtype:
            return first.to(norm.weight.dtype), *args[1:]
        return args

    for module in modules:
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) and module.weight is not None:
            module.register_forward_pre_hook(cast)


def _checkpoint_activations(units: list[Unit]) -> None:
    blocks = [unit[0] for unit in units if len(unit) == 1 and any(unit[0].children())]
    if not blocks:
        raise MiCSConfigError(
            "activation_checkpointing=True, but no unit of the model is a block whose activations could be recomputed. "
            "Name the blocks with wrap=, or use activation_checkpointing=False."
        )
    for block in blocks:
        checkpoint(block)


def _prepare_states(model: nn.Module, unit: Unit, units: list[Unit], config: MiCSConfig, device: torch.device) -> None:
    """Materialises and equalises what the unit is about to take, while it is whole."""
    state_device = torch.device("cpu") if config.cpu_offload else device
    nested = {module for other in units if other != unit for module in other}
    modules = [module for root in unit for module in _modules_outside(root, nested)]
    if any(has_meta_tensors(module) for module in modules):
        materialize(model, modules, state_device)
    tensors: dict[str, Tensor] = {}
    for index, module in enumerate(modules):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if all(tensor is not other for other in tensors.values()):
                tensors[f"{type(module).__name__}[{index}].{name}"] = tensor
    equalize_replicas(tensors.items(), device)


def _modules_outside(root: nn.Module, nested: set[nn.Module]) -> Iterator[nn.Module]:
    """Yields ``root`` and the modules inside of it, children first, but nothing inside ``nested``."""
    for child in root.children():
        if child not in nested:
            yield from _modules_outside(child, nested)
    yield root


def _apply_fully_shard(unit: Unit, config: MiCSConfig, mesh: MiCSMesh, *, is_root: bool) -> None:
    # Batch norms mix weights with running statistics, which keep their dtype; they take inputs of any.
    keeps_dtype = not is_root and all(is_batch_norm(module) for module in unit)
    policy = MixedPrecisionPolicy(
        param_dtype=None if keeps_dtype else as_dtype(config.param_dtype),
        reduce_dtype=as_dtype(config.reduce_dtype),
        output_dtype=as_dtype(config.output_dtype) if is_root else None,
        cast_forward_inputs=not keeps_dtype
        and (config.cast_forward_inputs is True or (not is_root and bool(config.cast_forward_inputs))),
    )
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
    fully_shard(
        unit[0] if len(unit) == 1 else list(unit),
        mesh=mesh.shard_mesh,
        reshard_after_forward=config.reshard_after_forward and not is_root,
        mp_policy=policy,
        offload_policy=offload,
    )


def _nothing() -> None:
    pass


def _connect(
    leaders: list[Unit],
    names: list[str],
    config: MiCSConfig,
    mesh: MiCSMesh,
    ledger: CommLedger,
    check: MemoryCheck | None,
) -> tuple[ReplicationSync, ForwardPrefetch | None]:
    """Gives each unit its collectives, all units their second hop, and what has no streams its overlap."""
    groups = {name: unit_param_groups(unit[0]) for unit, name in zip(leaders, names, strict=True)}
    named = [(name, group) for name, found in groups.items() for group in found]
    for _, group in named:
        unshard_outside_inference_mode(group)
    sync = ReplicationSync(
        mesh,
        named,
        as_dtype(config.reduce_dtype),
        ledger,
        overlap=not config.cpu_offload,
        self_check=SelfCheck(mesh, ledger) if config.verify else None,
        after_window=None if check is None else check.after_window,
    )
    # An accelerator's streams overlap by themselves.
    overlaps = mesh.device_mesh.device_type == "cpu" and not config.cpu_offload
    prefetch = None
    if overlaps:
        gather_beside(leaders[0][0])
        firsts = [groups[name][0] if len(groups[name]) == 1 else None for name in names]
        prefetch = ForwardPrefetch([(unit[0], first) for unit, first in zip(leaders, firsts, strict=True)])
    gradients = {unit.name: unit for unit in sync.units}
    stages = _choose_stages([unit[0] for unit in leaders], config, mesh)
    for index, (unit, name) in enumerate(zip(leaders, names, strict=True)):
        module = unit[0]
        assert isinstance(module, FSDPModule)
        hierarchical = stages[index]
        recorder = _recorder(sync, prefetch, ledger, name, index, hierarchical)
        gather, reduce = _collectives(mesh, recorder, hierarchical)
        module.set_custom_all_gather(gather)
        module.set_custom_reduce_scatter(reduce)
        if overlaps and name in gradients:
            gradients[name].overlap_with(reduce)
    return sync, prefetch


def _recorder(
    sync: ReplicationSync,
    prefetch: ForwardPrefetch | None,
    ledger: CommLedger,
    unit: str,
    index: int,
    hierarchical: bool,
) -> Callable[[Hop], OnCall]:
    def recorder(hop: Hop) -> OnCall:
        kind = 0 if hop is Hop.PARTITION_GATHER else 1

        def on_call(message_bytes: int) -> None:
            ledger.record(unit, hop, message_bytes, hierarchical=hierarchical)
            sync.note_collective(index, kind)
            if prefetch is not None and hop is Hop.PARTITION_GATHER:
                prefetch.note_gather(index)

        return on_call

    return recorder


def _choose_stages(modules: Sequence[nn.Module], config: MiCSConfig, mesh: MiCSMesh) -> list[bool]:
    """Returns for each unit whether its collectives run in two stages."""
    if not mesh.hierarchical or config.hierarchical is True:
        return [mesh.hierarchical] * len(modules)
    dtype = as_dtype(config.param_dtype)
    groups = [unit_param_groups(module) for module in modules]
    return choose_stages(mesh, [sum(group.gathered_bytes(dtype) for group in unit) for unit in groups])


def _collectives(
    mesh: MiCSMesh, recorder: Callable[[Hop], OnCall], hierarchical: bool
) -> tuple[AllGather, DeferrableReduceScatter]:
    on_gather, on_reduce = recorder(Hop.PARTITION_GATHER), recorder(Hop.PARTITION_REDUCE)
    if not hierarchical or mesh.intra_group is None or mesh.inter_group is None:
        return FlatAllGather(on_gather), FlatReduceScatter(on_reduce)
    return (
        HierarchicalAllGather(mesh.intra_group, mesh.inter_group, on_gather),
        HierarchicalReduceScatter(mesh.intra_group, mesh.inter_group, on_reduce),
    )


class ShardedParams:
    """Remembers which shard replaced which parameter, so that optimizers built before can be pointed to the shards."""

    def __init__(self) -> None:
        # Parameters that nobody holds any more are forgotten, and their memory with them.
        self._shards: MutableMapping[Tensor, nn.Parameter] = WeakIdKeyDictionary()

    @contextmanager
    def remember(self, model: nn.Module) -> Iterator[None]:
        """Notes what becomes of the parameters of ``model``, which is sharded inside this context."""
        before = dict(model.named_parameters())
        yield
        for name, shard in model.named_parameters():
            self._shards[before[name]] = shard

    def rebind(self, optimizer: Optimizer) -> None:
        """Points an optimizer to the shards of its parameters.

        Raises:
            MiCSConfigError: If it has taken steps on the parameters as they were.
        """
        for group in optimizer.param_groups:
            if optimizer.state and any(param in self._shards for param in group["params"]):
                _refuse_used(optimizer)
            group["params"] = [self._shards.get(param, param) for param in group["params"]]

    def check(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Checks that an optimizer can be pointed to the shards of ``model``.

        Raises:
            MiCSConfigError: If it has taken steps.
        """
        params = set(model.parameters())
        if optimizer.state and any(param in params for group in optimizer.param_groups for param in group["params"]):
            _refuse_used(optimizer)


def _refuse_used(optimizer: Optimizer) -> None:
    raise MiCSConfigError(
        f"{type(optimizer).__name__} has taken steps already, and its states belong to the whole model. Shard the "
        "model first, then create the optimizer and load its checkpoint."
    )


def check_rebinding(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Checks that optimizers can be pointed to the shards of a model.

    Raises:
        MiCSConfigError: If an optimizer has states already, or parameters that are not the model's.
    """
    params, sharded = set(model.parameters()), ShardedParams()
    for optimizer in optimizers:
        sharded.check(optimizer, model)
        if any(param not in params for group in optimizer.param_groups for param in group["params"]):
            raise MiCSConfigError(
                "An optimizer holds parameters that the model does not have. Create it from model.parameters()."
            )


def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clips the gradients of a sharded model by their global norm, the same as on one process.

    Call it after the window's last backward pass. Collective over the partition group.

    Args:
        model: A sharded model.
        max_norm: Largest norm allowed.
        norm_type: Order of the norm; ``inf`` for the largest magnitude.

    Returns:
        The norm before clipping, a plain scalar tensor, equal on all ranks.
    """
    reshard(model)
    return clip_parameters_(list(model.parameters()), max_norm, norm_type)


def clip_parameters_(
    params: list[nn.Parameter], max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Does the work of :func:`clip_grad_norm_` for some parameters."""
    grads = [param.grad for param in params if param.grad is not None]
    norm = _total_norm(grads, norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"The total norm of the gradients is {norm.item()}, so it cannot be clipped.")
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def _total_norm(grads: list[Tensor], norm_type: float) -> Tensor:
    """Returns the norm of all gradients together, from one number a rank.

    Not left to DTensor: the largest magnitude of an empty shard is no number to it, and it would send offloaded norms
    through the host.
    """
    locals_by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for grad in grads:
        mesh, local = (grad.device_mesh, grad._local_tensor) if isinstance(grad, DTensor) else (None, grad)
        locals_by_mesh.setdefault(mesh, []).append(local)
    is_max = math.isinf(norm_type)
    parts = []
    for mesh, locals_ in locals_by_mesh.items():
        norm = torch.nn.utils.get_total_norm([local for local in locals_ if local.numel()], norm_type).double()
        part = norm if is_max else norm**norm_type
        if mesh is not None:
            part = part.to(communication_device(mesh.device_type))
            dist.all_reduce(part, op=dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=mesh.get_group())
        parts.append(part)
    if not parts:
        return torch.zeros(())
    together = torch.stack([part.to(parts[0].device) for part in parts])
    return (together.max() if is_max else together.sum() ** (1 / norm_type)).float()
