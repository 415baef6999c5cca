"""The ledger's arithmetic, against a count of every message of ring collectives."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lightning_mics import ClusterTopology, CommLedger, Hop, Traffic
from lightning_mics.metrics import format_bytes, partition_share, replication_share
from lightning_mics.topology import Group, GroupLayout

LAYOUTS = [
    (4, 2, 2),
    (4, 2, 4),
    (8, 2, 4),
    (8, 4, 8),
    (8, 2, 8),
    (8, 4, 2),
    (8, 4, 1),
    (16, 4, 8),
    (8, 8, 8),
    (4, 1, 4),
]


def layout_of(world_size: int, node_size: int, shard_size: int) -> GroupLayout:
    return ClusterTopology(world_size=world_size, node_size=node_size).layout(shard_size)


def ring_sends(group: Group, each: Fraction) -> list[tuple[int, int, Fraction]]:
    """Messages of a ring gather or reduce-scatter where each of the ``n - 1`` steps sends ``each`` to the neighbour."""
    steps = len(group) - 1
    return [(rank, group[(i + 1) % len(group)], steps * each) for i, rank in enumerate(group)] if steps else []


def of_node_0(layout: GroupLayout, sends: list[tuple[int, int, Fraction]]) -> tuple[Fraction, Fraction]:
    """Bytes that the ranks of node 0 send inside the node and out of it."""
    node = layout.topology.node_of
    mine = [(node(to), sent) for rank, to, sent in sends if node(rank) == 0]
    return sum((s for to, s in mine if to == 0), Fraction(0)), sum((s for to, s in mine if to != 0), Fraction(0))


@pytest.mark.parametrize("shape", LAYOUTS)
def test_flat_collectives_send_what_a_ring_sends(shape: tuple[int, int, int]) -> None:
    layout = layout_of(*shape)
    shard = Fraction(1, layout.shard_size)
    sends = [send for group in layout.partition_groups for send in ring_sends(group, shard)]
    share = partition_share(layout, hierarchical=False)
    assert (share.intra, share.inter) == of_node_0(layout, sends)


@pytest.mark.parametrize("shape", [shape for shape in LAYOUTS if layout_of(*shape).spans_nodes])
def test_hierarchical_collectives_send_what_their_two_rings_send(shape: tuple[int, int, int]) -> None:
    layout = layout_of(*shape)
    shard = Fraction(1, layout.shard_size)
    across = [send for group in layout.inter_groups for send in ring_sends(group, shard)]
    # Inside the node each rank holds one shard of every node block after the first stage.
    inside = [send for group in layout.intra_groups for send in ring_sends(group, shard * layout.nodes_per_partition)]
    share = partition_share(layout, hierarchical=True)
    assert (share.intra, share.inter) == of_node_0(layout, across + inside)
    p, k = layout.shard_size, layout.local_size
    assert share.inter == Fraction(p - k, p)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_the_replication_hop_sends_what_a_ring_all_reduce_sends(shape: tuple[int, int, int]) -> None:
    layout = layout_of(*shape)
    # Reduce-scatter and gather of one shard: twice (r - 1) steps of 1 / r of it.
    step = Fraction(2, layout.num_replicas)
    sends = [send for group in layout.replication_groups for send in ring_sends(group, step)]
    share = replication_share(layout)
    assert (share.intra, share.inter) == of_node_0(layout, sends)


def test_totals_by_hop_and_unit() -> None:
    ledger = CommLedger(layout_of(4, 2, 4))
    ledger.record("a", Hop.PARTITION_GATHER, 800, hierarchical=True)
    ledger.record("a", Hop.PARTITION_GATHER, 800)
    ledger.record("b", Hop.PARTITION_REDUCE, 400, hierarchical=True)
    assert ledger.total(unit="a") == Traffic(2, 1600, 800 + 600, 400 + 600)
    assert ledger.total(Hop.PARTITION_REDUCE) == Traffic(1, 400, 400, 200)
    assert ledger.total() == ledger.total(unit="a") + ledger.total(unit="b")
    assert ledger.by_hop()[Hop.REPLICATION_REDUCE] == Traffic()
    assert ledger.units() == ["a", "b"]
    assert ledger.total() - ledger.total(unit="b") == ledger.total(unit="a")
    assert "partition gather" in str(ledger)
    ledger.reset()
    assert ledger.total() == Traffic()


def test_full_sharding_is_what_a_ring_over_the_world_sends() -> None:
    ledger = CommLedger(layout_of(8, 2, 2))
    ledger.record("a", Hop.PARTITION_GATHER, 800)
    ledger.record("a", Hop.PARTITION_REDUCE, 800)
    ledger.record("a", Hop.REPLICATION_REDUCE, 400)
    assert ledger.total(Hop.PARTITION_GATHER).inter_bytes == 0
    assert ledger.full_sharding_inter_bytes() == 1600 * 7 // 8


def test_bytes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 * 2**20, 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "1.0 TiB",
    ]
