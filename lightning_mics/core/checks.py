"""What is checked of a model and its settings before anything is changed, and before ranks communicate."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_mics.config import MiCSConfig
from lightning_mics.core.mesh import resolve_hierarchical
from lightning_mics.core.runtime import own_runtime
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ClusterTopology, GroupLayout


def check_layout(config: MiCSConfig, topology: ClusterTopology) -> GroupLayout | None:
    """Lays out a cluster; ``None`` where ``shard_size="auto"`` leaves that to the model.

    Raises:
        MiCSConfigError: If a setting does not fit the cluster.
    """
    layout = topology.layout("world" if config.shard_size == "auto" else config.shard_size)
    resolve_hierarchical(config, layout)
    if config.shard_size != "auto":
        layout.resolve_optimizer_shard_size(config.optimizer_shard_size)
    return None if config.shard_size == "auto" else layout


def check_model(model: nn.Module) -> None:
    """Checks that a model can be sharded.

    Raises:
        MiCSConfigError: If it has no parameters, some without a shape or sharded otherwise, or is wrapped already.
    """
    for name, module in model.named_modules():
        _check_module(module, name)
    params = list(model.named_parameters())
    if not params:
        raise MiCSConfigError(
            f"{type(model).__name__} has no parameters, so there is nothing to shard. Create its layers before "
            "sharding (in Lightning: in __init__ or configure_model)."
        )
    for name, param in params:
        problem = _problem_of(param)
        if problem is not None:
            raise MiCSConfigError(f"Parameter {name} {problem}")


def _check_module(module: nn.Module, name: str) -> None:
    for kind, label in (
        (DistributedDataParallel, "DistributedDataParallel"),
        (FullyShardedDataParallel, "FSDP1's FullyShardedDataParallel"),
        (FSDPModule, "FSDP2's fully_shard"),
    ):
        if isinstance(module, kind):
            by_us = " by mics_shard" if own_runtime(module) is not None else ""
            raise MiCSConfigError(
                f"The model is wrapped already{by_us}: {name or 'the root'!s} uses {label}. Pass the plain model."
            )
    if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise MiCSConfigError(
            f"{name or 'The model'} has sparse gradients, which cannot be reduce-scattered. Use sparse=False."
        )


def _problem_of(param: nn.Parameter) -> str | None:
    """Returns why a parameter cannot be sharded, and what would help; ``None`` if it can."""
    if isinstance(param, nn.parameter.UninitializedParameter):
        return "of a lazy module has no shape yet. Run one batch through the model first."
    if isinstance(param, DTensor):
        return "is a DTensor already. Pass the plain model."
    return None
