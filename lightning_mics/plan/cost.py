"""What collectives and passes take on a cluster: the alpha-beta model of rings.

A collective over ``p`` ranks takes its number of steps times the latency of a step (alpha), plus the bytes that its
busiest link carries over that link's rate (beta). For a gathered message of ``M`` bytes, ``k`` ranks of the partition
on each of ``g`` nodes:

======================  ===================================  =======================
gather, reduce-scatter  latency                              bytes on the busiest link
======================  ===================================  =======================
inside a node           ``(p-1)`` intra                      ``(p-1)/p * M`` of a rank
flat, over nodes        ``(p-1)`` inter                      ``(p-1)/p * M`` of a node
two stages              ``(g-1)`` inter, ``(k-1)`` intra     ``(p-k)/p * M`` of a node, then ``(k-1)/k * M`` of a rank
======================  ===================================  =======================

The alpha-beta model of collectives is that of Thakur, Rabenseifner and Gropp (2005); the byte counts are those of
:mod:`lightning_mics.metrics`. All replication groups of a node run at the same time and share its link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_mics.metrics import LinkShare, partition_share, replication_share, sent_between_instances, slice_share
from lightning_mics.plan.hardware import Cluster
from lightning_mics.topology import GroupLayout


@dataclass(frozen=True)
class Cost:
    """What a collective takes.

    Attributes:
        seconds: From its start to its end.
        inter_seconds: The part of it that occupies the link between nodes.
    """

    seconds: float
    inter_seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.inter_seconds + other.inter_seconds)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.seconds * factor, self.inter_seconds * factor)


FREE = Cost(0.0, 0.0)


class NetworkCosts:
    """Costs of the collectives of one layout.

    Args:
        cluster: The hardware.
        layout: The groups.
        hierarchical: Whether collectives of a partition that spans nodes run in two stages.
        optimizer_shard_size: Ranks that divide optimizer states; by default those of a partition.
        widening: Bytes of a sum in hop two for each byte of what it is made of.
    """

    def __init__(
        self,
        cluster: Cluster,
        layout: GroupLayout,
        hierarchical: bool,
        optimizer_shard_size: int | None = None,
        widening: int = 1,
    ) -> None:
        self._intra, self._inter = cluster.node.intra, cluster.node.inter
        self._has_trees = cluster.node.accelerator.device_type != "cpu"
        self._layout, self._hierarchical = layout, hierarchical and layout.spans_nodes
        self._shares = {staged: partition_share(layout, staged) for staged in (False, True)}
        size = optimizer_shard_size or layout.shard_size
        self._slices, self._widening = size // layout.shard_size, widening
        self._replication_share = replication_share(layout, size, widening)
        self._slice_share = slice_share(layout, size)

    def partition(self, message_bytes: float) -> Cost:
        """Returns the cost of a gather or reduce-scatter of a message (the whole of it) over a partition group."""
        p, k, g = self._layout.shard_size, self._layout.local_size, self._layout.nodes_per_partition
        if p == 1:
            return FREE
        if not self._layout.spans_nodes:
            return Cost((p - 1) * self._intra.latency + (p - 1) / p * message_bytes / self._intra.rate, 0.0)
        inter_bytes = float(self._shares[self._hierarchical].inter) * message_bytes
        if not self._hierarchical:
            ring = (p - 1) * self._inter.latency + inter_bytes / self._inter.rate
            inside = (p - 1) / p * message_bytes / self._intra.rate if k > 1 else 0.0
            return Cost(max(ring, inside), ring)
        across = (g - 1) * self._inter.latency + inter_bytes / self._inter.rate
        inside = (k - 1) * self._intra.latency + (k - 1) / k * message_bytes / self._intra.rate
        return Cost(across + inside, across)

    def replication(self, shard_bytes: float) -> Cost:
        """Returns the cost of hop two of a shard: the all-reduce over a replication group, or the way to its slices."""
        replicas, m = self._layout.num_replicas, self._slices
        instances = replicas // m
        steps = (m - 1) + (self._all_reduce_steps(instances) if instances > 1 else 0)
        sent = ((m - 1) / m + float(sent_between_instances(instances, m, self._widening))) * shard_bytes
        return self._between_replicas(self._replication_share, steps, sent, shard_bytes)

    def slices(self, shard_bytes: float) -> Cost:
        """Returns the cost of the gather of a shard's slices, after a step on them."""
        m = self._slices
        return self._between_replicas(self._slice_share, m - 1, (m - 1) / m * shard_bytes, shard_bytes)

    def _between_replicas(self, share: LinkShare, steps: int, sent: float, shard_bytes: float) -> Cost:
        """Returns the cost of a ring in some steps, in which each rank sends ``sent`` bytes."""
        if steps == 0:
            return FREE
        inter_bytes = float(share.inter) * shard_bytes
        link = self._inter if inter_bytes else self._intra
        inside = sent / self._intra.rate if share.intra > 0 else 0.0
        seconds = steps * link.latency + max(inter_bytes / self._inter.rate, inside)
        return Cost(seconds, seconds if inter_bytes else 0.0)

    def agreement(self) -> float:
        """Returns the seconds of a small all-reduce over the world, which ends an accumulation window."""
        topology = self._layout.topology
        link = self._inter if topology.num_nodes > 1 else self._intra
        return self._all_reduce_steps(topology.world_size) * link.latency if topology.world_size > 1 else 0.0

    def _all_reduce_steps(self, ranks: int) -> int:
        """NCCL takes trees where rings would be slow to go around; gloo has rings only."""
        ring = 2 * (ranks - 1)
        return min(ring, 2 * math.ceil(math.log2(ranks))) if self._has_trees else ring
