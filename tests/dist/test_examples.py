"""The examples, started as their README says, at a small size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = ["--accelerator", "cpu", "--devices", "2"]


def run(folder: Path, *command: object) -> str:
    """Runs a command in an empty folder; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def losses(screen: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss ([\d.]+)", screen)]


def test_trainer_gpt2_and_its_resumption(tmp_path: Path) -> None:
    script = EXAMPLES / "trainer_gpt2.py"
    first = run(tmp_path, sys.executable, script, *CPU, "--node-size", 1, "--steps", 4)
    assert (tmp_path / "runs" / "gpt2" / "last.ckpt").is_dir()
    assert "1 replica(s) x 2 shard(s)" in first
    resumed = [*CPU, "--shard-size", 1, "--steps", 8, "--resume", "runs/gpt2/last.ckpt", "--folder", "runs/more"]
    second = run(tmp_path, sys.executable, script, *resumed)
    assert losses(second)[-1] < losses(first)[-1] < 5.6  # a uniform guess among 256 bytes has 5.55


@pytest.mark.slow
def test_trainer_bert_is_better_than_chance(tmp_path: Path) -> None:
    screen = run(tmp_path, sys.executable, EXAMPLES / "trainer_bert.py", *CPU, "--steps", 15)
    accuracy = float(re.search(r"accuracy on held-out files ([\d.]+)", screen)[1])
    assert accuracy > 0.4


def test_fabric_gpt2(tmp_path: Path) -> None:
    screen = run(tmp_path, sys.executable, EXAMPLES / "fabric_gpt2.py", *CPU, "--steps", 10)
    first, last = losses(screen)[0], losses(screen)[-1]
    assert last < first
    assert (tmp_path / "runs" / "fabric.ckpt").is_dir()


def test_pytorch_loop(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    screen = run(tmp_path, *torchrun, EXAMPLES / "pytorch_loop.py", "--steps", 10)
    first, last = losses(screen)
    assert last < first
    assert (tmp_path / "runs" / "loop").is_dir()


def test_lightning_cli(tmp_path: Path) -> None:
    config = EXAMPLES / "cli_gpt2.yaml"
    small = ["--trainer.devices", "2", "--trainer.max_steps", "2", "--trainer.strategy.init_args.node_size", "1"]
    run(tmp_path, sys.executable, EXAMPLES / "cli_gpt2.py", "fit", "--config", config, *small)


def test_launch_scripts_are_valid_bash_and_name_what_they_miss() -> None:
    for script in (EXAMPLES / "launch" / "torchrun.sh", EXAMPLES / "launch" / "slurm.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", EXAMPLES / "launch" / "torchrun.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and "set NODES" in done.stderr
