"""From a layout to a DeviceMesh and its process groups."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.config import MiCSConfig
from lightning_mics.core import groups
from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import format_bytes
from lightning_mics.topology import ClusterTopology, GroupLayout

# The groups of a collective's stages, in the order of a gather: across nodes, then inside them; or one group of all.
Stages = Sequence[dist.ProcessGroup]
# One stage must win clearly: it sends more out of every node, which other traffic feels.
_CLEARLY = 0.95


@dataclass(frozen=True)
class StageTiming:
    """What a unit's collectives in one microstep (two gathers, one reduce-scatter) take.

    Attributes:
        message_bytes: Size of the message.
        one_stage: Seconds with flat collectives.
        two_stages: Seconds with hierarchical collectives.
    """

    message_bytes: int
    one_stage: float
    two_stages: float

    @property
    def prefers_two_stages(self) -> bool:
        """Whether two stages are to be used."""
        return self.one_stage > _CLEARLY * self.two_stages

    def __str__(self) -> str:
        choice = "two stages" if self.prefers_two_stages else "one stage"
        times = f"one stage {self.one_stage * 1e3:.2f} ms, two stages {self.two_stages * 1e3:.2f} ms"
        return f"{format_bytes(self.message_bytes)}: {times}; using {choice}"


@dataclass(frozen=True)
class MiCSMesh:
    """The groups that this rank communicates in.

    Attributes:
        layout: Which rank holds what.
        device_mesh: Two-dimensional mesh ``(replicate, shard)`` over the world, in node-major order.
        intra_group: Peers of the partition on this node; ``None`` where collectives are flat.
        inter_group: Peers of the partition with the same place on other nodes; ``None`` where collectives are flat.
        optimizer_mesh: Two-dimensional mesh ``(shard, slice)`` over the ranks that divide optimizer states with this
            one; ``None`` where these are the partition's.
        instance_group: Ranks that hold the same optimizer states in other instances; ``None`` as above.
        host_group: The whole world, for messages of hosts; no hop uses it where these must travel by the device.
        timings: What was measured in them, by size of message in bytes.
    """

    layout: GroupLayout
    device_mesh: DeviceMesh
    intra_group: dist.ProcessGroup | None
    inter_group: dist.ProcessGroup | None
    host_group: dist.ProcessGroup
    optimizer_mesh: DeviceMesh | None = None
    instance_group: dist.ProcessGroup | None = None
    timings: dict[int, StageTiming] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shard_mesh(self) -> DeviceMesh:
        """One-dimensional mesh over this rank's partition group."""
        return self.device_mesh["shard"]

    @property
    def partition_group(self) -> dist.ProcessGroup:
        """Ranks that together hold this rank's replica."""
        return self.device_mesh.get_group("shard")

    @property
    def replication_group(self) -> dist.ProcessGroup:
        """Ranks that hold this rank's shard in other replicas."""
        return self.device_mesh.get_group("replicate")

    def stages(self, two_stages: bool) -> Stages:
        """Returns the groups of a partition's collectives: all of it, or those across nodes and inside them."""
        if not two_stages or self.inter_group is None or self.intra_group is None:
            return (self.partition_group,)
        return self.inter_group, self.intra_group

    @property
    def hierarchical(self) -> bool:
        """Whether partition collectives can run in two stages."""
        return self.intra_group is not None


def require_process_group() -> None:
    """Checks that ``torch.distributed`` is up.

    Raises:
        MiCSConfigError: If it is not.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise MiCSConfigError(
            "torch.distributed is not initialised. Start the script with torchrun (or Lightning) and call "
            "torch.distributed.init_process_group() first."
        )


def detect_topology(node_size: int | None = None) -> ClusterTopology:
    """Finds the cluster: explicit ``node_size``, else the launcher's variables, else the ranks' host names.

    Args:
        node_size: Ranks on a node, if known.

    Raises:
        MiCSConfigError: If nodes hold different numbers of ranks, or ranks are not numbered node by node.
    """
    require_process_group()
    world_size = dist.get_world_size()
    if node_size is not None:
        return ClusterTopology(world_size=world_size, node_size=node_size)
    # Nodes of different size see different variables, so a rank's own complaint must wait until all have heard of it.
    from_env: ClusterTopology | str | None
    try:
        from_env = ClusterTopology.from_env(world_size)
    except MiCSConfigError as error:
        from_env = str(error)
    views: list[Any] = [None] * world_size
    dist.all_gather_object(views, (from_env, socket.gethostname()))
    known = {topology for topology, _ in views}
    for complaint in known:
        if isinstance(complaint, str):
            raise MiCSConfigError(complaint)
    hosts = [host for _, host in views]
    if None in known:
        return ClusterTopology.from_hostnames(hosts)
    if len(known) > 1:
        described = ", ".join(f"rank {rank}: {topology.node_size}" for rank, (topology, _) in enumerate(views))
        raise MiCSConfigError(
            f"Nodes hold different numbers of ranks ({described}). Start the same number on each node, or pass "
            "node_size=."
        )
    told = known.pop()
    told.check_order(hosts)
    return told


def resolve_hierarchical(config: MiCSConfig, layout: GroupLayout) -> bool:
    """Decides whether partition collectives run in two stages.

    Raises:
        MiCSConfigError: If ``hierarchical=True`` but no partition spans nodes.
    """
    if config.hierarchical is True and not layout.spans_nodes:
        topology = layout.topology
        larger = [p for p in topology.valid_shard_sizes() if p > topology.node_size]
        works = f"Use hierarchical='auto', or shard_size={larger[0]}" if larger else "Use hierarchical='auto'"
        raise MiCSConfigError(
            f"hierarchical=True, but with shard_size={layout.shard_size} on nodes of {topology.node_size} ranks no "
            f"partition group spans nodes. {works}.",
            setting="hierarchical",
        )
    wanted = config.hierarchical is True or config.hierarchical == "auto"
    return wanted and layout.spans_nodes and layout.local_size > 1


def build_mesh(config: MiCSConfig, layout: GroupLayout, device_type: str) -> MiCSMesh:
    """Creates the groups of a layout. Collective over the world; equal requests share their groups.

    A rank takes part in making the few groups that it is in, and no other. They are what the world's group is: in
    backends, and in how long a collective may wait.

    Args:
        config: The settings; decides about two-stage collectives.
        layout: Which rank holds what.
        device_type: ``"cuda"`` or ``"cpu"``.

    Raises:
        MiCSConfigError: If the settings do not fit the layout.
    """
    hierarchical = resolve_hierarchical(config, layout)
    groups.end_well()
    world = dist.group.WORLD
    optimizer_shard_size = layout.resolve_optimizer_shard_size(config.optimizer_shard_size)
    key = (layout, device_type, hierarchical, optimizer_shard_size)
    for other, (of_world, _) in list(_MESHES.items()):
        if of_world is not world:
            del _MESHES[other]
    if key in _MESHES:
        return _MESHES[key][1]
    communication_device(device_type)  # it is to be chosen before anything is connected
    # Names must be new in this world, and the same on all members; these count what all ranks have asked for.
    maker = groups.GroupMaker(f"mics{len(_MESHES)}", device_type)
    replication = maker.make("replicate", layout.replication_groups)
    partition = maker.make("shard", layout.partition_groups)
    device_mesh = DeviceMesh.from_group(
        [replication, partition],
        device_type,
        torch.arange(layout.topology.world_size).view(layout.num_replicas, layout.shard_size),
        mesh_dim_names=("replicate", "shard"),
    )
    intra = maker.make("inside", layout.intra_groups) if hierarchical else None
    inter = maker.make("across", layout.inter_groups) if hierarchical else None
    hosts = maker.make_unused("hosts", [partition, replication])
    optimizer_mesh = instance = None
    if optimizer_shard_size > layout.shard_size:
        optimizer_mesh, instance = _optimizer_mesh(layout, optimizer_shard_size, maker, partition, device_type)
    mesh = MiCSMesh(layout, device_mesh, intra, inter, hosts, optimizer_mesh, instance)
    _MESHES[key] = (world, mesh)
    return mesh


def _optimizer_mesh(
    layout: GroupLayout, size: int, maker: groups.GroupMaker, partition: dist.ProcessGroup, device_type: str
) -> tuple[DeviceMesh, dist.ProcessGroup]:
    """Makes the mesh of the ranks that divide optimizer states, partition first, and the group of its instances."""
    slices = maker.make("slices", layout.optimizer_groups(size))
    instance = maker.make("instances", layout.instance_groups(size))
    first = dist.get_rank() // size * size
    # A shard is divided further: the slices of one lie beside one another.
    ranks = torch.arange(first, first + size).view(-1, layout.shard_size).t().contiguous()
    mesh = DeviceMesh.from_group([partition, slices], device_type, ranks, mesh_dim_names=("shard", "slice"))
    return mesh, instance


# Communicators are scarce; a second model with the same layout uses the first one's. The world group tells whether
# the process group was torn down in between: its meshes are dropped then, for threads of gloo live as long as these.
_MESHES: dict[tuple[GroupLayout, str, bool, int], tuple[Any, MiCSMesh]] = {}


def communication_device(device_type: str) -> torch.device:
    """Returns the device on which this rank communicates; chooses it where nobody has."""
    if device_type == "cpu":
        return torch.device("cpu")
    groups.choose_device(device_type)
    return torch.device(device_type, torch.get_device_module(device_type).current_device())
