"""The least bytes that have to leave a node, by the formulas of :mod:`lightning_mics.metrics`."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mics.metrics import partition_share, replication_share
from lightning_mics.topology import ClusterTopology


@dataclass(frozen=True, kw_only=True)
class StepMessages:
    """What one optimizer step communicates.

    Attributes:
        gathered_bytes: Sum of all messages that are gathered over a partition group.
        reduced_bytes: Sum of all messages that are reduced and scattered over a partition group.
        num_replications: How often the whole gradient is all-reduced between replicas.
    """

    gathered_bytes: int
    reduced_bytes: int
    num_replications: int


def minimum_bytes(
    topology: ClusterTopology, shard_size: int, hierarchical: bool, model_bytes: int, messages: StepMessages
) -> float:
    """Returns the bytes that leave each node in an optimizer step.

    Args:
        topology: The cluster.
        shard_size: Ranks that hold one replica.
        hierarchical: Whether partition collectives run in two stages.
        model_bytes: Size of all gradients.
        messages: What is communicated.
    """
    layout = topology.layout(shard_size)
    if topology.num_nodes == 1:
        return 0.0
    partition = partition_share(layout, hierarchical).inter
    replication = replication_share(layout).inter
    in_partition = float(partition) * (messages.gathered_bytes + messages.reduced_bytes)
    return in_partition + float(replication) * messages.num_replications * model_bytes / shard_size
