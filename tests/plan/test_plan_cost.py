import pytest
from plan_examples import make_cluster

from lightning_mics.metrics import partition_share, replication_share
from lightning_mics.plan.cost import NetworkCosts
from lightning_mics.plan.hardware import Link

MESSAGE = 1e9


def costs(shard_size, *, hierarchical=False, num_nodes=4, node_size=4, device_type="cuda"):
    cluster = make_cluster(num_nodes, node_size, device_type=device_type)
    return NetworkCosts(cluster, cluster.topology.layout(shard_size), hierarchical)


def test_a_partition_of_one_rank_communicates_nothing():
    assert costs(1).partition(MESSAGE).seconds == 0


def test_inside_a_node_the_accelerators_links_count():
    cost = costs(4).partition(MESSAGE)
    assert cost.seconds == pytest.approx(3 * 1e-6 + 3 / 4 * MESSAGE / 100e9)
    assert cost.inter_seconds == 0


def test_a_flat_ring_over_nodes_sends_through_the_nodes_link():
    cost = costs(8).partition(MESSAGE)
    assert cost.seconds == cost.inter_seconds == pytest.approx(7 * 1e-5 + 7 / 8 * MESSAGE / 10e9)


def test_two_stages_send_less_across_nodes_and_take_fewer_slow_steps():
    cost = costs(8, hierarchical=True).partition(MESSAGE)
    across = 1 * 1e-5 + (8 - 4) / 8 * MESSAGE / 10e9
    inside = 3 * 1e-6 + 3 / 4 * MESSAGE / 100e9
    assert cost.inter_seconds == pytest.approx(across)
    assert cost.seconds == pytest.approx(across + inside)


def test_small_messages_on_few_nodes_are_faster_flat():
    message = 1e3
    flat, staged = costs(8, num_nodes=2).partition(message), costs(8, hierarchical=True, num_nodes=2).partition(message)
    assert staged.seconds < flat.seconds  # fewer slow steps win here
    one_rank_nodes = costs(4, num_nodes=4, node_size=1), costs(4, hierarchical=True, num_nodes=4, node_size=1)
    assert one_rank_nodes[0].partition(message).seconds == pytest.approx(one_rank_nodes[1].partition(message).seconds)


@pytest.mark.parametrize("shard_size", [1, 2, 4, 8], ids=lambda p: f"p{p}")
def test_replication_sends_the_ledgers_bytes(shard_size):
    cluster = make_cluster(4, 4, device_type="cpu")
    layout = cluster.topology.layout(shard_size)
    shard = MESSAGE / shard_size
    replicas = layout.num_replicas
    expected = 2 * (replicas - 1) * 1e-5 + float(replication_share(layout).inter) * shard / 10e9
    assert costs(shard_size, device_type="cpu").replication(shard).seconds == pytest.approx(expected)


def test_replication_inside_one_node_uses_its_links():
    cost = costs(2, num_nodes=1).replication(MESSAGE)
    assert cost.inter_seconds == 0
    assert cost.seconds == pytest.approx(2 * 1e-6 + 2 * 1 / 2 * MESSAGE / 100e9)


def test_one_replica_has_nothing_to_exchange():
    assert costs(16).replication(MESSAGE).seconds == 0


def test_trees_bound_the_latency_of_wide_all_reduces_on_accelerators():
    nccl, gloo = costs(1, num_nodes=64, node_size=1), costs(1, num_nodes=64, node_size=1, device_type="cpu")
    assert nccl.replication(4).seconds == pytest.approx(2 * 6 * 1e-5, rel=1e-3)
    assert gloo.replication(4).seconds == pytest.approx(2 * 63 * 1e-5, rel=1e-3)


@pytest.mark.parametrize(("shard_size", "hierarchical"), [(8, False), (8, True), (16, True)])
def test_bytes_are_those_of_the_ledger(shard_size, hierarchical):
    cluster = make_cluster(4, 4)
    layout = cluster.topology.layout(shard_size)
    small, large = (costs(shard_size, hierarchical=hierarchical).partition(m).inter_seconds for m in (0, MESSAGE))
    assert large - small == pytest.approx(float(partition_share(layout, hierarchical).inter) * MESSAGE / 10e9)


def test_links_inside_a_node_do_not_count_where_a_node_has_one_rank():
    fast, slow = (Link(bandwidth=rate, efficiency=1.0, latency=0.0) for rate in (1e12, 1e6))
    found = []
    for intra in (fast, slow):
        cluster = make_cluster(4, 1, intra=intra)
        network = NetworkCosts(cluster, cluster.topology.layout(4), False)
        replicas = NetworkCosts(cluster, cluster.topology.layout(1), False)
        found.append((network.partition(MESSAGE).seconds, replicas.replication(MESSAGE).seconds))
    assert found[0] == found[1]
