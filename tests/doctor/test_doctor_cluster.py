"""``mics doctor`` on an emulated cluster: faults that are planted are found, and nothing else is."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.launch import NodeFailedError, rank_logs, run_on_cluster
from lightning_mics.bench.namespaces import batch, missing_requirements
from lightning_mics.bench.spec import ClusterSpec

MISSING = missing_requirements()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

SCRIPT = """
import os, sys
answer, packages, *planted = sys.argv[1:]
rank = os.environ["RANK"]
if rank == "0" and planted:
    from lightning_mics.doctor import rates
    multiply = rates.multiply
    rates.multiply = lambda *matrices: [multiply(*matrices) for _ in range(6)]
if rank == "1" and planted:
    sys.path.insert(0, packages)
from lightning_mics.cli import main
sys.exit(main(["doctor", "--json", answer]))
"""


def examine(folder: Path, node_size: int, *, planted: bool) -> dict[str, dict[str, Any]]:
    """Returns the checks that the doctor makes on three nodes; of those, two have slow ranks or links, if planted."""
    script, answer, packages = folder / "doctor.py", folder / "answer.json", folder / "packages"
    script.write_text(SCRIPT)
    (packages / "transformers-5.18.0.dist-info").mkdir(parents=True)
    (packages / "transformers-5.18.0.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.18.0\n")
    with EmulatedCluster(ClusterSpec(num_nodes=3, node_size=node_size, rate=200_000_000)) as cluster:
        if planted:
            slow = "qdisc replace dev eth0 root tbf rate 40mbit burst 131072b latency 200ms"
            batch(["tc", "-n", cluster.nodes[2].namespace], [slow])
        with suppress(NodeFailedError):
            words = [str(script), str(answer), str(packages), *(["planted"] if planted else [])]
            run_on_cluster(cluster, words, log_dir=folder / "logs", timeout=100)
        assert answer.exists(), rank_logs(folder / "logs", 0, node_size)[0, "stderr"].read_text()
    told = json.loads(answer.read_text())
    return {check["name"]: check for check in told["checks"]}


def test_planted_faults_are_found_and_nothing_else(tmp_path: Path) -> None:
    checks = examine(tmp_path, 1, planted=True)
    bad = {name: check["found"] for name, check in checks.items() if check["verdict"] != "ok"}
    assert set(bad) == {"versions", "compute", "links between nodes"}
    assert bad["versions"].startswith("transformers: node1: 5.18.0; others: ")
    assert bad["compute"].startswith("node0: ") and "of the median" in bad["compute"]
    assert bad["links between nodes"].startswith("node2: ")
    assert checks["versions"]["verdict"] == checks["compute"]["verdict"] == "broken"


@pytest.mark.parametrize("node_size", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_a_healthy_cluster_gives_no_warnings(tmp_path: Path, node_size: int) -> None:
    checks = examine(tmp_path, node_size, planted=False)
    assert {name: check["found"] for name, check in checks.items() if check["verdict"] != "ok"} == {}
    assert checks["links between nodes"]["found"].endswith(" MB/s each way, 3 pairs")
