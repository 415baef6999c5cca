"""What Lightning is told of the cluster, and what a launcher has started."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_tools import LanguageModel, loader, make_trainer, train_alone
from works import works

from lightning_mics.errors import MiCSConfigError
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.lightning.trainer import MiCSStrategy
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0"}
SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


class RayEnvironment(LightningEnvironment):
    """What Ray Train's ``RayLightningEnvironment`` is: its world is that of the session, whoever sets another."""

    def world_size(self) -> int:
        return int(os.environ["WORLD_SIZE"])

    def global_rank(self) -> int:
        return int(os.environ["RANK"])

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self) -> int:
        return int(os.environ["RANK"]) // int(os.environ["LOCAL_WORLD_SIZE"])

    def set_world_size(self, size: int) -> None: ...

    def set_global_rank(self, rank: int) -> None: ...

    def teardown(self) -> None: ...


def trainer(environment: ClusterEnvironment, **where: Any) -> Any:
    return pl.Trainer(accelerator="cpu", strategy=MiCSStrategy(), plugins=[environment], logger=False, **where)


def fabric(environment: ClusterEnvironment, **where: Any) -> Any:
    return Fabric(accelerator="cpu", strategy=FabricStrategy(), plugins=[environment], **where)


@pytest.fixture(params=[trainer, fabric], ids=["trainer", "fabric"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    for name in (*TORCHRUN, *SLURM, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    return request.param  # type: ignore[no-any-return]


@works("Scripts", "A wrong `devices` or `num_nodes` is named")
@pytest.mark.parametrize(
    ("where", "told"),
    [
        ({"devices": 8}, "devices=8 and num_nodes=1 make 8 process(es), but 4 are running"),
        ({"devices": 2}, "devices=2 and num_nodes=1 make 2 process(es), but 4 are running"),
        ({"devices": 1}, "devices=1 and num_nodes=1 make 1 process(es), but 4 are running"),
        ({"devices": "auto"}, "devices=1 and num_nodes=1 make 1 process(es), but 4 are running"),
        ({"devices": 4, "num_nodes": 2}, "devices=4 and num_nodes=2 make 8 process(es), but 4 are running"),
        ({"devices": 2, "num_nodes": 2}, "devices=2 and num_nodes=2 do not fit the 4 processes that are running"),
    ],
    ids=str,
)
@pytest.mark.parametrize("environment", [TorchElasticEnvironment, LightningEnvironment, RayEnvironment])
def test_what_torchrun_started_is_compared(
    build: Any, monkeypatch: pytest.MonkeyPatch, environment: Any, where: dict[str, Any], told: str
) -> None:
    for rank in range(4):
        for name, value in {**TORCHRUN, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MiCSConfigError) as caught:
            build(environment(), **where)
        assert told in str(caught.value)
        assert "Set devices=4 and num_nodes=1." in str(caught.value)
        build(environment(), devices=4)


@pytest.mark.parametrize("where", [{"devices": 4}, {"devices": 2}, {"devices": 1, "num_nodes": 2}], ids=str)
def test_what_slurm_started_is_compared(build: Any, monkeypatch: pytest.MonkeyPatch, where: dict[str, Any]) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MiCSConfigError, match=r"Set devices=2 and num_nodes=2\."):
        build(SLURMEnvironment(), **where)
    build(SLURMEnvironment(), devices=2, num_nodes=2)


def test_ranks_that_are_not_numbered_node_by_node_are_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # --distribution=cyclic: ranks 0 and 2 are on the first node, 1 and 3 on the second.
    for name, value in {**SLURM, "SLURM_PROCID": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MiCSConfigError, match=r"rank 2 is number 1 on node 0, with 2 a node .*--distribution=block"):
        build(SLURMEnvironment(), devices=2, num_nodes=2)


def test_places_count_where_a_launcher_tells_no_sizes(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MiCSConfigError, match="one of them is number 3 on node 0"):
        build(LightningEnvironment(), devices=2, num_nodes=2)
    build(LightningEnvironment(), devices=4)


def test_processes_that_lightning_starts_are_compared_with_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build(LightningEnvironment(), devices=2)
    monkeypatch.setenv("LOCAL_RANK", "1")  # one of them, and its world is known only to the settings
    build(LightningEnvironment(), devices=2)


def train_under_ray() -> None:
    world_size = dist.get_world_size()
    with pytest.raises(MiCSConfigError, match=rf"Set devices={world_size} and num_nodes=1\."):
        make_trainer(plugins=[RayEnvironment()], devices="auto", num_nodes=1, strategy=MiCSStrategy())
    torch.manual_seed(3)
    module = LanguageModel()
    torch.manual_seed(3)
    alone = LanguageModel()
    runner = make_trainer(plugins=[RayEnvironment()], devices=world_size, num_nodes=1, strategy=MiCSStrategy())
    runner.fit(module, loader(3, world_size))
    train_alone(alone.net, 3, world_size)
    assert_parity(full_state_dict(module), alone.state_dict())


@works("Scripts", "Ray's environment, told of the workers on a node")
def test_rays_environment_trains_when_told_of_its_workers(pool: WorkerPool) -> None:
    pool.run(train_under_ray, world_size=2)
