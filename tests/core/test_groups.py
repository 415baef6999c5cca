"""Process groups: what they are made of, how many steps that takes, and how long their collectives may wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import build
from torch import nn
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mics import ClusterTopology, MiCSConfig, MiCSConfigError, mics_shard
from lightning_mics.core import apply
from lightning_mics.core.groups import backend_for, check_backends
from lightning_mics.core.mesh import MiCSMesh, build_mesh
from lightning_mics.core.replicas import equalize_replicas
from lightning_mics.core.runtime import is_sharded
from lightning_mics.testing import WorkerPool


def groups_of(mesh: MiCSMesh) -> list[dist.ProcessGroup]:
    found = [mesh.partition_group, mesh.replication_group, mesh.intra_group, mesh.inter_group]
    return [group for group in found if group is not None]


def timeouts_and_sums(device_mesh_first: bool) -> list[tuple[timedelta, float]]:
    """Makes groups where ranks are in different numbers of groups already; uses each."""
    if device_mesh_first:
        dist.new_group([0, 1])
    cpu, found = torch.device("cpu"), []
    for shard_size in (2, 4, 8, 1):
        layout = ClusterTopology(world_size=8, node_size=2).layout(shard_size)
        for group in groups_of(build_mesh(MiCSConfig(), layout, "cpu")):
            value = torch.tensor(float(dist.get_rank()))
            dist.all_reduce(value, group=group)
            expected = float(sum(dist.get_process_group_ranks(group)))
            found.append((group._get_backend(cpu).options._timeout, value.item() - expected))
    return found


@pytest.mark.parametrize("others", [False, True])
def test_groups_inherit_the_timeout_and_need_no_ranks_but_their_own(pool: WorkerPool, others: bool) -> None:
    for found in pool.run(timeouts_and_sums, others, world_size=8, timeout=45):
        assert set(found) == {(timedelta(seconds=90), 0.0)}


@pytest.fixture
def large_world() -> Iterator[ClusterTopology]:
    dist.init_process_group("fake", rank=37, world_size=1024, store=FakeStore())
    yield ClusterTopology(world_size=1024, node_size=8)
    dist.destroy_process_group()


@pytest.mark.parametrize(("shard_size", "most"), [(1, 1), (8, 2), (16, 4), (1024, 3)])
def test_set_up_of_a_large_world_makes_a_rank_s_own_groups_only(
    large_world: ClusterTopology, shard_size: int, most: int
) -> None:
    config = MiCSConfig(shard_size=shard_size, verify=False)
    calls: Counter[str] = Counter()

    def counted(name: str) -> mock._patch[object]:
        real = getattr(distributed_c10d, name)

        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return real(*args, **kwargs)

        return mock.patch.object(distributed_c10d, name, call)

    with counted("_new_process_group_helper"), counted("split_group"):
        mics_shard(build("uneven"), config, topology=large_world, device_type="cpu")
    assert calls.total() <= most


def test_set_up_communicates_as_often_however_large_the_model_is(large_world: ClusterTopology) -> None:
    def watched(*args: Any) -> int:
        with _RefuseHostReads():
            return equalize_replicas(*args)

    watch = mock.patch.object(apply, "equalize_replicas", watched)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce, watch:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(9)))
        config = MiCSConfig(shard_size=8, wrap="Sequential", verify=False)
        mics_shard(model, config, topology=large_world, device_type="cpu")
    assert reduce.call_count == 2  # digests of what ranks were given, and fingerprints of all values


class _RefuseHostReads(TorchDispatchMode):
    """Lets no single value be read: each would be a wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_offload_gets_a_backend_for_host_memory() -> None:
    assert backend_for("cuda", cpu_offload=False) == "nccl"
    assert backend_for("cuda", cpu_offload=True) == "cpu:gloo,cuda:nccl"
    assert backend_for("cpu", cpu_offload=True) == "gloo"


def test_offload_without_a_backend_for_host_memory_is_refused_before_anything_changes(
    large_world: ClusterTopology,
) -> None:
    config, model = MiCSConfig(cpu_offload=True), build("uneven")
    check_backends(config, "cuda")
    with mock.patch.object(dist, "get_backend_config", lambda: "cuda:nccl"):
        check_backends(config, "cpu")
        check_backends(config.replace(cpu_offload=False), "cuda")
        with pytest.raises(MiCSConfigError, match=r"cpu_offload=True .*init_process_group\('cpu:gloo,cuda:nccl'\)"):
            mics_shard(model, config, topology=large_world, device_type="cuda")
    assert not is_sharded(model)
