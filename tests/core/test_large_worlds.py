"""A world of 64 in one process: groups and call counts, no numbers (the fake backend computes none)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from models import build, microbatch, regression_loss
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mics import ClusterTopology, Hop, MiCSConfig, communication_ledger, defer_replication_sync, mics_shard
from lightning_mics.core.mesh import MiCSMesh, build_mesh
from lightning_mics.core.runtime import runtime_of

WORLD, NODE, RANK = 64, 8, 37


@pytest.fixture
def world() -> Iterator[ClusterTopology]:
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    yield ClusterTopology(world_size=WORLD, node_size=NODE)
    dist.destroy_process_group()


def members(group: dist.ProcessGroup | None) -> list[int]:
    assert group is not None
    return dist.get_process_group_ranks(group)


@pytest.mark.parametrize("shard_size", [1, 4, 8, 16, 64])
def test_groups_are_those_of_the_layout(world: ClusterTopology, shard_size: int) -> None:
    layout = world.layout(shard_size)
    mesh = build_mesh(MiCSConfig(shard_size=shard_size), layout, "cpu")
    assert members(mesh.partition_group) == list(layout.partition_groups[RANK // shard_size])
    assert members(mesh.replication_group) == list(layout.replication_groups[RANK % shard_size])
    assert mesh.device_mesh.shape == (WORLD // shard_size, shard_size)
    assert mesh.device_mesh.mesh_dim_names == ("replicate", "shard")
    assert mesh.hierarchical == (shard_size > NODE)
    if mesh.hierarchical:
        assert members(mesh.intra_group) == list(range(32, 40))
        assert members(mesh.inter_group) == [r for r in range(5, WORLD, 8) if r // shard_size == RANK // shard_size]


def test_equal_requests_share_their_groups(world: ClusterTopology) -> None:
    def request(shard_size: int, **settings: bool) -> MiCSMesh:
        return build_mesh(MiCSConfig(shard_size=shard_size, **settings), world.layout(shard_size), "cpu")

    assert request(16) is request(16)
    assert request(16) is not request(16, hierarchical=False)
    assert request(16) is not request(8)


@pytest.mark.parametrize(
    ("shard_size", "hierarchical"), [(1, False), (8, False), (16, True), (16, False), (64, True), (64, False)]
)
def test_calls_and_bytes_of_a_step(world: ClusterTopology, shard_size: int, hierarchical: bool) -> None:
    config = MiCSConfig(shard_size=shard_size, hierarchical=hierarchical, verify=False)
    model = mics_shard(build("uneven"), config, topology=world, device_type="cpu")
    assert runtime_of(model).mesh.hierarchical is hierarchical
    for step in range(4):
        with defer_replication_sync(model, enabled=step < 3):
            regression_loss(model, microbatch("uneven", step, 2)).backward()
    ledger = communication_ledger(model)
    for unit in {gradients.name for gradients in runtime_of(model).window.units}:
        # The root is gathered once a microstep: it stays until its backward.
        gathers = (4 if unit == "(root)" else 8) if shard_size > 1 else 0
        assert ledger.total(Hop.PARTITION_GATHER, unit).calls == gathers
        assert ledger.total(Hop.PARTITION_REDUCE, unit).calls == (4 if shard_size > 1 else 0)
        assert ledger.total(Hop.REPLICATION_REDUCE, unit).calls == (1 if shard_size < WORLD else 0)
    gathered = ledger.total(Hop.PARTITION_GATHER)
    leaving = {1: 0, 8: 0, 16: 8 if hierarchical else 15, 64: 56 if hierarchical else 63}[shard_size]
    assert gathered.inter_bytes * shard_size == gathered.message_bytes * leaving


def test_shards_hold_their_share_of_the_elements(world: ClusterTopology) -> None:
    model = mics_shard(torch.nn.Linear(64, 640), MiCSConfig(shard_size=64, verify=False), topology=world)
    assert model.weight.to_local().shape == (10, 64)
    assert model.weight.device_mesh.size() == 64
