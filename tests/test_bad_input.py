"""Every wrong setting is an error on every rank, before any collective could hang."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import Regressor, build
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_mics import ClusterTopology, MiCSConfig, mics_shard
from lightning_mics.core.mesh import detect_topology
from lightning_mics.testing import WorkerError, WorkerPool

WORLD = 4


def shard_with(settings: dict[str, Any]) -> None:
    mics_shard(build("uneven"), MiCSConfig(**settings))


def lambda_that_selects_nothing(module: nn.Module) -> bool:
    return False


NODES_OF_2 = {"node_size": 2}
SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"shard_size": 0}, ["shard_size=0", "at least 1", "Try shard_size='node'"]),
    ({"shard_size": -3}, ["shard_size=-3", "at least 1", "Try shard_size='node'"]),
    ({"shard_size": 2.5}, ["shard_size=2.5", "not a whole number", "Try shard_size='node'"]),
    ({"shard_size": "two"}, ["shard_size='two'", "'node', 'world' or 'auto'"]),
    ({"shard_size": 8, **NODES_OF_2}, ["shard_size=8", "a world of 4 ranks (2 x 2)", "1, 2, 4, 'node' or 'world'"]),
    ({"shard_size": 3, **NODES_OF_2}, ["shard_size=3", "does not divide", "4 ranks (2 x 2)", "1, 2, 4,"]),
    ({"node_size": 3}, ["node_size=3", "does not divide the world of 4 ranks", "1, 2, 4"]),
    (
        {"shard_size": 2, "hierarchical": True, **NODES_OF_2},
        ["hierarchical=True", "shard_size=2", "nodes of 2 ranks", "hierarchical='auto', or shard_size=4"],
    ),
    ({"shard_size": 4, "hierarchical": True, "node_size": 4}, ["hierarchical=True", "Use hierarchical='auto'."]),
    ({"wrap": "Blok", **NODES_OF_2}, ["wrap='Blok'", "Did you mean 'Block'?", "wrap='auto'"]),
    ({"wrap": nn.Conv2d, **NODES_OF_2}, ["wrap='Conv2d'", "It contains: ", "wrap='auto'"]),
    ({"wrap": [lambda_that_selects_nothing], **NODES_OF_2}, ["selected no module", "wrap='auto'"]),
    ({"param_dtype": "int8"}, ["param_dtype='int8'", "'bfloat16'"]),
]


def name_of(settings: dict[str, Any]) -> str:
    """Names a case by its settings; a function's text holds an address, which differs between processes."""
    named = {
        key: [each.__name__ for each in value] if isinstance(value, list) else value for key, value in settings.items()
    }
    return str(named)


@pytest.mark.parametrize(("settings", "told"), SETTINGS, ids=[name_of(settings) for settings, _ in SETTINGS])
def test_a_wrong_setting_is_named_with_one_that_works(
    pool: WorkerPool, settings: dict[str, Any], told: list[str]
) -> None:
    for failure in pool.attempt(shard_with, settings, world_size=WORLD):
        assert failure.kind == "MiCSConfigError", failure
        assert all(part in failure.message for part in told), failure.message


def straddling() -> None:
    mics_shard(build("uneven"), MiCSConfig(shard_size=2, node_size=3))


def test_a_partition_that_straddles_nodes_is_refused(pool: WorkerPool) -> None:
    for failure in pool.attempt(straddling, world_size=6):
        assert failure.kind == "MiCSConfigError"
        assert "shard_size=2 makes partition groups straddle nodes unevenly" in failure.message
        assert "6 ranks (2 x 3)" in failure.message and "1, 3, 6, 'node' or 'world'" in failure.message


def without_collectives(settings: dict[str, Any]) -> list[str]:
    """Returns the collectives that were called before the error."""
    called: list[str] = []

    def refuse(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: called.append(name)

    names = ("all_reduce", "all_gather_object", "broadcast", "barrier", "new_group", "all_gather")
    kept = {name: getattr(dist, name) for name in names}
    try:
        for name in names:
            setattr(dist, name, refuse(name))
        with pytest.raises(ValueError, match=r"Values that work|Use hierarchical|wrap|Try"):
            shard_with(settings)
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    return called


@pytest.mark.parametrize("settings", [settings for settings, _ in SETTINGS], ids=name_of)
def test_the_error_comes_before_any_collective(pool: WorkerPool, settings: dict[str, Any]) -> None:
    assert pool.run(without_collectives, settings, world_size=WORLD) == [[]] * WORLD


# --- models -----------------------------------------------------------------------------------------------------------


def ddp() -> nn.Module:
    return DistributedDataParallel(build("uneven"))


def fsdp1() -> nn.Module:
    return FullyShardedDataParallel(build("uneven"), device_id=torch.device("cpu"))


def fsdp2() -> nn.Module:
    return fully_shard(build("uneven"))


def inner_fsdp2() -> nn.Module:
    model = build("uneven")
    fully_shard(model.blocks[0])
    return model


def inner_ddp() -> nn.Module:
    model = build("uneven")
    model.blocks[0] = DistributedDataParallel(model.blocks[0])
    return model


def mics_twice() -> nn.Module:
    return mics_shard(build("uneven"), MiCSConfig(shard_size=2, node_size=2))


class Empty(nn.Module):
    pass


def empty() -> nn.Module:
    return Empty()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 1))


MODELS: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (ddp, ["wrapped already", "the root uses DistributedDataParallel", "Pass the plain model"]),
    (fsdp1, ["wrapped already", "the root uses FSDP1's FullyShardedDataParallel", "Pass the plain model"]),
    (fsdp2, ["wrapped already", "the root uses FSDP2's fully_shard", "Pass the plain model"]),
    (inner_fsdp2, ["wrapped already", "blocks.0 uses FSDP2's fully_shard", "Pass the plain model"]),
    (inner_ddp, ["wrapped already", "blocks.0 uses DistributedDataParallel", "Pass the plain model"]),
    (mics_twice, ["wrapped already by mics_shard", "Pass the plain model"]),
    (empty, ["Empty has no parameters", "Create its layers before sharding"]),
    (lazy, ["0.weight of a lazy module", "one batch"]),
    (sparse, ["0 has sparse gradients", "sparse=False"]),
]


def shard_model(builder: Callable[[], nn.Module]) -> None:
    mics_shard(builder(), MiCSConfig(shard_size=2, node_size=2))


@pytest.mark.parametrize(("builder", "told"), MODELS, ids=[builder.__name__ for builder, _ in MODELS])
def test_a_model_that_cannot_be_sharded_is_described(
    pool: WorkerPool, builder: Callable[[], nn.Module], told: list[str]
) -> None:
    for failure in pool.attempt(shard_model, builder, world_size=WORLD):
        assert failure.kind == "MiCSConfigError", failure
        assert all(part in failure.message for part in told), failure.message


def test_a_process_group_is_needed() -> None:
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"torchrun .*init_process_group\(\) first"):
        mics_shard(build("uneven"))


# --- clusters ---------------------------------------------------------------------------------------------------------


def launched_with(by_rank: list[dict[str, str]]) -> ClusterTopology:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_"))]:
        del os.environ[name]
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ.update(by_rank[dist.get_rank()])
    return detect_topology()


def local(size: int) -> dict[str, str]:
    return {"LOCAL_WORLD_SIZE": str(size)}


def test_nodes_of_equal_size_are_detected(pool: WorkerPool) -> None:
    expected = ClusterTopology(world_size=4, node_size=2)
    assert pool.run(launched_with, [local(2)] * 4, world_size=4) == [expected] * 4


def launched_on(hosts: list[str]) -> ClusterTopology:
    with mock.patch.object(socket, "gethostname", lambda: hosts[dist.get_rank()]):
        return launched_with([local(2)] * 4)


def test_ranks_that_are_not_numbered_node_by_node_are_refused_on_every_rank(pool: WorkerPool) -> None:
    expected = ClusterTopology(world_size=4, node_size=2)
    for hosts in ("aabb", "aaaa"):  # on one host, nodes are pretended
        assert pool.run(launched_on, list(hosts), world_size=4) == [expected] * 4
    with pytest.raises(WorkerError) as caught:
        pool.run(launched_on, list("abab"), world_size=4)
    assert len(caught.value.failures) == 4
    assert all("rank 1 is on 'b' but rank 0 on 'a'" in str(failure) for failure in caught.value.failures.values())


UNEVEN = {
    "torchrun": ([local(3)] * 3 + [local(1)], 4),
    "torchrun, both dividing": ([local(4)] * 4 + [local(2)] * 2, 6),
    "torchrun, each plausible": ([local(2)] * 2 + [local(1)] * 2, 4),
    "slurm": ([{"WORLD_SIZE": "", "SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "4,2"}] * 6, 6),
}


@pytest.mark.parametrize(("by_rank", "world_size"), UNEVEN.values(), ids=UNEVEN.keys())
def test_nodes_of_different_size_are_refused_on_every_rank(
    pool: WorkerPool, by_rank: list[dict[str, str]], world_size: int
) -> None:
    for failure in pool.attempt(launched_with, by_rank, world_size=world_size):
        assert failure.kind == "MiCSConfigError", failure
        assert "different numbers of ranks" in failure.message
        assert "the same number on each node" in failure.message and "node_size=" in failure.message


# --- ranks that disagree ----------------------------------------------------------------------------------------------


def disagree_in_settings() -> None:
    mics_shard(build("uneven"), MiCSConfig(shard_size=2 if dist.get_rank() else 4, node_size=2))


def disagree_in_units() -> None:
    wrap = "Block" if dist.get_rank() else "Linear"
    mics_shard(build("uneven"), MiCSConfig(shard_size=2, node_size=2, wrap=wrap))


def disagree_in_the_model() -> None:
    mics_shard(Regressor(2 + dist.get_rank() // 3), MiCSConfig(shard_size=2, node_size=2, wrap="Linear"))


def disagree_in_many_parameters() -> None:
    mics_shard(nn.Sequential(*(nn.Linear(2, 2) for _ in range(90 if dist.get_rank() else 100))), MiCSConfig())


def test_a_disagreement_in_much_is_told_by_its_beginning(pool: WorkerPool) -> None:
    for failure in pool.attempt(disagree_in_many_parameters, world_size=2):
        assert (
            "rank 0 has 200 entries (90.weight (2, 2)" in failure.message and "17 more on it alone)" in failure.message
        )
        assert "rank 1 has 180 entries. Give every rank" in failure.message
        assert len(failure.message) < 600


@pytest.mark.parametrize("function", [disagree_in_settings, disagree_in_units, disagree_in_the_model])
def test_ranks_that_disagree_hear_of_it(pool: WorkerPool, function: Callable[[], None]) -> None:
    for failure in pool.attempt(function, world_size=4):
        assert failure.kind == "MiCSConfigError", failure
        assert "Ranks differ in" in failure.message
        assert "Give every rank the same arguments and environment" in failure.message
