"""Pure arithmetic from a cluster to its partition and replication groups.

Ranks are numbered node by node (node-major): rank ``r`` sits on node ``r // node_size``. Everything else follows from
that, from the world size and from the shard size. Nothing here touches ``torch.distributed``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import listing

ShardSize = int | Literal["node", "world", "auto"]
OptimizerShardSize = int | Literal["partition", "world"]
# Blocks that are computed again in the backward pass: none, all, every so-many-th, or all but their products.
Recomputation = bool | int | Literal["selective"]
Group = tuple[int, ...]


def check_positive_int(name: str, value: object, example: object) -> int:
    """Returns a value that is a whole number from 1 up.

    Args:
        name: The setting.
        value: Its value.
        example: One that works.

    Raises:
        MiCSConfigError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise MiCSConfigError(f"{name}={value!r} is not a whole number. Try {name}={example!r}.", setting=name)
    if value < 1:
        raise MiCSConfigError(f"{name}={value} must be at least 1. Try {name}={example!r}.", setting=name)
    return value


@dataclass(frozen=True, kw_only=True)
class ClusterTopology:
    """A cluster of equal nodes.

    Attributes:
        world_size: Number of ranks in the whole cluster.
        node_size: Number of ranks on each node.

    Raises:
        MiCSConfigError: If a size is not a positive whole number, or ``node_size`` does not divide ``world_size``.
    """

    world_size: int
    node_size: int

    def __post_init__(self) -> None:
        check_positive_int("world_size", self.world_size, 8)
        check_positive_int("node_size", self.node_size, min(8, self.world_size))
        if self.world_size % self.node_size:
            raise MiCSConfigError(
                f"node_size={self.node_size} does not divide the world of {self.world_size} ranks: every node must "
                f"hold the same number of ranks. Values that work: {listing(divisors(self.world_size))}.",
                setting="node_size",
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.world_size // self.node_size

    def node_of(self, rank: int) -> int:
        """Returns the node that holds ``rank``."""
        return rank // self.node_size

    @classmethod
    def from_env(
        cls, world_size: int | None = None, environ: Mapping[str, str] | None = None
    ) -> ClusterTopology | None:
        """Reads the cluster from the variables of torchrun, Lightning, SLURM or MPI.

        Variables left over from an outer launcher are recognised by their world size and skipped.

        Args:
            world_size: The real world size, if known. Sources that contradict it are not believed.
            environ: The variables to read; ``os.environ`` by default.

        Returns:
            The topology, or ``None`` if no launcher left usable variables.

        Raises:
            MiCSConfigError: If the launcher placed different numbers of ranks on the nodes.
        """
        environ = os.environ if environ is None else environ
        for world_name, local_name in _LAUNCHER_VARIABLES:
            world, local = _as_int(environ.get(world_name)), environ.get(local_name)
            if world is None or local is None or (world_size is not None and world != world_size):
                continue
            counts = _parse_node_sizes(local, world)
            if counts is None:
                continue
            if len(set(counts)) > 1 or world % counts[0]:
                raise MiCSConfigError(
                    f"The launcher placed different numbers of ranks on the nodes ({local_name}={local} for "
                    f"{world_name}={world}). Start the same number on each node"
                    f"{_suggest_even_split(world, len(counts))}, or pass node_size=."
                )
            return cls(world_size=world, node_size=counts[0])
        return None

    @classmethod
    def from_hostnames(cls, hostnames: Sequence[str]) -> ClusterTopology:
        """Builds the topology from each rank's host name, in rank order.

        Raises:
            MiCSConfigError: If hosts hold different numbers of ranks, or the ranks of a host are not consecutive.
        """
        counts: dict[str, int] = {}
        for name in hostnames:
            counts[name] = counts.get(name, 0) + 1
        if len(set(counts.values())) > 1:
            described = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise MiCSConfigError(
                f"Nodes hold different numbers of ranks ({described}). Start the same number on each node"
                f"{_suggest_even_split(len(hostnames), len(counts))}."
            )
        topology = cls(world_size=len(hostnames), node_size=len(hostnames) // len(counts))
        topology.check_order(hostnames)
        return topology

    def check_order(self, hostnames: Sequence[str]) -> None:
        """Checks that the ranks of each node are on one host; a host may hold several nodes, which are pretended then.

        Args:
            hostnames: Each rank's host name, in rank order.

        Raises:
            MiCSConfigError: If ranks are not numbered node by node.
        """
        for rank, name in enumerate(hostnames):
            first = rank - rank % self.node_size
            if name != hostnames[first]:
                raise MiCSConfigError(
                    f"Ranks are not numbered node by node: rank {rank} is on {name!r} but rank {first} on "
                    f"{hostnames[first]!r}, with {self.node_size} ranks a node. Launch with block placement "
                    "(torchrun does; for SLURM use --distribution=block)."
                )

    def valid_shard_sizes(self) -> list[int]:
        """Returns the shard sizes that divide the world and do not straddle nodes unevenly."""
        return [p for p in divisors(self.world_size) if p % self.node_size == 0 or self.node_size % p == 0]

    def resolve_shard_size(self, shard_size: ShardSize) -> int:
        """Turns ``"node"``, ``"world"`` or a number into a checked partition size in ranks.

        Raises:
            MiCSConfigError: If the value cannot work on this cluster; the message lists values that do.
        """
        if shard_size == "node":
            return self.node_size
        if shard_size == "world":
            return self.world_size
        cluster = f"a world of {self.world_size} ranks ({self.num_nodes} x {self.node_size})"
        problem = None
        if shard_size == "auto":
            problem = "needs a model, and there is none here"
        elif isinstance(shard_size, bool) or not isinstance(shard_size, int):
            problem = "is neither a whole number nor a known word"
        elif shard_size < 1:
            problem = "must be at least 1"
        elif shard_size > self.world_size:
            problem = f"is larger than {cluster}"
        elif self.world_size % shard_size:
            problem = f"does not divide {cluster}"
        elif shard_size not in self.valid_shard_sizes():
            problem = (
                f"makes partition groups straddle nodes unevenly in {cluster}: a partition must fit into a node or "
                "fill whole nodes"
            )
        if problem is not None:
            works = f"Values that work on this cluster: {listing(self.valid_shard_sizes())}, 'node' or 'world'."
            raise MiCSConfigError(f"shard_size={shard_size!r} {problem}. {works}", setting="shard_size")
        assert isinstance(shard_size, int)
        return shard_size

    def layout(self, shard_size: ShardSize = "node") -> GroupLayout:
        """Divides the cluster into partition groups of ``shard_size`` ranks.

        Raises:
            MiCSConfigError: If ``shard_size`` cannot work on this cluster.
        """
        return GroupLayout(topology=self, shard_size=self.resolve_shard_size(shard_size))


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """Which rank holds which shard of which replica. Print it to see it.

    Build it with :meth:`ClusterTopology.layout`, which checks the shard size.

    Attributes:
        topology: The cluster.
        shard_size: Number of ranks in a partition group (``p`` in the MiCS paper).
    """

    topology: ClusterTopology
    shard_size: int

    @property
    def num_replicas(self) -> int:
        """Number of partition groups, each with a whole replica of the model states."""
        return self.topology.world_size // self.shard_size

    @property
    def spans_nodes(self) -> bool:
        """Whether a partition group spans several nodes."""
        return self.shard_size > self.topology.node_size

    @property
    def local_size(self) -> int:
        """Number of ranks of one partition group on one node (``k`` if it spans nodes)."""
        return min(self.shard_size, self.topology.node_size)

    @property
    def nodes_per_partition(self) -> int:
        """Number of nodes a partition group spans (``g``)."""
        return self.shard_size // self.local_size

    @cached_property
    def partition_groups(self) -> tuple[Group, ...]:
        """Ranks that together hold one replica, one group a replica."""
        p = self.shard_size
        return tuple(tuple(range(i * p, (i + 1) * p)) for i in range(self.num_replicas))

    @cached_property
    def replication_groups(self) -> tuple[Group, ...]:
        """Ranks that hold the same shard in different replicas, one group a shard."""
        return tuple(tuple(range(s, self.topology.world_size, self.shard_size)) for s in range(self.shard_size))

    @cached_property
    def intra_groups(self) -> tuple[Group, ...]:
        """Ranks of a partition group that share a node; used by the stage inside nodes."""
        k = self.local_size
        return tuple(tuple(range(i * k, (i + 1) * k)) for i in range(self.topology.world_size // k))

    @cached_property
    def inter_groups(self) -> tuple[Group, ...]:
        """Ranks of a partition group with the same place in their nodes; used by the stage across nodes."""
        k = self.local_size
        return tuple(group[j::k] for group in self.partition_groups for j in range(k))

    def resolve_optimizer_shard_size(self, size: OptimizerShardSize) -> int:
        """Turns ``"partition"``, ``"world"`` or a number into a checked number of ranks that share optimizer states.

        Raises:
            MiCSConfigError: If the value cannot work with this layout; the message lists values that do.
        """
        p, world = self.shard_size, self.topology.world_size
        words = {"partition": p, "world": world}
        if isinstance(size, str) and size in words:
            return words[size]
        valid = [q for q in divisors(world) if q % p == 0]
        if isinstance(size, bool) or not isinstance(size, int) or size not in valid:
            raise MiCSConfigError(
                f"optimizer_shard_size={size!r} is not a multiple of shard_size={p} that divides the world of {world} "
                f"ranks. Values that work: {listing(valid)}, 'partition' or 'world'.",
                setting="optimizer_shard_size",
            )
        return size

    def optimizer_groups(self, optimizer_shard_size: int) -> tuple[Group, ...]:
        """Returns ranks that divide the optimizer states of one shard: those of neighbouring replicas, in order."""
        m = optimizer_shard_size // self.shard_size
        return tuple(group[i : i + m] for group in self.replication_groups for i in range(0, len(group), m))

    def instance_groups(self, optimizer_shard_size: int) -> tuple[Group, ...]:
        """Returns ranks that hold the same optimizer states, of one parameter's slice in different instances."""
        m = optimizer_shard_size // self.shard_size
        return tuple(group[i::m] for group in self.replication_groups for i in range(m))

    def replica_of(self, rank: int) -> int:
        """Returns the replica (partition group) that ``rank`` belongs to."""
        return rank // self.shard_size

    def shard_of(self, rank: int) -> int:
        """Returns the shard that ``rank`` holds."""
        return rank % self.shard_size

    def __str__(self) -> str:
        topology = self.topology
        lines = [
            f"{topology.world_size} ranks = {topology.num_nodes} node(s) x {topology.node_size}; "
            f"{self.num_replicas} replica(s) x {self.shard_size} shard(s)"
        ]
        width = len(str(topology.world_size - 1))
        for node in range(topology.num_nodes):
            ranks = range(node * topology.node_size, (node + 1) * topology.node_size)
            lines.append(
                f"  node {node}  " + " ".join(self._draw_partition(part, width) for part in self._split(ranks))
            )
        lines.append(f"  partition groups    {_shorten(self.partition_groups)}")
        lines.append(f"  replication groups  {_shorten(self.replication_groups)}")
        if self.spans_nodes:
            lines.append(f"  inside nodes        {_shorten(self.intra_groups)}")
            lines.append(f"  across nodes        {_shorten(self.inter_groups)}")
        return "\n".join(lines)

    def _split(self, ranks: Sequence[int]) -> list[Sequence[int]]:
        return [ranks[i : i + self.local_size] for i in range(0, len(ranks), self.local_size)]

    def _draw_partition(self, ranks: Sequence[int], width: int) -> str:
        cells = " ".join(f"{rank:>{width}}:s{self.shard_of(rank)}" for rank in ranks)
        return f"[replica {self.replica_of(ranks[0])} | {cells}]"


# World size and ranks per node, most specific launcher first.
_LAUNCHER_VARIABLES = (
    ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE"),
    ("SLURM_NTASKS", "SLURM_TASKS_PER_NODE"),
    ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "MPI_LOCALNRANKS"),
)


def divisors(number: int) -> list[int]:
    """Returns the divisors of ``number`` in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _as_int(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None


def _parse_node_sizes(text: str, world_size: int) -> list[int] | None:
    """Parses ``"8"`` or SLURM's ``"4(x2),3"`` into ranks per node; ``None`` where it is not for this world."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None or int(match[1]) == 0:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    is_list = len(counts) > 1 or "(" in text
    if is_list and sum(counts) != world_size:
        return None
    return counts if is_list else counts * max(1, -(-world_size // counts[0]))


def _suggest_even_split(world_size: int, num_nodes: int) -> str:
    per_node = max(1, world_size // num_nodes)
    return f" (for example {per_node} on each of {num_nodes})"


def _shorten(groups: Sequence[Group], limit: int = 4) -> str:
    def one(group: Group) -> str:
        shown = [*map(str, group[:4]), "...", str(group[-1])] if len(group) > 6 else [*map(str, group)]
        return "{" + ",".join(shown) + "}"

    text = " ".join(one(group) for group in groups[:limit])
    return text if len(groups) <= limit else f"{text} ... ({len(groups)} groups)"
