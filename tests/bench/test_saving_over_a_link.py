"""Checkpoints that go to a storage server behind a slow link of its own, while training uses other links."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.launch import run_on_cluster
from lightning_mics.bench.namespaces import missing_requirements
from lightning_mics.bench.spec import ClusterSpec

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(missing_requirements() is not None, reason=str(missing_requirements())),
]
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

RATE = 100_000_000
SETTINGS = {"AWS_ACCESS_KEY_ID": "made-up", "AWS_SECRET_ACCESS_KEY": "made-up", "AWS_DEFAULT_REGION": "us-east-1"}
SAVE = """
import json, sys, time
import s3fs, torch
import torch.distributed as dist
from torch import nn
from lightning_mics import MiCSConfig, mics_shard, save_checkpoint

width, rounds, results = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
options = {"endpoint_url": "http://storage:5000"}
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    while True:
        try:
            s3fs.S3FileSystem(**options).mkdir("bucket")
            break
        except OSError:
            time.sleep(0.2)
dist.barrier()

class Block(nn.Linear):
    def forward(self, x):
        time.sleep(0.05)  # as an accelerator would compute
        return super().forward(x)

torch.manual_seed(0)
model = nn.Sequential(*(Block(width, width, bias=False) for _ in range(4)))
mics_shard(model, MiCSConfig(shard_size=2, node_size=2, wrap=["Block"]))
optimizer = torch.optim.AdamW(model.parameters())
times = {"waited": [], "behind": [], "idle": [], "busy": [], "after": []}

def timed(name, call):
    dist.barrier()
    start = time.perf_counter()
    result = call()
    times[name].append(time.perf_counter() - start)
    return result

def step():
    model(torch.ones(4, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

def save(background):
    url = "s3://bucket/run/last.ckpt"
    return save_checkpoint(url, model, optimizer, background=background, storage_options=options)

step()
for _ in range(rounds):
    for _ in range(10):
        timed("idle", step)
    timed("waited", lambda: save(False))
    pending = timed("behind", lambda: save(True))
    for _ in range(10):
        timed("busy" if not pending.is_written else "after", step)
    pending.wait()
dist.barrier()
if dist.get_rank() == 0:
    with open(results, "w") as file:
        json.dump(times, file)
dist.destroy_process_group()
"""


def save_over_a_link(folder: Path, width: int, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Returns seconds on rank 0 by what they were spent on, and what a save sends, in replicas' worths."""
    script, results = folder / "save.py", folder / "results.json"
    script.write_text(SAVE)
    spec = ClusterSpec(num_nodes=2, node_size=2, rate=None, storage_rate=RATE)
    with EmulatedCluster(spec) as cluster:
        assert cluster.storage is not None
        serve = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "5000"]
        cluster.popen(cluster.storage, serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        arguments = [str(script), str(width), str(rounds), str(results)]
        run_on_cluster(cluster, arguments, log_dir=folder / "logs", environment=SETTINGS, timeout=500)
        stored = cluster.stored_bytes()
    return json.loads(results.read_text()), stored / (2 * rounds) / (3 * 4 * 4 * width**2)


def test_a_job_sends_one_replica_worth(tmp_path: Path) -> None:
    times, sent = save_over_a_link(tmp_path, width=512, rounds=1)
    assert 1 < sent < 1.1
    assert times["behind"][0] < 0.5 * times["waited"][0]


def test_training_hardly_stops(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    times, sent = save_over_a_link(tmp_path, width=2048, rounds=3)
    waited, behind, idle, busy = (statistics.median(times[name]) for name in ("waited", "behind", "idle", "busy"))
    record_property(
        "figures",
        f"200 MB of states of two replicas on four ranks, to an S3 server (moto) behind a link of 100 Mbit/s: training "
        f"stops for {behind:.2f} s instead of {waited:.1f} s ({behind / waited:.1%}); a step takes {busy * 1e3:.0f} ms "
        f"beside the write and {idle * 1e3:.0f} ms without; the server received {sent:.3f} times one replica's states",
    )
    assert behind < 0.1 * waited
    assert busy < 1.1 * idle
    assert 1 < sent < 1.03
