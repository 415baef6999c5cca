"""``hierarchical="auto"``: what is measured, what is decided, and what follows from it."""

from __future__ import annotations

import socket
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from models import build, microbatch, regression_loss

from lightning_mics import Hop, MiCSConfig, communication_ledger, mics_shard
from lightning_mics.core import mesh
from lightning_mics.core import stages as tuning
from lightning_mics.core.runtime import runtime_of
from lightning_mics.testing import WorkerPool

CONFIG = MiCSConfig(shard_size=4, node_size=2)


def hop_traffic(model: Any) -> tuple[int, int]:
    """Returns messages and bytes out of the node of one microstep's gathers."""
    rows = microbatch("uneven", 0, 8).chunk(dist.get_world_size())[dist.get_rank()]
    regression_loss(model, rows).backward()
    total = communication_ledger(model).total(Hop.PARTITION_GATHER)
    return total.message_bytes, total.inter_bytes


def shard_on_hosts(one_host: bool, one_stage: float, two_stages: float) -> tuple[int, tuple[int, int]]:
    """Returns how often was measured while two models were sharded, and the traffic of the second."""
    host = "here" if one_host else f"node{dist.get_rank() // 2}"
    calls = []

    def measure(groups: Any, message_bytes: int) -> tuning.StageTiming:
        calls.append(message_bytes)
        return tuning.StageTiming(message_bytes, one_stage, two_stages)

    mesh._MESHES.clear()
    with mock.patch.object(socket, "gethostname", lambda: host), mock.patch.object(tuning, "_measure", measure):
        for _ in range(2):
            model = mics_shard(build("uneven"), CONFIG)
    assert len(calls) == len(set(calls))
    return len(calls), hop_traffic(model)


@pytest.mark.parametrize(
    ("one_host", "one_stage", "two_stages", "measures", "leaving"),
    [
        pytest.param(False, 2.0, 1.0, True, 2 / 4, id="two-stages-faster"),
        pytest.param(False, 1.0, 2.0, True, 3 / 4, id="one-stage-faster"),
        pytest.param(False, 0.98, 1.0, True, 2 / 4, id="nearly-alike-so-fewer-bytes-win"),
        pytest.param(True, 1.0, 2.0, False, 2 / 4, id="no-links-to-measure-on-one-machine"),
    ],
)
def test_each_message_takes_the_stages_that_measured_faster(
    pool: WorkerPool, one_host: bool, one_stage: float, two_stages: float, measures: bool, leaving: float
) -> None:
    for num_measured, (message, out) in pool.run(shard_on_hosts, one_host, one_stage, two_stages, world_size=4):
        assert (num_measured > 0) == measures
        assert out == pytest.approx(message * leaving, rel=1e-3)


def measure_for_real() -> list[Any]:
    """Returns every rank's timings."""
    mesh._MESHES.clear()
    with mock.patch.object(socket, "gethostname", lambda: f"node{dist.get_rank() // 2}"):
        model = mics_shard(build("uneven"), CONFIG)
    timings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(timings, list(runtime_of(model).mesh.timings.values()))
    return timings


def test_all_ranks_hold_the_same_measurements(pool: WorkerPool) -> None:
    for timings in pool.run(measure_for_real, world_size=4):
        assert all(others == timings[0] for others in timings)
        assert all(timing.one_stage > 0 and timing.two_stages > 0 for timing in timings[0])
        assert timings[0]
