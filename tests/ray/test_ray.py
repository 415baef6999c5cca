"""Ray Train: four workers on two pretended nodes, beside a run under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pyarrow.fs
import pytest
import ray
import ray_loops
from fsspec.implementations.memory import MemoryFileSystem
from ray.train import Checkpoint
from works import works

from lightning_mics.checkpoint import verify_checkpoint
from lightning_mics.errors import CheckpointError, MiCSConfigError
from lightning_mics.ray import path_of
from lightning_mics.ray import transformers as for_transformers
from lightning_mics.ray.lightning import RayMiCSStrategy, RayTrainReportCallback
from lightning_mics.testing import WorkerPool

SCRIPT = Path(ray_loops.__file__)
TESTS = SCRIPT.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two node managers of two CPUs each, under addresses of their own."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="mics-ray-")  # a short one: names of sockets in it may have 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        for wait in ("RAY_gcs_server_port_wait_time_s", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):
            patch.setenv(wait, "300")  # for machines that do more besides
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
        os.mkdir(f"{folder}/ray")
        nodes: dict[str, Any] = {"num_cpus": 2, "temp_dir": f"{folder}/ray", "object_store_memory": 80 * 2**20}
        started = Cluster()
        try:
            started.add_node(node_ip_address="127.0.0.2", include_dashboard=False, **nodes)
            started.add_node(node_ip_address="127.0.0.3", **nodes)
            ray.init(address=started.address, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def torchrun(folder: Path, ways: Sequence[str]) -> None:
    """Trains under torchrun on two nodes, started as Kubeflow Trainer does: by its variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**os.environ, "PET_NNODES": "2", "PET_NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "TMPDIR": str(folder)}
    variables["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-m", "torch.distributed.run", str(SCRIPT), str(folder), *ways]
    nodes = [subprocess.Popen(command, cwd=folder, env={**variables, "PET_NODE_RANK": str(node)}) for node in range(2)]
    try:
        assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
            node.wait()


def losses(folder: Path, way: str, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{way}-{rank}.jsonl").read_text().splitlines()]


ALONE = [pytest.param([way], True, id=way, marks=pytest.mark.campaign) for way in ray_loops.WAYS]


@works("Training loops", "Ray Train: bare, Accelerate, Lightning and transformers, resumed after a kill")
@pytest.mark.slow
@pytest.mark.parametrize(("ways", "real"), [pytest.param([*ray_loops.WAYS], False, id="together"), *ALONE])
def test_a_killed_worker_costs_no_step(
    pool: WorkerPool, cluster: None, tmp_path: Path, ways: list[str], real: bool
) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder, beside, storage = tmp_path / "ray", tmp_path / "beside", tmp_path / "storage"
    folder.mkdir(), beside.mkdir()
    result = TorchTrainer(
        ray_loops.in_ray,
        train_loop_config={"ways": ways, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=4, resources_per_worker={"CPU": 1}),
        run_config=RunConfig("run", storage_path=str(storage), failure_config=FailureConfig(max_failures=1)),
    ).fit()
    if real:
        torchrun(beside, ways)
    else:
        pool.run(ray_loops.in_pool, beside, ways, world_size=4, timeout=240)
    for way in ways:
        for rank in range(4):
            expected = {line["step"]: line["loss"] for line in losses(beside, way, rank)}
            found = losses(folder, way, rank)
            assert all((line["node_size"], line["shard_size"]) == (2, 2) for line in found)
            assert [line["step"] for line in found if line["resumed"]] == [3, 4]
            assert {line["step"] for line in found} == expected.keys() == {1, 2, 3, 4}
            assert all(line["loss"] == expected[line["step"]] for line in found), (way, expected, found)
    reported = [path_of(saved) for saved, _ in result.best_checkpoints]
    assert reported and all(path.startswith(f"{storage}/run/") for path in reported)
    assert not any(problem for path in reported for problem in verify_checkpoint(path).values())


# Without workers.


def test_checkpoints_have_the_names_that_everything_here_takes() -> None:
    s3 = pyarrow.fs.S3FileSystem(anonymous=True, region="us-east-1")
    memory = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(MemoryFileSystem()))
    assert path_of(Checkpoint("/shared/run/checkpoint_1")) == "/shared/run/checkpoint_1"
    assert path_of(Checkpoint("bucket/run/checkpoint_1", filesystem=s3)) == "s3://bucket/run/checkpoint_1"
    assert path_of(Checkpoint("/run/checkpoint_1", filesystem=memory)) == "memory:///run/checkpoint_1"
    part = pyarrow.fs.SubTreeFileSystem("/shared", pyarrow.fs.LocalFileSystem())
    with pytest.raises(CheckpointError, match=r"kind 'subtree' has no URL\. Use RunConfig\(storage_path="):
        path_of(Checkpoint("run", filesystem=part))


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Any, Any]]:
    """Stands for the worker of rank 0; returns what it reports: metrics, checkpoint, and how that is uploaded."""
    local = pyarrow.fs.LocalFileSystem()
    storage = SimpleNamespace(storage_filesystem=local, experiment_fs_path=str(tmp_path / "run"))
    context = SimpleNamespace(get_storage=lambda: storage, get_world_rank=lambda: 0)
    found: list[tuple[dict[str, Any], Any, Any]] = []

    def report(metrics: dict[str, Any], checkpoint: Any = None, checkpoint_upload_mode: Any = None) -> None:
        found.append((metrics, checkpoint and checkpoint.path, checkpoint_upload_mode))

    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", report)
    return found


def test_checkpoints_of_transformers_are_copied_only_from_elsewhere(reports: list[Any], tmp_path: Path) -> None:
    state: Any = SimpleNamespace(log_history=[{"loss": 2.0, "step": 1}, {"loss": 1.0}], global_step=5)
    callback = for_transformers.RayTrainReportCallback()
    for place, mode in (("run/trainer", ray.train.CheckpointUploadMode.NO_UPLOAD), ("elsewhere", None)):
        arguments: Any = SimpleNamespace(output_dir=str(tmp_path / place), save_total_limit=None)
        callback.on_train_begin(arguments, state, None)  # type: ignore[arg-type]
        callback.on_save(arguments, state, None)  # type: ignore[arg-type]
        assert reports.pop() == ({"loss": 1.0, "step": 1}, f"{tmp_path}/{place}/checkpoint-5", mode)


def test_two_who_delete_checkpoints_are_refused(reports: list[Any], tmp_path: Path) -> None:
    arguments: Any = SimpleNamespace(output_dir=str(tmp_path / "run" / "trainer"), save_total_limit=3)
    with pytest.raises(MiCSConfigError, match=r"save_total_limit=3 .*CheckpointConfig\(num_to_keep=3\)"):
        for_transformers.RayTrainReportCallback().on_train_begin(arguments, None, None)  # type: ignore[arg-type]
    arguments.output_dir = str(tmp_path / "elsewhere")
    for_transformers.RayTrainReportCallback().on_train_begin(arguments, None, None)  # type: ignore[arg-type]


def test_lightning_reports_every_so_many_steps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr("lightning_mics.ray.lightning.report", lambda metrics, save: steps.append(metrics["step"]))
    callback = RayTrainReportCallback(every_n_train_steps=2)
    for step in (0, 1, 1, 2, 2, 3, 4):  # microsteps
        trainer: Any = SimpleNamespace(
            global_step=step, current_epoch=0, callback_metrics={}, save_checkpoint=lambda path: None
        )
        callback.on_train_batch_end(trainer)
    callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert steps == [2, 4]


def test_a_whole_compiled_module_is_refused() -> None:
    strategy = RayMiCSStrategy()
    strategy._lightning_module = pl.LightningModule()
    strategy._lightning_module._compiler_ctx = {}
    with pytest.raises(MiCSConfigError, match=r"module\.compile\(\)"):
        strategy.setup(None)  # type: ignore[arg-type]
