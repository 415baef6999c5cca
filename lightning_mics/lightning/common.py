"""What the Trainer adapter and the Fabric adapter share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.distributed import _init_dist_connection, _sync_ddp_if_available
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch import Tensor, nn

from lightning_mics.config import MiCSConfig, check_switch
from lightning_mics.core.checks import check_layout
from lightning_mics.core.failures import explaining
from lightning_mics.core.groups import backend_for, check_backends, end_well
from lightning_mics.core.loss_scaling import use_sharded_scaler
from lightning_mics.core.runtime import register_forward_method
from lightning_mics.errors import MiCSConfigError, MiCSError
from lightning_mics.precision import supported_precision
from lightning_mics.sharding import mics_shard
from lightning_mics.topology import ClusterTopology, GroupLayout

if TYPE_CHECKING:
    from lightning_mics.auto import Sample


def check_arguments(
    save_distributed_checkpoint: object, storage_options: object, backend: object, timeout: object
) -> None:
    """Checks a strategy's own arguments.

    Raises:
        MiCSConfigError: If one has the wrong type.
    """
    check_switch("save_distributed_checkpoint", save_distributed_checkpoint)
    if storage_options is not None and not isinstance(storage_options, Mapping):
        raise MiCSConfigError(
            f"storage_options= must be a mapping, not {type(storage_options).__name__}. Try "
            "storage_options={'endpoint_url': 'https://storage.example.org'}."
        )
    if backend is not None and not isinstance(backend, str):
        raise MiCSConfigError(
            f"process_group_backend={backend!r} is not the name of a backend. Values that work: None, 'nccl' or 'gloo'."
        )
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0
        raise MiCSConfigError(
            f"timeout={timeout!r} is not a length of time. Try timeout=timedelta(seconds="
            f"{timeout if is_number else 1800}), of Python's datetime."
        )


def plan_topology(config: MiCSConfig, num_nodes: int, ranks_per_node: int) -> ClusterTopology:
    """Returns the cluster that Lightning was told about; ``node_size`` overrides its idea of a node.

    Raises:
        MiCSConfigError: If ``node_size`` does not fit it.
    """
    return ClusterTopology(world_size=num_nodes * ranks_per_node, node_size=config.node_size or ranks_per_node)


def plan_layout(config: MiCSConfig, num_nodes: int, ranks_per_node: int) -> GroupLayout | None:
    """Lays out the cluster; ``None`` where ``shard_size="auto"`` leaves that to the model.

    Pure, so that a wrong setting fails before any process is started.

    Raises:
        MiCSConfigError: If a setting does not fit the cluster.
    """
    return check_layout(config, plan_topology(config, num_nodes, ranks_per_node))


def require_layout(layout: GroupLayout | None) -> GroupLayout:
    """Returns a layout that is decided.

    Raises:
        MiCSError: If it is not.
    """
    if layout is None:
        raise MiCSError(
            "shard_size='auto' is decided when the module is set up, so there is no layout yet. Ask again after that, "
            "or give a number."
        )
    return layout


def register(registry: Any, strategy: type) -> None:
    """Makes a strategy known as ``"mics"``."""
    if "mics" not in registry:
        registry.register("mics", strategy, description="Shards within partition groups, replicates across them (MiCS)")


def set_ranks(environment: ClusterEnvironment, num_nodes: int, ranks_per_node: int) -> None:
    """Tells the cluster environment, and Lightning's rank-zero helpers, who this process is."""
    environment.set_global_rank(environment.node_rank() * ranks_per_node + environment.local_rank())
    environment.set_world_size(num_nodes * ranks_per_node)
    rank_zero_only: Any = utils_rank_zero_only
    rank_zero_only.rank = environment.global_rank()


def init_process_group(
    environment: ClusterEnvironment,
    device: torch.device,
    backend: str | None,
    timeout: timedelta | None,
    config: MiCSConfig,
) -> str:
    """Starts ``torch.distributed`` unless it runs already; returns the backend's name.

    Raises:
        MiCSConfigError: If there is no backend for what the settings put into host memory.
    """
    backend = backend or backend_for(device.type, cpu_offload=config.cpu_offload)
    device_id = device if device.type != "cpu" else None
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id)
    end_well()
    check_backends(config, device.type)
    return backend


def take_precision(plugin: Any) -> None:
    """Makes a precision plugin scale losses over all shards.

    Raises:
        MiCSConfigError: If it is one that MiCS cannot shard.
    """
    supported_precision(str(plugin.precision))
    if type(plugin).__name__.startswith(("FSDP", "DeepSpeed", "ModelParallel")):
        raise MiCSConfigError(
            f"{type(plugin).__name__} belongs to another strategy. Use precision={plugin.precision!r} instead."
        )
    use_sharded_scaler(plugin)


def check_sync_batchnorm(device: torch.device) -> None:
    """Checks that ``sync_batchnorm=True`` can work.

    Raises:
        MiCSConfigError: If it cannot: PyTorch synchronises batch norms on GPUs only.
    """
    if device.type == "cpu":
        raise MiCSConfigError("sync_batchnorm=True needs GPUs: PyTorch has no SyncBatchNorm for CPUs. Use False there.")


def shard(
    module: nn.Module,
    config: MiCSConfig,
    topology: ClusterTopology,
    device: torch.device,
    precision: Any,
    *,
    loader: Any,
    **options: Any,
) -> None:
    """Shards a module in place.

    Args:
        module: The module.
        config: The strategy's settings.
        topology: The cluster.
        device: This process's device.
        precision: The precision plugin.
        loader: A DataLoader that ``shard_size="auto"`` may take a sample of, or ``None``.
        **options: More for :func:`~lightning_mics.mics_shard`.
    """
    sample = _find_sample(module, loader) if config.shard_size == "auto" else None
    config = config.with_precision(str(precision.precision))
    mics_shard(module, config, topology=topology, device_type=device.type, sample=sample, **options)
    _gather_in_steps(module)


def _find_sample(module: nn.Module, loader: Any) -> Sample | None:
    """Finds what a rank computes with in a microstep, for ``shard_size="auto"``.

    A module's ``example_input_array`` has the inputs; the DataLoader knows how many of them make a micro-batch, and has
    a sample itself.
    """
    from lightning_mics.auto import Sample, sample_of

    first, example = sample_of(loader), getattr(module, "example_input_array", None)
    if example is not None:
        sample = Sample.of(example, through_forward=True)
        return sample if first is None else replace(sample, micro_batch=first.micro_batch)
    # With manual optimisation, steps run backward passes of their own.
    is_manual = not getattr(module, "automatic_optimization", True)
    return None if first is None else replace(first, through_forward=is_manual)


def _gather_in_steps(module: nn.Module) -> None:
    """Makes the steps of a LightningModule gather parameters, as ``forward`` does; Lightning calls them directly."""
    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        if hasattr(module, name):
            register_forward_method(module, name)


def barrier(device: torch.device) -> None:
    """Waits for all ranks, if there are others."""
    if not _is_initialized():
        return
    with explaining():
        if "cpu:" in dist.get_backend_config():
            dist.barrier()
        else:
            dist.barrier(device_ids=[device.index])


def broadcast(value: Any, src: int = 0) -> Any:
    """Returns rank ``src``'s value on every rank."""
    if not _is_initialized():
        return value
    values = [value]
    with explaining():
        dist.broadcast_object_list(values, src)
    return values[0]


def all_reduce(value: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
    """Reduces a tensor over all ranks; returns anything else as it is."""
    with explaining():
        return _sync_ddp_if_available(value, group, reduce_op=reduce_op) if isinstance(value, Tensor) else value


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
