"""What hop two sends over links, as the kernel counts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.launch import rank_logs, run_on_cluster
from lightning_mics.bench.namespaces import missing_requirements
from lightning_mics.bench.spec import ClusterSpec

MISSING = missing_requirements()
STEPS = """
import json, torch, torch.distributed as dist
from torch import nn
from lightning_mics import MiCSConfig, mics_shard
from lightning_mics.bench.measure import sent_bytes
from lightning_mics.core.runtime import runtime_of

WAYS = {
    "all-reduce": {},
    "all-reduce of 16-bit pieces": {"replication_reduce_dtype": "bfloat16"},
    "slices": {"optimizer_shard_size": "world"},
    "slices of 16-bit pieces": {"optimizer_shard_size": "world", "replication_reduce_dtype": "bfloat16"},
    "slices in 16 bits": {"optimizer_shard_size": "world", "replication_gather_dtype": "bfloat16"},
}
dist.init_process_group("gloo")
sent = {}
for name, settings in WAYS.items():
    layers = nn.Sequential(*(nn.Linear(768, 768) for _ in range(3)))
    model = mics_shard(layers, MiCSConfig(shard_size=1, node_size=1, wrap="Linear", verify=False,
                                          param_dtype="bfloat16", **settings))
    optimizer = torch.optim.AdamW(model.parameters())
    def steps(count):
        for _ in range(count):
            model(torch.ones(2, 768)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runtime_of(model).window.put_rows()
        dist.barrier()
        return sent_bytes()
    before = steps(1)
    sent[name] = (steps(2) - before) / 2
print(json.dumps(sent))
dist.destroy_process_group()
"""


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_hop_two_sends_what_its_dtypes_say(tmp_path: Path) -> None:
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    with EmulatedCluster(ClusterSpec(num_nodes=2, node_size=1, rate=None)) as cluster:
        run_on_cluster(cluster, [str(script)], log_dir=tmp_path / "logs")
    whole = 4 * 3 * (768 * 768 + 768)  # of two ranks each sends half of it, twice
    for node in range(2):
        found = json.loads(rank_logs(tmp_path / "logs", node, 1)[node, "stdout"].read_text())
        # On a busy machine TCP sends smaller packets, of which up to 4.5% are headers.
        assert whole <= found["all-reduce"] <= 1.05 * whole
        assert whole <= found["slices"] <= 1.05 * whole
        halves = ("all-reduce of 16-bit pieces", "slices of 16-bit pieces", "slices in 16 bits")
        assert all(0.75 <= found[name] / whole <= 0.75 * 1.05 for name in halves), found
