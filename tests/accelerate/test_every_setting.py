"""Every setting of MiCSConfig reaches the engine, whatever way it comes in."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_tools import carried, forget_accelerate, make_accelerator
from models import build
from transformers import TrainingArguments

from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.accelerate.launch_file import LaunchSettings, check_launch_file, write_launch_file
from lightning_mics.cli import main
from lightning_mics.config import MiCSConfig
from lightning_mics.core.runtime import runtime_of
from lightning_mics.precision import ACCELERATE_PRECISIONS
from lightning_mics.testing import WorkerPool
from lightning_mics.transformers import MiCSTrainer

SETTINGS = [entry.name for entry in dataclasses.fields(MiCSConfig)]
# Another value than the default, and how a variable says it.
VALUES: dict[str, tuple[Any, str]] = {
    "shard_size": (2, "2"),
    "node_size": (2, "2"),
    "hierarchical": (False, "false"),
    "wrap": (["GPT2Block"], "[GPT2Block]"),
    "ignore": (["*.ln_1.bias"], "['*.ln_1.bias']"),
    "reshard_after_forward": (False, "false"),
    "param_dtype": (torch.bfloat16, "bf16"),
    "reduce_dtype": (torch.bfloat16, "bf16"),
    "output_dtype": (torch.float64, "float64"),
    "cast_forward_inputs": ("units", "units"),
    "activation_checkpointing": (["GPT2Block"], "[GPT2Block]"),
    "cpu_offload": (True, "true"),
    "verify": (False, "false"),
    "memory_limit": (2**33, "8GiB"),
    "verify_every": (100, "100"),
    "on_mismatch": ("repair", "repair"),
    "async_checkpoint": (True, "true"),
    "optimizer_shard_size": ("world", "world"),
    "replication_reduce_dtype": (torch.bfloat16, "bf16"),
    "replication_gather_dtype": (torch.bfloat16, "bf16"),
    "master_weights": ("owners", "owners"),
    "activation_checkpointing_offload": (True, "true"),
    "uneven_inputs": ("longest", "longest"),
}
# What a value needs beside it to mean something.
BESIDE: dict[str, dict[str, Any]] = {
    "activation_checkpointing_offload": {"activation_checkpointing": True},
    "master_weights": {"param_dtype": torch.bfloat16, "optimizer_shard_size": "world"},
    "replication_gather_dtype": {"param_dtype": torch.bfloat16, "optimizer_shard_size": "world"},
}
FLAGS = {
    "shard_size": ["--shard-size", "2"],
    "node_size": ["--node-size", "2"],
    "hierarchical": ["--hierarchical", "false"],
    "wrap": ["--wrap", "GPT2Block"],
    "reshard_after_forward": ["--no-reshard-after-forward"],
    "param_dtype": ["--mixed-precision", "bf16"],
    "reduce_dtype": ["--reduce-dtype", "bf16"],
    "cpu_offload": ["--cpu-offload"],
}


def test_every_setting_has_a_value_here_that_is_not_the_default() -> None:
    assert list(VALUES) == SETTINGS
    assert not [name for name in SETTINGS if VALUES[name][0] == getattr(MiCSConfig(), name)]


@pytest.mark.parametrize("name", SETTINGS)
def test_arguments_and_variables_reach_the_plugin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, text = VALUES[name]
    plugin = MiCSPlugin(**{name: value})
    assert getattr(plugin.config, name) == getattr(plugin, name) == value
    monkeypatch.setenv(f"MICS_{name.upper()}", text)
    assert MiCSPlugin() == plugin


@pytest.mark.parametrize("name", SETTINGS)
def test_a_launch_reaches_the_plugin(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `mics config` where it has a flag; what has no line in the file is in the command to start with."""
    value, text = VALUES[name]
    file, variable = tmp_path / "mics.yaml", f"MICS_{name.upper()}"
    if name in FLAGS:
        assert main(["config", "--output", str(file), "--num-processes", "4", *FLAGS[name]]) == 0
    else:
        write_launch_file(file, LaunchSettings(shard_size=4, num_processes=4), environment={variable: text})
    command = re.search(r"is meant to be started with\n#   (.*)", file.read_text())
    words = shlex.split(command[1]) if command else []
    variables = dict(word.split("=", 1) for word in words if re.match(r"\w+=", word))
    for setting, said in {**carried(file), **variables}.items():
        if setting.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_", "MICS_")):
            monkeypatch.setenv(setting, said)
    precision = ACCELERATE_PRECISIONS[os.environ["ACCELERATE_MIXED_PRECISION"]].name
    assert getattr(MiCSPlugin().config.with_precision(precision), name) == value
    assert command is not None or getattr(check_launch_file(file).config, name) == value


def shard_by_every_setting(folder: str) -> dict[str, list[Any]]:
    """Returns what the engine was told, by the accelerator and by the Trainer."""
    told = {}
    for name, (value, _) in VALUES.items():
        settings = {"shard_size": 2, "node_size": 2, **BESIDE.get(name, {}), name: value}
        ours = make_accelerator(settings=settings).prepare(build("gpt2"))
        forget_accelerate()
        arguments = TrainingArguments(folder, use_cpu=True, report_to=[])
        trainer = MiCSTrainer(model=build("gpt2"), args=arguments, mics_plugin=MiCSPlugin(**settings))
        theirs = trainer.accelerator.prepare(trainer.model)
        told[name] = [getattr(runtime_of(model).config, name) for model in (ours, theirs)]
    return told


def test_every_setting_reaches_the_engine(pool: WorkerPool, tmp_path: Path) -> None:
    for told in pool.run(shard_by_every_setting, str(tmp_path), world_size=4):
        assert told == {name: [value, value] for name, (value, _) in VALUES.items()}
