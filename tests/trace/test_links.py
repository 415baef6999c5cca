"""Measuring the cluster that a process group runs on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

import pytest

from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.launch import rank_logs, run_on_cluster
from lightning_mics.bench.namespaces import missing_requirements
from lightning_mics.bench.spec import ClusterSpec
from lightning_mics.plan.hardware import Cluster, cluster_to_yaml, load_cluster
from lightning_mics.testing import WorkerPool
from lightning_mics.topology import ClusterTopology
from lightning_mics.trace import links

MISSING = missing_requirements()
SCRIPT = """
import torch.distributed as dist
from lightning_mics.trace.links import measure_cluster
dist.init_process_group("gloo")
rate = measure_cluster(layer=(64, 16)).inter.rate
if dist.get_rank() == 0:
    print(f"RATE {rate:.0f}", flush=True)
dist.destroy_process_group()
"""


def measure(node_size: int) -> links.Measurement:
    topology = ClusterTopology(world_size=4, node_size=node_size)
    with (
        mock.patch.object(links, "detect_topology", lambda: topology),
        mock.patch.dict(links._LARGEST, cpu=2**16),
        mock.patch.object(links, "_COMPUTE_SECONDS", 0.02),
    ):
        return links.measure_cluster(layer=(64, 16))


@pytest.mark.parametrize("node_size", [1, 2, 4])
def test_all_ranks_measure_one_cluster(pool: WorkerPool, node_size: int) -> None:
    first, *others = pool.run(measure, node_size, world_size=4)
    assert all(other.cluster == first.cluster for other in others)
    cluster: Cluster = first.cluster
    assert (cluster.num_nodes, cluster.node.num_accelerators) == (4 // node_size, node_size)
    assert (first.intra is None) == (node_size == 1)
    assert (first.inter is None) == (node_size == 4)
    for link in (cluster.node.intra, cluster.node.inter):
        assert link.rate > 0 and link.latency >= 0
    accelerator = cluster.node.accelerator
    assert 0 < accelerator.compute_efficiency <= 1
    assert accelerator.memory > 2**20 and accelerator.memory_bandwidth > 0


def test_what_was_measured_can_be_saved(pool: WorkerPool, tmp_path: Path) -> None:
    cluster = pool.run(measure, 2, world_size=4)[0].cluster
    file = tmp_path / "cluster.yaml"
    file.write_text(cluster_to_yaml(cluster))
    assert load_cluster(file) == cluster
    assert os.uname().nodename not in file.read_text()


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_rate_of_a_limited_link_is_found(tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text(SCRIPT)
    with EmulatedCluster(ClusterSpec(num_nodes=2, node_size=1, rate=10**8)) as cluster:
        run_on_cluster(cluster, [str(script)], log_dir=tmp_path / "logs", timeout=120)
        printed = rank_logs(tmp_path / "logs", 0, 1)[0, "stdout"].read_text()
    found = re.search(r"RATE (\d+)", printed)
    assert found is not None
    assert int(found[1]) == pytest.approx(12.5e6, rel=0.25)  # a busy machine refills the bucket
