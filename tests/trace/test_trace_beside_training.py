"""Profiles are taken beside a process group, by any rank, without disturbing it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from models import build, microbatch, regression_loss

from lightning_mics import MiCSConfig, mics_shard
from lightning_mics.plan.profile import ModelProfile
from lightning_mics.testing import WorkerPool
from lightning_mics.trace import profile_model


def take() -> tuple[ModelProfile | None, float]:
    """Profiles on the odd ranks only, then trains for a step."""
    model, rows = build("uneven"), microbatch("uneven", 0, 4)
    group, profile = dist.group.WORLD, None
    if dist.get_rank() % 2:
        profile = profile_model(model, rows, param_dtype="bfloat16", loss=regression_loss)
    assert dist.group.WORLD is group
    mics_shard(model, MiCSConfig(shard_size=2, node_size=2))
    loss = regression_loss(model, rows)
    loss.backward()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    return profile, loss.item()


def test_a_profile_beside_a_process_group(pool: WorkerPool) -> None:
    results = pool.run(take, world_size=4)
    expected = profile_model(build("uneven"), microbatch("uneven", 0, 4), param_dtype="bfloat16", loss=regression_loss)
    assert [profile for profile, _ in results] == [None, expected, None, expected]
    assert len({loss for _, loss in results}) == 1
