"""Launch files: what is written is what Accelerate carries, and what is wrong is named with its line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate_tools import carried

from lightning_mics.accelerate import launch_check
from lightning_mics.accelerate.launch_file import (
    LaunchSettings,
    check_environment,
    check_launch_file,
    launch_commands,
    write_launch_file,
)
from lightning_mics.cli import main
from lightning_mics.errors import MiCSConfigError

GOOD = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 2  # a comment
num_processes: 8
machine_rank: 1
main_process_ip: node0
main_process_port: 29501
mixed_precision: bf16
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
parallelism_config:
  parallelism_config_dp_shard_size: 4
  parallelism_config_dp_replicate_size: 2
"""
SETTINGS = [
    LaunchSettings(shard_size=2, num_processes=4),
    LaunchSettings(shard_size=1, num_processes=1, cpu=True),
    LaunchSettings(
        shard_size=8,
        num_processes=16,
        num_machines=4,
        machine_rank=3,
        main_process_ip="::1",
        main_process_port=1234,
        mixed_precision="bf16",
        cpu=True,
        reshard_after_forward=False,
        activation_checkpointing=True,
        activation_checkpointing_offload=True,
        cpu_offload=True,
        full_checkpoint=True,
        wrap="GPT2Block, Embedding",
    ),
    LaunchSettings(
        shard_size=4, num_processes=8, num_machines=2, machine_rank=1, main_process_ip="10.0", mixed_precision="fp16"
    ),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MICS_SHARD_SIZE", "MICS_NODE_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mics.yaml"


# Settings


def test_settings_know_their_groups_and_take_the_port_that_works() -> None:
    single, several = SETTINGS[0], SETTINGS[3]
    assert (single.layout.num_replicas, single.layout.topology.node_size, single.main_process_port) == (2, 4, 0)
    assert (several.layout.num_replicas, several.layout.topology.node_size, several.main_process_port) == (2, 4, 29500)
    with pytest.raises(dataclasses.FrozenInstanceError):
        single.shard_size = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shard_size": 3}, ["shard_size=3 does not divide", "1, 2, 4, 8"]),
        ({"shard_size": 0}, ["shard_size=0", "Try shard_size=8"]),
        ({"shard_size": "node"}, ["shard_size='node'", "Try shard_size=8"]),
        ({"num_processes": 0}, ["num_processes=0", "Try num_processes=8"]),
        ({"num_processes": "8"}, ["num_processes='8'", "Try num_processes=8"]),
        ({"num_machines": 0}, ["num_machines=0", "Try num_machines=1"]),
        ({"num_machines": 3, "main_process_ip": "a"}, ["num_processes=8", "6 or 9", "num_machines=1, 2, 4, 8"]),
        (
            {"num_machines": 2, "main_process_ip": "a", "num_processes": 12, "shard_size": 4},
            ["shard_size=4", "straddle", "1, 2, 3, 6, 12"],
        ),
        ({"num_machines": 2}, ["num_machines=2 needs main_process_ip", "10.0.0.1"]),
        ({"main_process_ip": ""}, ["main_process_ip=''", "10.0.0.1"]),
        ({"main_process_ip": 10}, ["main_process_ip=10", "10.0.0.1"]),
        ({"machine_rank": 1}, ["machine_rank=1", "Values that work: 0."]),
        ({"machine_rank": 2, "num_machines": 2, "main_process_ip": "a"}, ["machine_rank=2", "0 to 1"]),
        ({"machine_rank": -1}, ["machine_rank=-1", "Values that work: 0."]),
        ({"main_process_port": -1}, ["main_process_port=-1", "Try main_process_port=29500"]),
        ({"main_process_port": 65536}, ["main_process_port=65536", "Try main_process_port=29500"]),
        ({"main_process_port": True}, ["main_process_port=True", "Try main_process_port=29500"]),
        (
            {"main_process_port": 0, "num_machines": 2, "main_process_ip": "a"},
            ["main_process_port=0", "all 2 machines", "29500"],
        ),
        ({"mixed_precision": "fp8"}, ["mixed_precision='fp8'", "'no', 'bf16', 'fp16'"]),
        ({"mixed_precision": False}, ["mixed_precision=False", "'no', 'bf16', 'fp16'"]),
        ({"cpu": "yes"}, ["cpu='yes'", "True or False"]),
        ({"full_checkpoint": None}, ["full_checkpoint=None", "True or False"]),
        ({"wrap": ""}, ["wrap=''", "GPT2Block,Embedding"]),
        ({"wrap": "A,,B"}, ["wrap='A,,B'", "GPT2Block,Embedding"]),
        ({"wrap": ["A"]}, ["wrap=['A']", "GPT2Block,Embedding"]),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(MiCSConfigError) as error:
        LaunchSettings(**{"shard_size": 4, "num_processes": 8, **changes})
    for words in expected:
        assert words in str(error.value)


# Writing


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_what_is_written_is_what_is_read(file: Path, settings: LaunchSettings) -> None:
    assert write_launch_file(file, settings) == file
    assert check_launch_file(file) == settings
    assert max(map(len, file.read_text().splitlines())) <= 120
    # The builtin lists of keys hold what is written, too.
    written = yaml.safe_load(file.read_text())
    for section, keys in (("", written), *((name, written[name]) for name in ("fsdp_config", "parallelism_config"))):
        assert set(keys) <= set(launch_check._KNOWN[section].split())


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_accelerate_accepts_the_file_and_carries_its_settings(file: Path, settings: LaunchSettings) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    write_launch_file(file, settings)
    config = load_config_from_file(str(file))
    assert (config.distributed_type, config.num_processes) == ("FSDP", settings.num_processes)
    assert (config.main_process_ip, config.use_cpu) == (settings.main_process_ip, settings.cpu)

    got = carried(file)
    expected = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "ACCELERATE_MIXED_PRECISION": settings.mixed_precision,
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(settings.shard_size),
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(settings.layout.num_replicas),
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": str(settings.reshard_after_forward).lower(),
        "FSDP_OFFLOAD_PARAMS": str(settings.cpu_offload).lower(),
        "FSDP_ACTIVATION_CHECKPOINTING": str(settings.activation_checkpointing).lower(),
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": str(settings.activation_checkpointing_offload).lower(),
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT" if settings.full_checkpoint else "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "nproc_per_node": str(settings.layout.topology.node_size),
    }
    assert {name: got.get(name) for name in expected} == expected
    assert got.get("FSDP_TRANSFORMER_CLS_TO_WRAP") == (settings.wrap and "GPT2Block,Embedding")


def test_the_plugin_reads_what_the_file_says(file: Path) -> None:
    from lightning_mics.accelerate.plugin import launched_settings

    write_launch_file(file, SETTINGS[2])
    read = launched_settings({name: value for name, value in carried(file).items() if name != "WORLD_SIZE"})
    assert read == {
        "shard_size": 8,
        "reshard_after_forward": False,
        "activation_checkpointing": True,
        "activation_checkpointing_offload": True,
        "cpu_offload": True,
        "wrap": ["GPT2Block", "Embedding"],
    }


def test_the_rank_of_a_machine_can_be_given_beside_the_file(file: Path) -> None:
    write_launch_file(file, dataclasses.replace(SETTINGS[3], machine_rank=0))
    own, other = launch_commands("my runs/mics.yaml", num_machines=2)
    assert own == "accelerate launch --config_file 'my runs/mics.yaml' --machine_rank 0 train.py"
    assert other.endswith("--machine_rank 0 -m lightning_mics.run any_script.py")
    assert carried(file, "--machine_rank", "1")["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "4"


def test_the_file_says_how_to_start_and_what_goes_through_the_environment(file: Path) -> None:
    write_launch_file(file, SETTINGS[0])
    text = file.read_text()
    assert "#   accelerate launch --config_file mics.yaml train.py\n" in text
    assert "#   accelerate launch --config_file mics.yaml -m lightning_mics.run any_script.py\n" in text
    assert "MICS_HIERARCHICAL=false MICS_REDUCE_DTYPE=bf16 accelerate launch" in text
    assert "ACCELERATE_USE_CPU" not in text
    assert "--machine_rank" not in text

    environment = {"MICS_NODE_SIZE": "2"}
    write_launch_file(file, dataclasses.replace(SETTINGS[0], cpu=True), environment=environment, force=True)
    text = file.read_text()
    assert "#   MICS_NODE_SIZE=2 accelerate launch --config_file mics.yaml train.py" in text
    assert "#   ACCELERATE_USE_CPU=true MICS_NODE_SIZE=2 accelerate launch" in text

    write_launch_file(file, SETTINGS[3], force=True)
    assert "on each of 2 machines with its rank" in file.read_text()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MICS_HIERARCHICHAL": "true"}, "Did you mean MICS_HIERARCHICAL?"),
        ({"LANG": "C"}, "Known are MICS_"),
        ({"MICS_HIERARCHICAL": "maybe"}, "hierarchical='maybe'"),
        (
            {"MICS_SHARD_SIZE": "4"},
            "MICS_SHARD_SIZE=4 contradicts the launch file's parallelism_config_dp_shard_size: 2",
        ),
        ({"MICS_NODE_SIZE": "3"}, "node_size=3 does not divide"),
    ],
)
def test_variables_that_cannot_work_are_refused(file: Path, environment: dict[str, str], expected: str) -> None:
    with pytest.raises(MiCSConfigError) as error:
        write_launch_file(file, SETTINGS[0], environment=environment)
    assert expected in str(error.value)
    assert not file.exists()


def test_pretended_nodes_show_in_the_layout() -> None:
    layout = check_environment(SETTINGS[0], {"MICS_NODE_SIZE": "1", "MICS_SHARD_SIZE": "2"})
    assert (layout.topology.num_nodes, layout.spans_nodes) == (4, True)


def test_an_existing_file_stays_without_force(file: Path, tmp_path: Path) -> None:
    file.write_text("mine")
    with pytest.raises(MiCSConfigError, match="--force"):
        write_launch_file(file, SETTINGS[0])
    assert file.read_text() == "mine"
    write_launch_file(file, SETTINGS[0], force=True)
    assert check_launch_file(file) == SETTINGS[0]

    with pytest.raises(MiCSConfigError, match="cannot be written"):
        write_launch_file(tmp_path / "none" / "mics.yaml", SETTINGS[0])
    with pytest.raises(MiCSConfigError, match=r"Try .*mics\.yaml"):
        write_launch_file(tmp_path / "mics.json", SETTINGS[0])


# Checking


def problem(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(MiCSConfigError) as error:
        check_launch_file(file)
    return str(error.value).replace(str(file), "mics.yaml")


def test_a_file_written_by_hand_is_read(file: Path) -> None:
    file.write_text(GOOD)
    assert check_launch_file(file) == LaunchSettings(
        shard_size=4,
        num_processes=8,
        num_machines=2,
        machine_rank=1,
        main_process_ip="node0",
        main_process_port=29501,
        mixed_precision="bf16",
    )


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("  fsdp_reshard_after_forward: true", "  reshard_after_forward: false", {"reshard_after_forward": False}),
        ("forward: true", "forward: 'False'", {"reshard_after_forward": False}),
        ("fsdp_version: 2", "fsdp_version: '2'", {}),
        ("fsdp_version: 2", "fsdp_version: 2\n  fsdp_sharding_strategy: FULL_SHARD", {}),
        ("fsdp_version: 2", "fsdp_version: 2\n  fsdp_sharding_strategy: HYBRID_SHARD", {}),
        ("fsdp_version: 2", "fsdp_version: 2\n  fsdp_sharding_strategy: 1", {}),
        ("fsdp_version: 2", "fsdp_version: 2\n  fsdp_ignored_modules: null", {}),
        ("mixed_precision: bf16", "mixed_precision: null", {"mixed_precision": "no"}),
        ("mixed_precision: bf16\n", "", {"mixed_precision": "no"}),
        ("mixed_precision: bf16", "fp16: true", {"mixed_precision": "fp16"}),
        ("main_process_port: 29501\n", "", {"main_process_port": 29500}),
        ("use_cpu: false", "use_cpu: true\ndeepspeed_config: {}\ndowncast_bf16: 'no'", {"cpu": True}),
    ],
)
def test_other_ways_to_write_the_same_are_read(file: Path, old: str, new: str, changes: dict[str, Any]) -> None:
    file.write_text(GOOD)
    expected = dataclasses.replace(check_launch_file(file), **changes)
    file.write_text(GOOD.replace(old, new))
    assert check_launch_file(file) == expected
    carried(file)


def test_a_file_by_accelerate_config_is_read(file: Path) -> None:
    file.write_text("""\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: BertLayer
  fsdp_version: 2
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 4
parallelism_config:
  parallelism_config_cp_size: 1
  parallelism_config_dp_replicate_size: 2
  parallelism_config_dp_shard_size: 2
  parallelism_config_tp_size: 1
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
""")
    assert check_launch_file(file) == LaunchSettings(
        shard_size=2,
        num_processes=4,
        main_process_port=29500,
        activation_checkpointing=True,
        full_checkpoint=True,
        wrap="BertLayer",
    )


# What is replaced in the good file, and what the error says about it.
WRONG = [
    # sizes
    (
        "replicate_size: 2",
        "replicate_size: 3",
        "line 16: parallelism_config_dp_replicate_size: 3 and parallelism_config_dp_shard_size: 4 make 12 processes",
        "but 8 are launched: change the line to 'parallelism_config_dp_replicate_size: 2'.",
    ),
    (
        "  parallelism_config_dp_replicate_size: 2\n",
        "",
        "line 14:",
        "change the line to 'parallelism_config_dp_replicate_size: 2'",
    ),
    ("shard_size: 4", "shard_size: 3", "line 15: parallelism_config_dp_shard_size: 3 does not divide", ": 1, 2, 4, 8."),
    ("shard_size: 4", "shard_size: 16", "line 15: parallelism_config_dp_shard_size: 16", ": 1, 2, 4, 8."),
    ("shard_size: 4", "shard_size: 0", "line 15:", "must be at least 1. Try parallelism_config_dp_shard_size: 4."),
    ("shard_size: 4", "shard_size: node", "line 15: parallelism_config_dp_shard_size: node", "size: 4."),
    (
        "shard_size: 4",
        "shard_size: 4.0",
        "line 15:",
        "4.0 is not a whole number. Try parallelism_config_dp_shard_size: 4.",
    ),
    (
        "replicate_size: 2",
        "replicate_size: true",
        "line 16:",
        "true is not a whole number. Try parallelism_config_dp_replicate_size: 2.",
    ),
    (
        "num_processes: 8",
        "num_processes: 12",
        "line 15:",
        "straddle nodes unevenly in a world of 12 ranks (2 x 6)",
        ": 1, 2, 3, 6, 12.",
    ),
    ("num_processes: 8", "num_processes: 9", "line 4: num_processes: 9", "8 or 10", "num_machines: 1, 3, 9."),
    ("num_processes: 8", "num_processes: eight", "line 4: num_processes: eight", "num_processes: 8."),
    ("num_processes: 8", "num_processes: -1", "line 4:", "must be at least 1. Try num_processes: 8."),
    ("num_processes: 8\n", "", "mics.yaml: num_processes is missing. Add a line such as 'num_processes: 8'."),
    ("num_machines: 2", "num_machines: 0", "line 3: num_machines: 0 must be at least 1. Try num_machines: 1."),
    ("  parallelism_config_dp_shard_size: 4\n", "", "line 14: parallelism_config: has no", "shard_size: 4'"),
    (GOOD[GOOD.index("parallelism_config:") :], "", "mics.yaml: parallelism_config is missing", "dp_shard_size: 4'"),
    (
        GOOD[GOOD.index("  parallelism_config_dp_shard") :],
        "",
        "line 14: parallelism_config: has no parallelism_config_dp_shard_size",
    ),
    (GOOD[GOOD.index("parallelism_config:") :], "parallelism_config: 4", "line 14:", "is not a section"),
    ("parallelism_config:\n", "parallelism_config:\n  parallelism_config_tp_size: 2\n", "line 15:", "Change it to 1."),
    ("parallelism_config:\n", "parallelism_config:\n  parallelism_config_cp_size: 2\n", "line 15:", "Change it to 1."),
    ("parallelism_config:\n", "parallelism_config:\n  parallelism_config_sp_size: 2\n", "line 15:", "Change it to 1."),
    # machines
    ("machine_rank: 1", "machine_rank: 2", "line 5: machine_rank: 2", "Values that work: 0 to 1."),
    ("main_process_ip: node0\n", "", "line 3: num_machines: 2 needs", "main_process_ip: '10.0.0.1'."),
    ("main_process_ip: node0", "main_process_ip: 10.1", "line 6: main_process_ip: 10.1", "'10.0.0.1'."),
    ("29501", "0", "line 7: main_process_port: 0", "Try main_process_port: 29500."),
    ("29501", "99999", "line 7: main_process_port: 99999", "Try main_process_port: 29500."),
    ("29501", "http", "line 7: main_process_port: http", "Try main_process_port: 29500."),
    ("use_cpu: false", "use_cpu: 0", "line 9: use_cpu: 0", "Values that work: True or False."),
    # how processes are started
    ("LOCAL_MACHINE", "AMAZON_SAGEMAKER", "line 1:", "Change it to LOCAL_MACHINE."),
    ("distributed_type: FSDP\n", "", "distributed_type is missing", "distributed_type: FSDP"),
    ("type: FSDP", "type: MULTI_CPU", "line 2: distributed_type: MULTI_CPU", "mpirun", "Change it to FSDP"),
    ("type: FSDP", "type: MULTI_GPU", "line 2: distributed_type: MULTI_GPU", "DDP", "Change it to FSDP"),
    ("type: FSDP", "type: 'NO'", "line 2:", "one process", "Change it to FSDP"),
    ("type: FSDP", "type: NO", "line 2: distributed_type: NO", "one process", "Change it to FSDP"),
    ("type: FSDP", "type: DEEPSPEED", "line 2:", "DeepSpeed", "Change it to FSDP"),
    ("type: FSDP", "type: FSPD", "line 2:", "is unknown", "Change it to FSDP"),
    ("use_cpu: false", "deepspeed_config:\n  zero_stage: 3", "line 9: deepspeed_config:", "Remove the section."),
    # precision
    ("precision: bf16", "precision: fp8", "line 8: mixed_precision: fp8", "'no', 'bf16', 'fp16'."),
    (
        "precision: bf16",
        "precision: no",
        "line 8: mixed_precision: no means false",
        "Change it to 'no', with the quotes.",
    ),
    ("precision: bf16", "precision: BF16", "line 8: mixed_precision: BF16", "'no', 'bf16', 'fp16'."),
    ("precision: bf16", "precision: half", "line 8: mixed_precision: half", "'no', 'bf16', 'fp16'."),
    # fsdp_config
    ("version: 2", "version: 1", "line 11: fsdp_version: 1", "Change it to 2."),
    ("  fsdp_version: 2\n", "", "line 10: fsdp_config: has no fsdp_version", "a line such as 'fsdp_version: 2'"),
    ("forward: true", "forward: FULL_SHARD", "line 12:", "FSDP version 1. Change it to true."),
    ("forward: true", "forward: SHARD_GRAD_OP", "line 12:", "FSDP version 1. Change it to false."),
    (
        "forward: true",
        "forward: sometimes",
        "line 12: fsdp_reshard_after_forward: sometimes",
        "Values that work: True or False.",
    ),
    ("SHARDED_STATE_DICT", "full_state_dict", "line 13: fsdp_state_dict_type: full_", ", FULL_STATE_DICT."),
    ("SHARDED_STATE_DICT", "LOCAL_STATE_DICT", "line 13:", "SHARDED_STATE_DICT, FULL_STATE_DICT."),
    (
        "version: 2",
        "version: 2\n  fsdp_sharding_strategy: SHARD_GRAD_OP",
        "line 12:",
        "forward: true",
        "Remove the line.",
    ),
    ("version: 2", "version: 2\n  fsdp_sharding_strategy: NO_SHARD", "line 12:", "size: 4", "Remove the line."),
    ("version: 2", "version: 2\n  fsdp_sharding_strategy: 5", "line 12:", "forward: true", "Remove the line."),
    ("version: 2", "version: 2\n  fsdp_sharding_strategy: 9", "line 12:", "unknown", "Remove the line."),
    ("version: 2", "version: 2\n  fsdp_auto_wrap_policy: SIZE_BASED_WRAP", "line 12:", "TRANSFORMER_BASED_WRAP"),
    ("version: 2", "version: 2\n  fsdp_transformer_layer_cls_to_wrap: [A, B]", "line 12:", "by commas"),
    # keys
    ("use_cpu", "use_cpus", "line 9: use_cpus: false is unknown, and Accelerate refuses it. Did you mean use_cpu?"),
    ("use_cpu", "zzz", "line 9: zzz: false is unknown", "Remove it."),
    ("fsdp_state_dict_type", "fsdp_state_type", "line 13:", "drops it silently. Did you mean fsdp_state_dict_type?"),
    ("config_dp_replicate", "config_dp_replica", "line 16:", "Did you mean parallelism_config_dp_replicate_size?"),
    (
        "parallelism_config_dp_replicate",
        "dp_replicate",
        "line 16:",
        "Write it as parallelism_config_dp_replicate_size.",
    ),
    ("use_cpu: false", "fsdp_version: 2", "line 9: fsdp_version: 2 does not belong here. Move it into fsdp_config."),
    ("  fsdp_state_dict_type: SHARDED_STATE_DICT", "  use_cpu: true", "line 13:", "to the top level, not indented."),
    ("use_cpu: false", "mics_shard_size: 2", "line 9:", "Write it as parallelism_config_dp_shard_size: 2, in parallel"),
    ("use_cpu: false", "param_dtype: bf16", "line 9:", "Write it as mixed_precision: bf16, at the top level."),
    ("use_cpu: false", "mics_hierarchical: false", "line 9:", "MICS_HIERARCHICAL=false in front of accelerate launch"),
    ("version: 2", "version: 2\n  fsdp_mics_node_size: 2", "line 12:", "environment variable", "MICS_NODE_SIZE=2"),
    ("version: 2", "version: 2\n  hierarchical: auto", "line 12:", "environment variable", "MICS_HIERARCHICAL=auto"),
    ("use_cpu: false", "mics_config:\n  shard_size: 2", "line 9: mics_config:", "MICS_HIERARCHICAL=false"),
    ("use_cpu: false", "num_processes: 8", "line 9: num_processes: 8 is there twice, in line 4 too."),
    ("num_processes: 8", "num_processes: 4000000000", "line 4: num_processes: 4000000000 is more than one launch"),
    ("num_processes: 8", f"num_processes: {10**30}", "line 4: num_processes: 1000", "num_processes: 8."),
    # not a launch file
    (GOOD, "", "mics.yaml holds no settings", "mics config"),
    (GOOD, "- 1\n- 2\n", "mics.yaml holds no settings", "mics config"),
    ("num_processes: 8", "num_processes 8", "line 5: machine_rank: 1 is not YAML here", "or the line above"),
    ("num_processes: 8", "num_processes: [8", "is not YAML here", "'num_processes: 8'"),
    ("num_processes: 8", "num_processes: !!python/name:os.system ''", "line 4", "is not YAML here"),
]


@pytest.mark.parametrize("case", WRONG, ids=range(len(WRONG)))
def test_each_mistake_is_named_with_its_line_and_what_would_work(file: Path, case: tuple[str, ...]) -> None:
    old, new, *expected = case
    assert old in GOOD
    message = problem(file, GOOD.replace(old, new))
    assert message.startswith("mics.yaml")
    for words in expected:
        assert words in message, message


def test_all_problems_are_listed_in_the_order_of_the_lines(file: Path) -> None:
    text = GOOD.replace("replicate_size: 2", "replicate_size: 3").replace("version: 2", "version: 1")
    text = text.replace("mixed_precision: bf16", "mixed_precision: no").replace("use_cpu", "use_cpus")
    lines = problem(file, text).splitlines()
    assert lines[0] == "mics.yaml has 4 problems:"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [f"mics.yaml, line {n}" for n in (8, 9, 11, 16)]


def test_a_missing_or_unreadable_file_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(MiCSConfigError, match=r"does not exist.*mics config"):
        check_launch_file(tmp_path / "none.yaml")
    with pytest.raises(MiCSConfigError, match=r"cannot be read.*mics\.yaml"):
        check_launch_file(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MiCSConfigError, match="not text"):
        check_launch_file(tmp_path / "binary.yaml")


def test_variables_that_contradict_the_file_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(GOOD)
    monkeypatch.setenv("MICS_SHARD_SIZE", "4")
    assert check_launch_file(file).shard_size == 4
    monkeypatch.setenv("MICS_SHARD_SIZE", "2")
    assert "line 15: MICS_SHARD_SIZE=2 contradicts the launch file's parallelism_config_dp_shard_size: 4" in problem(
        file, GOOD
    )
    monkeypatch.delenv("MICS_SHARD_SIZE")
    monkeypatch.setenv("MICS_SHARD_SIZ", "4")
    assert "MICS_SHARD_SIZ, which is no setting of MiCS. Did you mean MICS_SHARD_SIZE?" in problem(file, GOOD)
    monkeypatch.delenv("MICS_SHARD_SIZ")
    monkeypatch.setenv("MICS_NODE_SIZE", "3")
    assert "MICS_NODE_SIZE=3 does not divide the world of 8 ranks" in problem(file, GOOD)
    assert problem(file, GOOD).endswith("Values that work: 1, 2, 4, 8.")
    monkeypatch.setenv("MICS_NODE_SIZE", "2")
    assert check_launch_file(file).shard_size == 4


def test_without_accelerate_the_builtin_lists_of_keys_serve(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = launch_check._known_keys()
    for name in ("accelerate.commands.config.config_args", "accelerate.commands.launch"):
        monkeypatch.setitem(sys.modules, name, None)
    builtin = launch_check._known_keys()
    assert all(builtin[section] <= installed[section] for section in installed), "Accelerate has dropped keys"
    file.write_text(GOOD)
    assert check_launch_file(file).shard_size == 4
    assert "Did you mean use_cpu?" in problem(file, GOOD.replace("use_cpu", "use_cpus"))


def test_asking_accelerate_for_its_keys_leaves_logging_alone() -> None:
    code = "import logging; from lightning_mics.accelerate import launch_check; launch_check._known_keys(); "
    subprocess.run([sys.executable, "-c", code + "assert not logging.root.handlers"], check=True)


def test_launch_files_need_neither_accelerate_nor_lightning_nor_torch() -> None:
    code = (
        "import sys, lightning_mics.accelerate.launch_file, lightning_mics.accelerate.launch_check; "
        "loaded = {'accelerate', 'lightning', 'torch', 'transformers'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The command


def run(*words: str | Path) -> int:
    return main(["config", *map(str, words)])


def test_the_command_writes_the_file_and_shows_groups_and_commands(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--processes-per-machine", "4", "--num-machines", "2", "--main-process-ip", "node0", "--machine-rank", "1"]
    flags += ["--shard-size", "world", "--mixed-precision", "bf16", "--cpu", "--main-process-port", "1234"]
    flags += ["--activation-checkpointing", "--cpu-offload", "--full-checkpoint", "--no-reshard-after-forward"]
    flags += ["--wrap", "Block", "--hierarchical", "false", "--reduce-dtype", "bf16"]
    assert run("--output", file, *flags) == 0
    assert check_launch_file(file) == LaunchSettings(
        shard_size=8,
        num_processes=8,
        num_machines=2,
        machine_rank=1,
        main_process_ip="node0",
        main_process_port=1234,
        mixed_precision="bf16",
        cpu=True,
        reshard_after_forward=False,
        activation_checkpointing=True,
        cpu_offload=True,
        full_checkpoint=True,
        wrap="Block",
    )
    out = capsys.readouterr().out
    command = f"MICS_HIERARCHICAL=false MICS_REDUCE_DTYPE=bf16 accelerate launch --config_file {file} --machine_rank 0"
    assert "8 ranks = 2 node(s) x 4; 1 replica(s) x 8 shard(s)" in out
    assert f"Wrote {file}." in out
    assert f"  {command} train.py\n" in out
    assert f"  {command} -m lightning_mics.run any_script.py\n" in out
    assert "ACCELERATE_USE_CPU=true" in out
    assert "MICS_HIERARCHICAL=false MICS_REDUCE_DTYPE=bf16 accelerate" in file.read_text()


def test_the_command_takes_defaults_where_it_cannot_ask(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", file, "--num-processes", 4) == 0
    assert check_launch_file(file) == LaunchSettings(shard_size=4, num_processes=4)
    assert run("--output", file, "--num-processes", 4, "--node-size", 2, "--force") == 0
    assert check_launch_file(file).shard_size == 2, "a pretended node counts as a node"
    assert "2 node(s) x 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "--processes-per-machine or --num-processes"),
        (["--num-processes", "8", "--num-machines", "2"], "--main-process-ip"),
        (["--num-processes", "8", "--shard-size", "3"], "shard_size=3"),
        (["--num-processes", "8", "--shard-size", "rack"], "shard_size='rack'"),
        (["--num-processes", "8", "--shard-size", "-2"], "shard_size=-2"),
        (["--num-processes", "0"], "num_processes=0"),
        (["--num-processes", "8", "--num-machines", "0"], "num_machines=0"),
        (["--num-processes", "7", "--num-machines", "2"], "num_processes=6 or 8"),
        (["--num-processes", "8", "--node-size", "3"], "node_size=3"),
        (["--num-processes", "8", "--reduce-dtype", "int8"], "reduce_dtype='int8'"),
        (["--num-processes", "8", "--wrap", "a b"], "wrap='a b'"),
    ],
)
def test_the_command_refuses_flags_that_cannot_work(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert run("--output", file, *flags) == 2
    assert expected in capsys.readouterr().err
    assert not file.exists()


def test_the_command_keeps_an_existing_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("mine")
    assert run("--output", file, "--num-processes", 4) == 2
    assert "--force" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_the_command_checks_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(GOOD)
    assert run("--check", file) == 0
    out = capsys.readouterr().out
    assert "can start a run" in out
    assert "8 ranks = 2 node(s) x 4; 2 replica(s) x 4 shard(s)" in out
    assert f"accelerate launch --config_file {file} --machine_rank 0 train.py" in out

    file.write_text(GOOD.replace("replicate_size: 2", "replicate_size: 3"))
    assert run("--check", file) == 2
    assert f"{file}, line 16: parallelism_config_dp_replicate_size: 3" in capsys.readouterr().err
    assert run("--check", file, "--shard-size", 4, "--force") == 2
    assert "--force, --shard-size would do nothing" in capsys.readouterr().err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Answers the questions of the command; an empty answer takes the default, and no answer ends the input."""
    answers: list[str] = []

    def read(prompt: str = "") -> str:
        if not answers:
            raise EOFError
        return answers.pop(0)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    yield answers
    assert not answers


def test_in_a_terminal_the_command_asks(file: Path, terminal: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    terminal += ["0", "2", "four", "6", "10.0.0.1", "n", "4", "3", "bf16"]
    assert run("--output", file) == 0
    assert check_launch_file(file) == LaunchSettings(
        shard_size=3, num_processes=12, num_machines=2, main_process_ip="10.0.0.1", mixed_precision="bf16"
    )
    out = capsys.readouterr().out
    assert "Machines (1)" in out
    assert "Processes on each machine (4)" in out
    assert "[1/2/3/6/12] (6)" in out, "only sizes that work are on offer"
    assert "[no/bf16/fp16] (no)" in out


def test_in_a_terminal_empty_answers_take_the_defaults(file: Path, terminal: list[str]) -> None:
    terminal += [""] * 5
    assert run("--output", file) == 0
    assert check_launch_file(file) == LaunchSettings(shard_size=4, num_processes=4, cpu=True)


def test_in_a_terminal_only_what_is_not_given_is_asked(file: Path, terminal: list[str]) -> None:
    terminal += ["2"]
    flags = ["--num-machines", 1, "--num-processes", 4, "--no-cpu", "--mixed-precision", "no"]
    assert run("--output", file, *map(str, flags)) == 0
    assert check_launch_file(file) == LaunchSettings(shard_size=2, num_processes=4)
    assert run("--output", file, "--num-processes", 4, "--yes", "--force") == 0


def test_leaving_the_questions_writes_nothing(
    file: Path, terminal: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal += ["1"]
    assert run("--output", file) == 2
    assert "The input ended" in capsys.readouterr().err

    def interrupt(prompt: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert run("--output", file) == 130
    assert "nothing is written" in capsys.readouterr().err
    assert not file.exists()
