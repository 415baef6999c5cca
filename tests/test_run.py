"""Scripts that do not know MiCS, started by ``accelerate launch`` and a launch file."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from script_tools import LAUNCH, run_python
from works import works

from lightning_mics.accelerate.launch_file import LaunchSettings, write_launch_file

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[0] / "scripts"
PATH = {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])}


def launch(
    folder: Path,
    *script: str,
    settings: dict[str, Any] | None = None,
    arguments: tuple[str, ...] = (),
    real: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a script in ``folder`` on four CPU processes, by a file that ``mics config`` writes."""
    config = write_launch_file(
        folder / "mics.yaml", LaunchSettings(**{"shard_size": 2, "num_processes": 4, "cpu": True, **(settings or {})})
    )
    return run_python(folder, *LAUNCH, config, *arguments, *script, environment=PATH, real=real, timeout=120)


def run(folder: Path, *script: str, **options: Any) -> tuple[str, list[dict[str, int]]]:
    """Returns the screen and, for each unit, the calls of each hop."""
    done = launch(folder, "-m", "lightning_mics.run", "--report", "report.json", *script, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (model,) = json.loads((folder / "report.json").read_text())
    calls = [{hop: counts["calls"] for hop, counts in unit.items()} for unit in model.values()]
    return done.stdout + done.stderr, calls


@works("Scripts", "A script of Accelerate under the runner")
def test_an_accelerate_script(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    screen, units = run(tmp_path, str(SCRIPTS / "accelerate_script.py"), "--output_dir", "saved", real=True)
    assert screen.count("the script runs under MiCS (shard_size=2)") == 1
    assert "2 replica(s) x 2 shard(s)" in screen and "epoch 1: " in screen
    assert "4 partition reduce-scatter(s) for each all-reduce between replicas" in screen
    # 128 rows make 8 microbatches for each of four ranks, twice.
    assert len(units) == 4  # two layers, the embeddings, and what is left
    assert all((unit["PARTITION_REDUCE"], unit["REPLICATION_REDUCE"]) == (16, 4) for unit in units)
    BertForSequenceClassification.from_pretrained(tmp_path / "saved")


TRAINER = ("--output_dir", "out", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")


def test_a_trainer_script_and_its_resumption_on_another_shard_size(tmp_path: Path, real: bool) -> None:
    script = str(SCRIPTS / "trainer_script.py")
    options = (*TRAINER, "--max_steps", "4", "--save_steps", "2", "--report_to", "none")
    screen, units = run(tmp_path, script, *options, real=real)
    assert screen.count("the script runs under MiCS") == 1 and "eval_loss" in screen
    assert all((unit["PARTITION_REDUCE"], unit["REPLICATION_REDUCE"]) == (16, 4) for unit in units)
    other = tmp_path / "other"
    other.mkdir()
    resume = ("--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2"))
    _, units = run(other, script, *options, *resume, settings={"shard_size": 4}, real=real)
    assert all((unit["PARTITION_REDUCE"], unit["REPLICATION_REDUCE"]) == (8, 0) for unit in units)


@works("Scripts", "`Seq2SeqTrainer`, imported first, in scripts that do not know MiCS")
def test_seq2seq_trainer(tmp_path: Path) -> None:
    script = str(SCRIPTS / "seq2seq_script.py")
    (alone := tmp_path / "alone").mkdir()
    done = run_python(alone, script, "--rows", "8", environment=PATH, timeout=120)
    assert done.returncode == 0, done.stderr[-6000:]
    screen, units = run(tmp_path, script)
    # Blocks of T5 hand on the position bias of the first one, whose gradient makes a block be reduced once more.
    assert all(unit["PARTITION_REDUCE"] == 3 * unit["REPLICATION_REDUCE"] in (6, 12) for unit in units)
    ours, theirs = (
        [float(word) for word in text.partition("LOSSES ")[2].partition("\n")[0].split()]
        for text in (screen, done.stdout)
    )
    assert len(ours) == len(theirs) == 4
    assert ours == pytest.approx(theirs, rel=1e-5)
    files = [folder / "out" / "checkpoint-2" / "model.safetensors" for folder in (tmp_path, alone)]
    assert files[0].stat().st_size == files[1].stat().st_size  # tied weights once


@works("Scripts", "Subclasses of the Trainer, in any order of imports")
def test_every_trainer_is_ours(tmp_path: Path) -> None:
    done = run_python(tmp_path, str(SCRIPTS / "trainer_orders.py"), environment=PATH)
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(done.stdout.splitlines()) == 4 and "False" not in done.stdout


def test_a_module_by_name(tmp_path: Path, real: bool) -> None:
    options = (*TRAINER, "--max_steps", "1", "--save_strategy", "no", "--report_to", "none")
    assert "eval_loss" in run(tmp_path, "-m", "trainer_script", *options, real=real)[0]


@pytest.mark.parametrize("script", [("-m", "lightning_mics.run"), ()], ids=["runner", "own script"])
def test_sizes_that_do_not_multiply_are_refused_before_anything_connects(tmp_path: Path, script: Any) -> None:
    (tmp_path / "own.py").write_text("from lightning_mics.accelerate import MiCSAccelerator\nMiCSAccelerator()\n")
    name = str(SCRIPTS / "accelerate_script.py") if script else "own.py"
    done = launch(tmp_path, *script, name, arguments=("--parallelism_config_dp_replicate_size", "3"))
    assert done.returncode != 0
    assert "parallelism_config_dp_replicate_size: 3" in done.stderr and "make 6 processes, but 4" in done.stderr
    assert "change the line to 'parallelism_config_dp_replicate_size: 2'" in done.stderr


def test_lines_that_accelerate_drops_are_refused(tmp_path: Path) -> None:
    write = LaunchSettings(shard_size=2, num_processes=4, cpu=True)
    file = write_launch_file(tmp_path / "typo.yaml", write)
    file.write_text(file.read_text().replace("fsdp_config:", "fsdp_config:\n  mics_hierarchical: false"))
    script = str(SCRIPTS / "accelerate_script.py")
    # Ranks read the command of the launcher, so it must be one.
    done = run_python(tmp_path, *LAUNCH, "typo.yaml", "-m", "lightning_mics.run", script, real=True, timeout=120)
    assert done.returncode != 0
    assert "mics_hierarchical: false is not carried by Accelerate" in done.stderr
    assert "MICS_HIERARCHICAL=false" in done.stderr


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    done = launch(tmp_path, "-m", "lightning_mics.run", "nowhere.py")
    assert done.returncode != 0 and "there is no script nowhere.py" in done.stderr


DEEPSPEED = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
    "zero_optimization": {"stage": 3, "mics_shard_size": 4, "mics_hierarchical_params_gather": True},
}


def test_a_converted_deepspeed_configuration_trains(tmp_path: Path, real: bool) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    convert = ["-m", "lightning_mics.cli", "convert-config", "ds.json", "--world-size", "4", "--format", "accelerate"]
    script = ["-m", "lightning_mics.run", "--report", "report.json", SCRIPTS / "accelerate_script.py"]
    for command in (convert, [*LAUNCH, "mics.yaml", *script]):
        done = run_python(tmp_path, *command, environment={"MICS_NODE_SIZE": "2"}, real=real, timeout=120)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "1 replica(s) x 4 shard(s)" in done.stderr and "epoch 1: " in done.stdout
    (model,) = json.loads((tmp_path / "report.json").read_text())
    for unit in model.values():
        # Two nodes of two: half of a message leaves a node, as two-stage collectives have it; of flat ones 3/4.
        assert unit["PARTITION_GATHER"]["inter_bytes"] * 2 == unit["PARTITION_GATHER"]["message_bytes"]
