"""The host never waits for the device in a training window."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gpu_tools import NCCL, NCCL_AND_GLOO, NEEDS_CARD, counted_waits, on_cards
from models import build, loss_of, microbatch
from torch import nn

from lightning_mics import MiCSConfig, clip_grad_norm_, defer_replication_sync, mics_shard
from lightning_mics.testing import WorkerPool, shard_batch, worker_device

pytestmark = NEEDS_CARD

ACCUMULATE, WARM_UP, COUNTED = 3, 2, 3


def waits_in_windows(shard: int, hierarchical: bool) -> dict[str, int]:
    world, rank, device = dist.get_world_size(), dist.get_rank(), worker_device()
    config = MiCSConfig(shard_size=shard, node_size=2, hierarchical=hierarchical)
    model = mics_shard(build("uneven"), config, device_type=device.type)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = [shard_batch(microbatch("uneven", index, 2 * world), rank, world).to(device) for index in range(ACCUMULATE)]
    for _ in range(WARM_UP):
        train_a_window(model, optimizer, rows)
    with counted_waits() as waits:
        for _ in range(COUNTED):
            train_a_window(model, optimizer, rows)
    return dict(waits)


def train_a_window(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[torch.Tensor]) -> None:
    for index, part in enumerate(rows):
        with defer_replication_sync(model, enabled=index + 1 < len(rows)):
            (loss_of("uneven", model, part) / len(rows)).backward()
    clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("backend", [NCCL, NCCL_AND_GLOO], ids=["nccl", "nccl and gloo"])
@pytest.mark.parametrize(("shard", "hierarchical"), [(2, False), (4, True)])
def test_the_host_does_not_wait(pool: WorkerPool, shard: int, hierarchical: bool, backend: str) -> None:
    for waits in on_cards(pool, waits_in_windows, shard, hierarchical, backend=backend):
        assert not waits
