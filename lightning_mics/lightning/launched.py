"""Whether what Lightning was told of the cluster is what a launcher has started."""

from __future__ import annotations

import os

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment

from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ClusterTopology


def check_launch(environment: ClusterEnvironment, num_nodes: int, devices: int, node_size: int | None = None) -> None:
    """Compares ``devices`` and ``num_nodes`` with the processes that somebody else has started.

    Each rank tells by itself, before anything connects.

    Args:
        environment: Who knows of them; where Lightning is still to start processes itself there is nothing to compare.
        num_nodes: Lightning's number of nodes.
        devices: Its number of devices on each.
        node_size: The setting, for nodes that are to count as larger or smaller than they are.

    Raises:
        MiCSConfigError: If there are other processes than that, or in other places.
    """
    world_size = _world_size(environment)
    if world_size is None:
        return
    real = _topology(environment, world_size) if node_size is None else None
    told = f"devices={devices} and num_nodes={num_nodes}"
    if devices * num_nodes != world_size:
        problem = f"{told} make {devices * num_nodes} process(es), but {world_size} are running"
    elif real is not None and real.node_size != devices:
        problem = f"{told} do not fit the {world_size} processes that are running, {real.node_size} on each node"
    elif environment.local_rank() >= devices or environment.node_rank() >= num_nodes:
        problem = (
            f"{told} do not fit the {world_size} processes that are running: one of them is number "
            f"{environment.local_rank()} on node {environment.node_rank()}"
        )
    else:
        _check_order(environment, devices)
        return
    raise MiCSConfigError(
        f"{problem} ({type(environment).__name__}). {_works(real, world_size)} devices='auto' counts the "
        "accelerators that a process sees, and 1 on CPUs."
    )


def _check_order(environment: ClusterEnvironment, devices: int) -> None:
    """Checks that processes are numbered node by node, where an environment knows their numbers.

    Raises:
        MiCSConfigError: If they are not.
    """
    if _is_told_by_us(environment):
        return
    rank, node, local = environment.global_rank(), environment.node_rank(), environment.local_rank()
    if rank != node * devices + local:
        raise MiCSConfigError(
            f"Ranks are not numbered node by node: rank {rank} is number {local} on node {node}, with {devices} a node "
            f"({type(environment).__name__}). Launch with block placement (for SLURM: --distribution=block)."
        )


def _works(real: ClusterTopology | None, world_size: int) -> str:
    if world_size == 1:
        return "Set devices=1 and num_nodes=1."
    if real is None:
        return f"Set devices= to the number of processes on a node, so that devices x num_nodes is {world_size}."
    return f"Set devices={real.node_size} and num_nodes={real.num_nodes}."


def _world_size(environment: ClusterEnvironment) -> int | None:
    """Returns the number of processes that are running; ``None`` where nobody knows it yet."""
    if not environment.creates_processes_externally:
        return None
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if _is_told_by_us(environment):
        value = os.environ.get("WORLD_SIZE", "")
        return int(value) if value.isdigit() else None
    return environment.world_size()


def _topology(environment: ClusterEnvironment, world_size: int) -> ClusterTopology | None:
    """Returns the real nodes, as far as the launcher tells.

    Raises:
        MiCSConfigError: If nodes hold different numbers of processes.
    """
    if _is_told_by_us(environment) and "LOCAL_WORLD_SIZE" not in os.environ:
        return None  # variables of a job around Lightning's own processes say nothing of these
    return ClusterTopology.from_env(world_size)


def _is_told_by_us(environment: ClusterEnvironment) -> bool:
    """Returns whether an environment only knows the world that Lightning tells it, and not what is running."""
    return type(environment).world_size is LightningEnvironment.world_size
