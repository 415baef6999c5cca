"""FSDP2 on the units of a model: what becomes a unit, and in which dtypes it is gathered.

Trainer and tracer share it: a model is traced as it would be trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.core.class_names import keep_class_names
from lightning_mics.core.materialize import has_meta_tensors, materialize
from lightning_mics.core.replicas import equalize_replicas
from lightning_mics.core.units import Unit, is_batch_norm, plan_units, separate_batch_norms
from lightning_mics.core.whole import compute_in_param_dtype, move_whole, whole_parameters


def units_of(model: nn.Module, config: MiCSConfig, entries: Sequence[nn.Module] = ()) -> list[Unit]:
    """Returns the units of a model without the root, innermost first.

    Args:
        model: The model, not sharded yet.
        config: The settings; ``wrap``, ``ignore`` and ``param_dtype`` count.
        entries: Modules that must be units as well.

    Raises:
        MiCSConfigError: If ``wrap`` selects nothing, or what cannot be a unit.
    """
    units = plan_units(model, config.wrap, entries, set(whole_parameters(model, config).values()))
    return units if config.param_dtype is None else separate_batch_norms(model, units)


def apply_unit(
    unit: Unit, mesh: DeviceMesh, config: MiCSConfig, *, is_root: bool, whole: Collection[nn.Parameter] = ()
) -> None:
    """Shards the parameters of a unit that no unit inside of it has taken.

    Args:
        unit: Its modules.
        mesh: The one-dimensional mesh of the partition group.
        config: The settings; dtypes, ``reshard_after_forward`` and ``cpu_offload`` count.
        is_root: Whether it is the model. It is needed first in backward, and never freed before.
        whole: Parameters that are not sharded.
    """
    _make_contiguous(unit, whole)
    # Batch norms mix weights with running statistics, which keep their dtype; they take inputs of any.
    keeps_dtype = not is_root and all(is_batch_norm(module) for module in unit)
    casts_inputs = config.cast_forward_inputs is True or (not is_root and bool(config.cast_forward_inputs))
    policy = MixedPrecisionPolicy(
        param_dtype=None if keeps_dtype else as_dtype(config.param_dtype),
        reduce_dtype=as_dtype(config.reduce_dtype),
        output_dtype=as_dtype(config.output_dtype) if is_root else None,
        cast_forward_inputs=casts_inputs and not keeps_dtype,
    )
    fully_shard(
        unit[0] if len(unit) == 1 else list(unit),
        mesh=mesh,
        reshard_after_forward=config.reshard_after_forward and not is_root,
        mp_policy=policy,
        offload_policy=CPUOffloadPolicy(torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy(),
        ignored_params=set(whole) or None,
    )
    keep_class_names(unit)


def _make_contiguous(unit: Unit, whole: Collection[nn.Parameter]) -> None:
    """Lays out parameters in rows, as FSDP2 wants them: in another layout (``channels_last``) values are the same."""
    for module in unit:
        for param in module.parameters():
            if not isinstance(param, DTensor) and not param.is_contiguous() and param not in whole:
                param.data = param.data.contiguous()


def shard_units(
    model: nn.Module,
    units: Sequence[Unit],
    mesh: DeviceMesh,
    config: MiCSConfig,
    device: torch.device,
    filled_later: Collection[nn.Parameter] = (),
) -> None:
    """Shards a model unit by unit, so that no rank ever holds the whole of one on the meta device. Collective.

    What has values is compared first, all at once, before anything is changed.

    Args:
        model: The model.
        units: Its units, innermost first, without the root.
        mesh: The one-dimensional mesh of the partition group.
        config: The settings.
        device: Where this rank communicates.
        filled_later: Parameters on the meta device whose values come when they are sharded.

    Raises:
        MiCSError: On every rank, if one of them could not initialise a unit.
    """
    whole = set(whole_parameters(model, config).values())
    owned = {unit: owned_modules(unit, units) for unit in [*units, (model,)]}
    on_meta = {unit for unit, modules in owned.items() if any(map(has_meta_tensors, modules))}
    real = [module for unit, modules in owned.items() if unit not in on_meta for module in modules]
    equalize_replicas(_own_tensors(real).items(), device)
    for unit, modules in owned.items():
        if unit in on_meta:
            _materialize_alike(model, modules, config, device, set(filled_later))
        apply_unit(unit, mesh, config, is_root=unit == (model,), whole=whole)
    move_whole(whole, device)
    compute_in_param_dtype(model, whole, config)
    if config.param_dtype is not None and config.cast_forward_inputs == "units":
        _cast_inputs_of_norms(_modules_outside(model, {module for unit in units for module in unit}))


def owned_modules(unit: Unit, units: Sequence[Unit]) -> list[nn.Module]:
    """Returns the modules of a unit that are not another one's, children first."""
    nested = {module for other in units if other != unit for module in other}
    return [module for root in unit for module in _modules_outside(root, nested)]


def _materialize_alike(
    model: nn.Module,
    modules: Sequence[nn.Module],
    config: MiCSConfig,
    device: torch.device,
    filled_later: Collection[nn.Parameter],
) -> None:
    """Gives modules memory and values, the same on all ranks; what one of them raises ends all. Collective."""
    failure: Exception | None = None
    try:
        materialize(model, modules, torch.device("cpu") if config.cpu_offload else device, filled_later)
    except Exception as error:
        failure = error
    valued = {name: tensor for name, tensor in _own_tensors(modules).items() if tensor not in filled_later}
    if valued:
        equalize_replicas(valued.items(), device, failure)
    elif failure is not None:
        raise failure


def _modules_outside(root: nn.Module, nested: set[nn.Module]) -> Iterator[nn.Module]:
    """Yields ``root`` and the modules inside of it, children first, but nothing inside ``nested``."""
    for child in root.children():
        if child not in nested:
            yield from _modules_outside(child, nested)
    yield root


def _own_tensors(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Returns the parameters and buffers that modules own themselves, each once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, module in enumerate(modules):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[f"{type(module).__name__}[{index}].{name}"] = tensor
    return tensors


def _cast_inputs_of_norms(modules: Iterator[nn.Module]) -> None:
    """Casts what reaches a norm of the root: on CPUs autocast, which looks after the root's inputs, passes it over."""

    def cast(norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.device.type == "cpu" and first.dtype != norm.weight.dtype:
            return first.to(norm.weight.dtype), *args[1:]
        return args

    for module in modules:
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) and module.weight is not None:
            module.register_forward_pre_hook(cast)
