"""The examples, started as their README says, at a small size."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from script_tools import LAUNCH, run_python

EXAMPLES = Path(__file__).parents[1] / "examples"
GUESS = math.log(256)  # the loss of a uniform guess among bytes
CPU = ["--accelerator", "cpu", "--devices", "2"]
ACCELERATE = EXAMPLES / "accelerate"
ONE_REPLICA = ["--num_processes", 2, "--parallelism_config_dp_replicate_size", 1]  # instead of two on four processes


def screen_of(done: subprocess.CompletedProcess[str], expected_remark: str | None = None) -> str:
    """Returns what a program printed, which must have succeeded and hold no remark but an expected one."""
    screen = done.stdout + done.stderr
    assert done.returncode == 0, screen[-6000:]
    # Python and Lightning begin a warning with the file and the line; others say what it is.
    remarks = re.findall(r".*\.py:\d+: .*|.*(?:[Ww]arning|WARN|deprecated|unrecognized).*", screen)
    remarks = [remark for remark in remarks if expected_remark is None or expected_remark not in remark]
    assert not remarks, "\n".join(remarks)
    return done.stderr + done.stdout


def lightning(folder: Path, *words: object, real: bool, expected_remark: str | None = None) -> str:
    return screen_of(run_python(folder, *words, ranks=2, real=real), expected_remark)


def losses(screen: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss ([\d.]+)", screen)]


def test_trainer_gpt2_and_its_resumption(tmp_path: Path, real: bool) -> None:
    script = EXAMPLES / "trainer_gpt2.py"
    first = lightning(tmp_path, script, *CPU, "--node-size", 1, "--steps", 4, real=real)
    assert (tmp_path / "runs" / "gpt2" / "last.ckpt").is_dir()
    assert "1 replica(s) x 2 shard(s)" in first
    resumed = [*CPU, "--shard-size", 1, "--steps", 8, "--ckpt-path", "runs/gpt2/last.ckpt"]
    # Lightning says so wherever a run ends in the middle of an epoch.
    second = lightning(tmp_path, script, *resumed, real=real, expected_remark="your dataloader is not resumable")
    assert losses(second)[-1] < losses(first)[-1] < GUESS


@pytest.mark.campaign
def test_trainer_bert_is_better_than_chance(tmp_path: Path, real: bool) -> None:
    screen = lightning(tmp_path, EXAMPLES / "trainer_bert.py", *CPU, "--steps", 10, real=real)
    assert accuracy(screen) > 0.5  # chance is 0.25


def test_fabric_gpt2(tmp_path: Path, real: bool) -> None:
    cpu = CPU if real else CPU[:2]  # forked processes have torchrun's variables, which tell the devices
    screen = lightning(tmp_path, EXAMPLES / "fabric_gpt2.py", *cpu, "--steps", 10, real=real)
    first, last = losses(screen)[0], losses(screen)[-1]
    assert last < first
    assert (tmp_path / "runs" / "fabric.ckpt").is_dir()


def test_pytorch_loop(tmp_path: Path) -> None:
    # Port 0 lets torchrun choose a free one, which only a single node can do.
    cluster = {"GPUS": "4", "PORT": "0"}
    environment = {
        **os.environ,
        **cluster,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as if the environment were activated
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),  # torchrun leaves its logs there
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [EXAMPLES / "launch" / "torchrun.sh", EXAMPLES / "pytorch_loop.py", "--node-size", "2", "--steps", "10"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    screen = screen_of(done)
    first, last = losses(screen)
    assert last < first
    assert (tmp_path / "runs" / "loop").is_dir()


def test_lightning_cli(tmp_path: Path) -> None:
    config = EXAMPLES / "cli_gpt2.yaml"
    small = ["--trainer.devices", "2", "--trainer.max_steps", "4", "--trainer.strategy.init_args.node_size", "1"]
    screen = lightning(tmp_path, EXAMPLES / "cli_gpt2.py", "fit", "--config", config, *small, real=True)
    assert losses(screen)[-1] < GUESS


def accelerate(folder: Path, *command: object, real: bool) -> str:
    return screen_of(run_python(folder, *LAUNCH, ACCELERATE / "mics.yaml", *command, real=real))


def accuracy(screen: str) -> float:
    return float(re.search(r"accuracy on held-out files ([\d.]+)", screen)[1])


def calls(screen: str, hop: str) -> int:
    """Returns the number of calls in the ledger's table."""
    return int(re.search(rf"^{hop} +(\d+)", screen, re.MULTILINE)[1])


@pytest.mark.slow
def test_accelerate_bert(tmp_path: Path, real: bool) -> None:
    from transformers import AutoModelForSequenceClassification

    small = ["--steps", 8, "--accumulate", 2, "--folder", "bert"]
    screen = accelerate(tmp_path, *ONE_REPLICA, ACCELERATE / "bert_classification.py", *small, real=real)
    assert "1 replica(s) x 2 shard(s)" in screen
    assert accuracy(screen) > 0.4  # chance is 0.25
    assert calls(screen, "partition reduce") == 8 * 2 * 8 and calls(screen, "replication reduce") == 0
    assert (tmp_path / "bert" / "state" / "mics.json").is_file()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert" / "model")


def test_accelerate_gpt2_by_the_runner(tmp_path: Path, real: bool) -> None:
    from transformers import GPT2LMHeadModel

    script = [ACCELERATE / "gpt2_pretraining.py", "--epochs", 1, "--batch-size", 16, "--folder", "gpt2"]
    screen = accelerate(tmp_path, "-m", "lightning_mics.run", "--report", "report.json", *script, real=real)
    assert "the script runs under MiCS (shard_size=2)" in screen and "2 replica(s) x 2 shard(s)" in screen
    assert losses(screen)[-1] < GUESS
    (units,) = json.loads((tmp_path / "report.json").read_text())
    for unit in units.values():
        assert unit["PARTITION_REDUCE"]["calls"] == 4 * unit["REPLICATION_REDUCE"]["calls"] > 0
    GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")


@pytest.mark.campaign
def test_accelerate_trainer_bert(tmp_path: Path, real: bool) -> None:
    from transformers import AutoModelForSequenceClassification

    small = ["--steps", 8, "--accumulate", 2, "--folder", "bert"]
    screen = accelerate(tmp_path, *ONE_REPLICA, ACCELERATE / "trainer_bert.py", *small, real=real)
    assert "1 replica(s) x 2 shard(s)" in screen
    assert accuracy(screen) > 0.4  # chance is 0.25
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert" / "model")


def test_accelerate_lora(tmp_path: Path, real: bool) -> None:
    from peft import PeftConfig

    screen = accelerate(tmp_path, ACCELERATE / "lora_gpt2.py", "--steps", 6, "--folder", "lora", real=real)
    first, last = losses(screen)
    assert last < first
    share = float(re.search(r"([\d.]+)% of the parameters are trained", screen)[1])
    assert share < 10
    sent = re.search(r"reduced in a microstep: (\d+) B; adapters (\d+) B, whole model (\d+) B", screen)
    reduced, adapters, whole = map(int, sent.groups())
    assert adapters <= reduced < 1.1 * adapters < 0.2 * whole  # uneven shards would be padded
    assert calls(screen, "partition reduce") == 4 * calls(screen, "replication reduce") == 6 * 4 * 4
    PeftConfig.from_pretrained(tmp_path / "lora")


def launched_by(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a launch script where launchers only say their words."""
    for name in ("torchrun", "srun"):
        (folder / name).write_text('#!/bin/sh\necho "$@"\n')
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    command = ["bash", EXAMPLES / "launch" / script, "train.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_launch_scripts_are_sized_by_the_number_of_nodes(tmp_path: Path) -> None:
    one = launched_by("torchrun.sh", tmp_path)
    assert "--nnodes 1 --nproc-per-node auto" in one.stdout and "localhost:29500" in one.stdout
    two = launched_by("torchrun.sh", tmp_path, NODES="2", HEAD="node-0")
    assert "--nnodes 2 --nproc-per-node auto" in two.stdout and "node-0:29500" in two.stdout
    lost = launched_by("torchrun.sh", tmp_path, NODES="2")
    assert lost.returncode != 0 and "set HEAD" in lost.stderr
    slurm = launched_by("slurm.sbatch", tmp_path, SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="8")
    assert slurm.stdout.endswith("python train.py --num-nodes 2 --devices 8\n")
