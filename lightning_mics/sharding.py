"""``mics_shard``: from a plain module to a sharded one, with hierarchical collectives and two-hop synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_mics.config import MiCSConfig, chooses_modules
from lightning_mics.core._torch import is_unread
from lightning_mics.core.adapters import prepare_adapters
from lightning_mics.core.apart import meet
from lightning_mics.core.apply import shard_units, units_of
from lightning_mics.core.checks import check_layout, check_model
from lightning_mics.core.connect import connect
from lightning_mics.core.gradients.outside import hooks_in
from lightning_mics.core.groups import check_backends, end_well
from lightning_mics.core.log import inform
from lightning_mics.core.masters import check_masters
from lightning_mics.core.materialize import check_initializers
from lightning_mics.core.mesh import (
    build_mesh,
    communication_device,
    detect_topology,
    require_process_group,
)
from lightning_mics.core.optimizers import ShardedParams, as_optimizers, check_rebinding
from lightning_mics.core.plain import adopt_beside_shards, note_replaced, note_replaced_params, watch
from lightning_mics.core.quantized import split_quantized
from lightning_mics.core.recompute import blocks_to_recompute, checkpoint_activations
from lightning_mics.core.replicas import require_agreement
from lightning_mics.core.runtime import prepare_generation
from lightning_mics.core.self_check import check_groups
from lightning_mics.core.units import Unit, unit_names
from lightning_mics.core.whole import whole_parameters
from lightning_mics.pretrained.filling import agree_on_unread, waiting
from lightning_mics.topology import ClusterTopology

if TYPE_CHECKING:
    from lightning_mics.auto import AutoChoice, MemoryCheck


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
    device are materialised unit by unit, so that no rank ever holds the whole model. What
    :func:`~lightning_mics.load_pretrained` has left unread is read here: by each rank its own rows.

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
    end_well()
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.node_size is not None:
        topology = ClusterTopology(world_size=dist.get_world_size(), node_size=config.node_size)
    optimizers = as_optimizers(optimizer)
    bound = [entry for entry in optimizers if isinstance(entry, Optimizer)] if rebind else []
    check_backends(config, device_type)
    check_model(model)
    sharded = ShardedParams()
    sharded.forget(split_quantized(model, is_planned=config.shard_size == "auto"))
    asked, whole = config, whole_parameters(model, config)
    config = config.replace(ignore=tuple(whole))  # by name, whatever selects them
    config = config.with_trained(param.dtype for param in model.parameters() if param.requires_grad)
    units = _check_alone(model, config, topology, entries, bound)
    blocks = blocks_to_recompute(model, units, config, entries)
    meet("sharding a model with MiCS")
    topology = topology or detect_topology()
    layout = check_layout(config, topology)
    device = communication_device(device_type)
    unread_here = [is_unread(param) for param in model.parameters()]
    alike = _check_together(model, config, units, blocks, layout or topology, device, unread_here)
    if any(unread_here) or not alike:
        agree_on_unread(model, device)
    choice, check = None, None
    with waiting(model) as unread:
        if layout is None:
            choice, check = _decide(model, config, topology, device_type, optimizers, sample)
            config = config.replace(shard_size=choice.shard_size)
            layout = topology.layout(choice.shard_size)
        del optimizer, optimizers  # what is only counted must not keep the whole parameters alive
        mesh = build_mesh(config, layout, device_type)
        if config.verify:
            check_groups(mesh)
        checkpoint_activations(blocks, config, device_type)
        hooks = hooks_in(model)
        note_replaced(model)
        with sharded.remember(model) if bound else nullcontext():
            shard_units(model, units, mesh.shard_mesh, config, device, unread.params)
        note_replaced_params(unread.params)
    unread.fill(model, mesh)
    observers = [] if check is None else [check]
    config = config.replace(ignore=asked.ignore)
    runtime = connect(model, units, config, mesh, observers=observers, choice=choice, whole=whole)
    runtime.window.outside.carry(hooks)
    if check is not None:
        check.begin()
    watch(model)
    for entry in bound:
        sharded.rebind(entry)
        adopt_beside_shards(entry)
    prepare_generation(model)
    prepare_adapters(model)
    if any(hasattr(type(module), "save_pretrained") for module in model.modules()):
        from lightning_mics.checkpoint.savers import save_pretrained_whole  # others need no checkpoints

        save_pretrained_whole(model)
    return model


def _check_alone(
    model: nn.Module,
    config: MiCSConfig,
    topology: ClusterTopology | None,
    entries: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
) -> list[Unit]:
    """Checks what a rank can tell alone, before the first collective; returns the model's units."""
    check_masters(config)
    known = topology or ClusterTopology(world_size=dist.get_world_size(), node_size=dist.get_world_size())
    if config.shard_size != "auto":
        known.layout(config.shard_size)
    check_initializers(model)
    check_rebinding(model, optimizers)
    return units_of(model, config, entries)


def _check_together(
    model: nn.Module,
    config: MiCSConfig,
    units: Sequence[Unit],
    blocks: Sequence[nn.Module],
    groups: object,
    device: torch.device,
    unread: Sequence[bool],
) -> bool:
    """Checks that all ranks shard the same model in the same way; returns whether the same of it is unread on all.

    Collective over the world.
    """
    # A function's repr holds its address; what it selects is compared instead. Ranks may differ in memory.
    chooses = chooses_modules(config.activation_checkpointing)
    alike = config.replace(activation_checkpointing=True) if chooses else config
    values = {
        "settings": (repr(alike.replace(wrap="auto", memory_limit=None)), groups),
        "the units that wrap= selects": unit_names(model, units),
        "the modules that activation_checkpointing= selects": unit_names(model, [(block,) for block in blocks]),
        "the model's parameters": [
            f"{name} {tuple(param.shape)} {param.dtype} grad={param.requires_grad}"
            for name, param in model.named_parameters()
        ],
        "the model's buffers": [
            f"{name} {tuple(buffer.shape)} {buffer.dtype}" for name, buffer in model.named_buffers()
        ],
    }
    return require_agreement(values, device, beside=unread)


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
