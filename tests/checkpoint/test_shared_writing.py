"""Plans of large worlds, in one process: what each rank sends to rank 0, and what that makes of it."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mics.checkpoint import ranks, sharing

SHAPES = {
    "q": (64, 64),
    "k": (64, 64),
    "v": (64, 64),
    "o": (64, 64),
    "gate": (176, 64),
    "down": (64, 176),
    "norm": (64,),
}


def state_of(shard_size: int, num_layers: int) -> dict[str, Any]:
    """Returns this rank's shards of a model with its AdamW states."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // shard_size, shard_size), mesh_dim_names=("r", "s"))["s"]

    def shard(shape: tuple[int, ...]) -> DTensor:
        local = torch.zeros(shape[0] // shard_size, *shape[1:])
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    shapes = {f"layers.{layer}.{name}": shape for layer in range(num_layers) for name, shape in SHAPES.items()}
    states = {name: {"exp_avg": shard(shape), "exp_avg_sq": shard(shape)} for name, shape in shapes.items()}
    return {"state_dict": {name: shard(shape) for name, shape in shapes.items()}, "optimizer_0": {"state": states}}


def local_plans(monkeypatch: pytest.MonkeyPatch, world_size: int, num_layers: int, share: bool) -> list[SavePlan]:
    shard_size, plans = 8, {}
    monkeypatch.setattr(ranks, "together", lambda step: [rank % shard_size for rank in range(world_size)])
    for place in range(shard_size):
        dist.init_process_group("fake", rank=place, world_size=world_size, store=FakeStore())
        state = state_of(shard_size, num_layers)
        for rank in range(place, world_size, shard_size):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            planner = DefaultSavePlanner()
            planner.set_up_planner(sharing.own_part(state) if share else state, is_coordinator=rank == 0)
            plans[rank] = planner.create_local_plan()
        dist.destroy_process_group()
    return [plans[rank] for rank in range(world_size)]


@dataclass
class Plans:
    num_items: int
    megabytes: float
    seconds: float
    largest_share: float

    @classmethod
    def of(cls, local: list[SavePlan]) -> Plans:
        sent = [pickle.dumps(plan) for plan in local]
        start = time.perf_counter()
        received = [pickle.loads(plan) for plan in sent]
        final, _ = DefaultSavePlanner().create_global_plan(received)
        seconds = time.perf_counter() - start
        sizes = [sum(item.tensor_storage_size() or 0 for item in plan.items) for plan in final]
        items = sum(len(plan.items) for plan in local)
        return cls(items, sum(map(len, sent)) / 1e6, seconds, max(sizes) * len(sizes) / sum(sizes))


def test_replicas_plan_what_they_write_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, many = (Plans.of(local_plans(monkeypatch, size, 4, share=True)) for size in (8, 64))
    assert alone.num_items == many.num_items == 8 * 3 * 4 * len(SHAPES)
    assert many.largest_share < 1.2


@pytest.mark.campaign
@pytest.mark.parametrize(("world_size", "share"), [(128, False), (128, True), (1024, True)])
def test_plans_of_large_worlds(
    monkeypatch: pytest.MonkeyPatch, world_size: int, share: bool, record_property: Callable[[str, object], None]
) -> None:
    plans = Plans.of(local_plans(monkeypatch, world_size, 40, share))
    who = "replicas share out" if share else "rank 0 finds duplicates"
    record_property(
        "figures",
        f"{world_size:,} ranks, 840 shards, {who}: {plans.num_items:,} items, {plans.megabytes:.1f} MB, a plan in "
        f"{plans.seconds:.1f} s; who writes most writes {plans.largest_share:.2f} times the mean",
    )
