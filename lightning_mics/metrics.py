"""Counting what crosses which link.

The unit of account is one node: bytes are those that all ranks of this rank's node send in ring collectives, split into
what stays inside the node (intra) and what leaves it (inter). For a message of ``M`` bytes (the gathered unit), a
partition of ``p = g * k`` ranks (``g`` nodes, ``k`` ranks each) and ``c`` partition groups on the node:

====================================  =========================  ==============================
collective                            leaves the node            stays inside
====================================  =========================  ==============================
flat gather or reduce-scatter, g = 1  0                          ``c * (p-1) * M``
flat gather or reduce-scatter, g > 1  ``(p-1)/p * M``            ``(k-1) * (p-1)/p * M``
hierarchical                          ``(p-k)/p * M``            ``(k-1) * M``
====================================  =========================  ==============================

The factors ``(p-1)/p`` and ``(p-k)/p`` are those of the MiCS paper (Zhang et al., VLDB 2023, section 3.3). The
replication all-reduce is a ring over ``r`` replicas, in which each rank sends ``2 (r-1)/r`` of its shard. Where pieces
are exchanged in fewer bytes than their sums have, it sends ``(r-1)/r`` of these pieces, and then of the sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from lightning_mics.text import format_bytes as format_bytes
from lightning_mics.text import format_number as format_number
from lightning_mics.topology import GroupLayout


class Hop(str, Enum):
    """The kinds of communication of a training step."""

    PARTITION_GATHER = "partition gather"
    PARTITION_REDUCE = "partition reduce"
    REPLICATION_REDUCE = "replication reduce"
    REPLICATION_GATHER = "replication gather"


@dataclass(frozen=True)
class Traffic:
    """A count of calls and bytes.

    Attributes:
        calls: Number of collectives that this rank took part in.
        message_bytes: Sum of message sizes: the gathered unit for partition hops, the shard for the replication hop.
        intra_bytes: Bytes sent inside this rank's node, by all ranks of the node.
        inter_bytes: Bytes that left this rank's node, from all ranks of the node.
    """

    calls: int = 0
    message_bytes: int = 0
    intra_bytes: int = 0
    inter_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.calls + other.calls,
            self.message_bytes + other.message_bytes,
            self.intra_bytes + other.intra_bytes,
            self.inter_bytes + other.inter_bytes,
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.calls - other.calls,
            self.message_bytes - other.message_bytes,
            self.intra_bytes - other.intra_bytes,
            self.inter_bytes - other.inter_bytes,
        )


@dataclass(frozen=True)
class LinkShare:
    """Bytes per byte of message that one node sends inside and out of itself."""

    intra: Fraction
    inter: Fraction


def partition_share(layout: GroupLayout, hierarchical: bool) -> LinkShare:
    """Returns the link share of a gather or reduce-scatter over a partition group (see the module's table)."""
    p, k = layout.shard_size, layout.local_size
    groups_on_node = layout.topology.node_size // k
    if not layout.spans_nodes:
        return LinkShare(Fraction(groups_on_node * (p - 1)), Fraction(0))
    if hierarchical:
        return LinkShare(Fraction(k - 1), Fraction(p - k, p))
    return LinkShare(Fraction((k - 1) * (p - 1), p), Fraction(p - 1, p))


def replication_share(layout: GroupLayout, optimizer_shard_size: int | None = None, widening: int = 1) -> LinkShare:
    """Returns the link share of hop two; its message is one rank's shard.

    By default an all-reduce. Where ``m`` replicas divide optimizer states, a reduce-scatter between these, and an
    all-reduce of what is left, ``1/m``, between the instances. Sums have ``widening`` times the bytes of the message:
    what comes after the first exchange is made of them.
    """
    m = (optimizer_shard_size or layout.shard_size) // layout.shard_size
    r, node_size = layout.num_replicas // m, layout.topology.node_size
    scattered = slice_share(layout, m * layout.shard_size)
    members_on_node = max(1, node_size // layout.local_size // m)
    sent = sent_between_instances(r, m, widening) * node_size
    leaving = Fraction(1, members_on_node) if layout.topology.num_nodes > 1 and r > members_on_node else Fraction(0)
    return LinkShare(scattered.intra + sent * (1 - leaving), scattered.inter + sent * leaving)


def sent_between_instances(instances: int, m: int, widening: int = 1) -> Fraction:
    """Returns what a rank sends in the all-reduce of hop two; the unit is one rank's shard as it is exchanged first.

    Args:
        instances: Ranks that hold the same slices.
        m: Slices of a shard.
        widening: Bytes of a sum for each byte of what it is made of; without slices the pieces come first.
    """
    parts = 1 + widening if m == 1 else 2 * widening
    return Fraction(parts * (instances - 1), instances * m)


def slice_share(layout: GroupLayout, optimizer_shard_size: int) -> LinkShare:
    """Returns the link share of a gather of slices over ``m`` replicas; its message is one rank's shard.

    Each rank sends ``(m-1)/m`` of it in a ring, and where that spans nodes, one rank of each sends elsewhere.
    """
    m, node_size = optimizer_shard_size // layout.shard_size, layout.topology.node_size
    sent = Fraction(m - 1, m)
    members_on_node = node_size // layout.local_size
    leaving = layout.local_size if m > members_on_node else 0
    return LinkShare(sent * (node_size - leaving), sent * leaving)


class CommLedger:
    """Totals of communication per FSDP unit and hop, kept by the collectives themselves.

    A collective only counts up the size of its message, cheap enough to stay on; the rest is worked out when asked for.

    Args:
        layout: Which rank holds what.
        optimizer_shard_size: Ranks that divide optimizer states; by default those of a partition.
        widening: Bytes of a sum in hop two for each byte of what it is made of.

    Attributes:
        layout: See above.
        num_resets: How often counting was started from zero.
    """

    def __init__(self, layout: GroupLayout, optimizer_shard_size: int | None = None, widening: int = 1) -> None:
        self.layout = layout
        self._shares = {
            (Hop.PARTITION_GATHER, False): partition_share(layout, False),
            (Hop.PARTITION_GATHER, True): partition_share(layout, True),
            (Hop.PARTITION_REDUCE, False): partition_share(layout, False),
            (Hop.PARTITION_REDUCE, True): partition_share(layout, True),
            (Hop.REPLICATION_REDUCE, False): replication_share(layout, optimizer_shard_size, widening),
            (Hop.REPLICATION_REDUCE, True): replication_share(layout),
            (Hop.REPLICATION_GATHER, False): slice_share(layout, optimizer_shard_size or layout.shard_size),
        }
        self._sizes: dict[tuple[str, Hop, bool], Counter[int]] = {}
        self.num_resets = 0

    def sizes(self, unit: str, hop: Hop, *, hierarchical: bool = False) -> Counter[int]:
        """Returns the number of collectives by size of message, to be counted up by whoever runs them.

        Args:
            unit: Name of the FSDP unit.
            hop: What kind of communication it is.
            hierarchical: Whether it runs in two stages; of hop two, whether it is an all-reduce whatever others are.
        """
        return self._sizes.setdefault((unit, hop, hierarchical), Counter())

    def record(self, unit: str, hop: Hop, message_bytes: int, *, hierarchical: bool = False) -> None:
        """Adds one collective.

        Args:
            unit: Name of the FSDP unit.
            hop: What kind of communication it was.
            message_bytes: Size of the message, as :class:`Traffic` defines it.
            hierarchical: As :meth:`sizes` has it.
        """
        self.sizes(unit, hop, hierarchical=hierarchical)[message_bytes] += 1

    def __iter__(self) -> Iterator[tuple[str, Hop, Traffic]]:
        totals: dict[tuple[str, Hop], Traffic] = {}
        for (unit, hop, hierarchical), sizes in self._sizes.items():
            for message_bytes, calls in sizes.items():
                traffic = self._traffic(hop, hierarchical, message_bytes, calls)
                totals[unit, hop] = totals.get((unit, hop), Traffic()) + traffic
        return iter([(unit, hop, traffic) for (unit, hop), traffic in totals.items()])

    def _traffic(self, hop: Hop, hierarchical: bool, message_bytes: int, calls: int) -> Traffic:
        share = self._shares[hop, hierarchical]
        intra, inter = int(message_bytes * share.intra), int(message_bytes * share.inter)
        return Traffic(calls, calls * message_bytes, calls * intra, calls * inter)

    def total(self, hop: Hop | None = None, unit: str | None = None) -> Traffic:
        """Returns the sum over all hops and units, or over those of one hop, one unit or both."""
        chosen = (traffic for u, h, traffic in self if hop in (None, h) and unit in (None, u))
        return sum(chosen, Traffic())

    def by_hop(self) -> dict[Hop, Traffic]:
        """Returns the total of each hop."""
        return {hop: self.total(hop) for hop in Hop}

    def units(self) -> list[str]:
        """Returns the names of units that communicated, the root first."""
        return list(dict.fromkeys(unit for unit, _, _ in self))

    def reset(self) -> None:
        """Starts counting from zero."""
        self.num_resets += 1
        for sizes in self._sizes.values():
            sizes.clear()

    def full_sharding_inter_bytes(self) -> int:
        """Returns the bytes that would have left this node had the model been sharded over the whole world.

        The same gathers and reduce-scatters as counted here, as flat rings over all ranks and no replication hop:
        what ZeRO-3 or FSDP over the world sends for the same steps.
        """
        topology = self.layout.topology
        share = partition_share(topology.layout("world"), False)
        message_bytes = self.total(Hop.PARTITION_GATHER).message_bytes + self.total(Hop.PARTITION_REDUCE).message_bytes
        return int(message_bytes * share.inter)

    def __str__(self) -> str:
        lines = [f"{'hop':<20}{'calls':>8}{'inside node':>14}{'out of node':>14}"]
        for hop, traffic in self.by_hop().items():
            if hop is Hop.REPLICATION_GATHER and not traffic.calls:
                continue
            inside, outside = format_bytes(traffic.intra_bytes), format_bytes(traffic.inter_bytes)
            lines.append(f"{hop.value:<20}{traffic.calls:>8}{inside:>14}{outside:>14}")
        return "\n".join(lines)
