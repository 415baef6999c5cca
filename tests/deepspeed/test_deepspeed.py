"""Every field of a DeepSpeed configuration is accounted for, and its numbers mean the same here."""

from __future__ import annotations

import copy
import importlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_mics import MiCSConfig, MiCSConfigError
from lightning_mics.cli import main
from lightning_mics.cli.convert import accelerate_code, mics_yaml, optimizer_code, trainer_code
from lightning_mics.deepspeed import Conversion, convert_deepspeed

MICS: dict[str, Any] = {
    "train_batch_size": 512,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "dump_state": True,
    "prescale_gradients": False,
    "communication_data_type": "bf16",
    "data_types": {"grad_accum_dtype": "fp32"},
    "bf16": {"enabled": True, "check_grad_overflow": False},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
    "amp": {"enabled": False, "opt_level": "O1"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 0.0001, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.0003, "warmup_num_steps": 100, "total_num_steps": 1000},
    },
    "zero_optimization": {
        "stage": 3,
        "mics_shard_size": 16,
        "mics_hierarchical_params_gather": True,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": 1e5,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
        "sub_group_size": 1e9,
        "zero_quantized_weights": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.5},
        "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 5},
    },
    "activation_checkpointing": {
        "partition_activations": True,
        "cpu_checkpointing": False,
        "number_checkpoints": None,
        "profile": False,
    },
    "checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}},
    "aio": {"block_size": 1048576, "queue_depth": 8},
    "autotuning": {"enabled": False, "arg_mappings": {"train_micro_batch_size_per_gpu": "--batch"}},
    "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": None},
    "curriculum_learning": {"enabled": True, "schedule_config": {"total_curriculum_step": 40000, "difficulty_step": 8}},
    "data_efficiency": {"enabled": False, "data_sampling": {}},
    "elasticity": {"enabled": False, "micro_batch_sizes": [2, 4, 6]},
    "comms_logger": {"enabled": False},
    "tensorboard": {"enabled": True, "output_path": "logs/", "job_name": "run"},
    "sparse_attention": {"mode": "fixed", "block": 16},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}},
    "wandb": {},
    "my_own_section": {"key": [1, 2], "other": {"deep": {"deeper": None}}},
    "gradient_acumulation_steps": 2,
}

HUGGING_FACE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "mics_shard_size": 8,
        "stage3_prefetch_bucket_size": "auto",
        "reduce_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def report(conversion: Conversion) -> dict[str, tuple[str, str]]:
    """Each field's outcome and note; fails if one is there twice."""
    found: dict[str, tuple[str, str]] = {}
    for item in conversion.report:
        assert item.key not in found, item.key
        assert item.outcome in ("kept", "replaced", "dropped", "unknown") and item.note.strip(), item.key
        found[item.key] = (item.outcome, item.note)
    return found


def zero(**settings: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **settings}}


# Every field, once.


@pytest.mark.parametrize("tree", [MICS, HUGGING_FACE, {}], ids=["mics", "hugging_face", "empty"])
def test_every_leaf_is_in_the_report_once(tree: dict[str, Any]) -> None:
    before = copy.deepcopy(tree)
    assert list(report(convert_deepspeed(tree))) == list(leaves(tree))
    assert tree == before


@pytest.mark.parametrize("seed", range(30))
def test_every_leaf_is_in_the_report_once_whatever_is_left_out(seed: int) -> None:
    rng = random.Random(seed)

    def thin(tree: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in tree.items() if rng.random() < 0.6}
        return {key: thin(value) if isinstance(value, Mapping) else value for key, value in kept.items()}

    tree = thin(MICS)
    tree.setdefault("scheduler", {}).setdefault("params", {})["total_num_steps"] = 1000
    assert sorted(report(convert_deepspeed(tree))) == sorted(leaves(tree))


@pytest.mark.parametrize("optimizer", ["Adam", "OneBitAdam", "Lamb", "Muon", "SGD", "Nothing", "auto"])
@pytest.mark.parametrize("scheduler", ["WarmupLR", "OneCycle", "StepLR", "Nothing", "auto"])
def test_every_parameter_is_accounted_for_with_any_optimizer_and_scheduler(optimizer: str, scheduler: str) -> None:
    params = {"lr": 0.1, "max_grad_norm": 1, "freeze_step": 4, "bias_correction": False, "torch_adam": "auto"}
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "decay_lr_rate": 0.1, "step_size": 3, "warmup_num_steps": "auto"}
    tree = {"optimizer": {"type": optimizer, "params": params}, "scheduler": {"type": scheduler, "params": cycle}}
    assert sorted(report(convert_deepspeed(tree))) == sorted(leaves(tree))


def test_the_realistic_config() -> None:
    conversion = convert_deepspeed(MICS, world_size=16)
    assert conversion.config == MiCSConfig(shard_size=16, activation_checkpointing=True, cpu_offload=True)
    assert (conversion.gradient_accumulation_steps, conversion.micro_batch_size) == (4, 8)
    assert (conversion.global_batch_size, conversion.world_size, conversion.clip_norm) == (512, 16, 0.5)
    assert (conversion.precision, conversion.mixed_precision) == ("bf16-mixed", "bf16")
    found = report(conversion)
    assert found["zero_optimization.stage"][0] == "kept"
    assert found["zero_optimization.mics_shard_size"] == ("kept", "shard_size=16")
    assert found["bf16.enabled"][0] == "replaced"
    assert "wrap" in found["zero_optimization.allgather_bucket_size"][1]
    assert "'auto'" in found["zero_optimization.mics_hierarchical_params_gather"][1]
    assert found["zero_optimization.offload_param.device"][0] == "dropped"
    assert found["communication_data_type"][0] == "replaced" and found["data_types.grad_accum_dtype"][0] == "kept"
    for key in ("curriculum_learning.enabled", "flops_profiler.profile_step", "tensorboard.job_name"):
        assert found[key][0] == "dropped" and "Off" not in found[key][1]
    for key in ("wall_clock_breakdown", "elasticity.micro_batch_sizes", "autotuning.enabled"):
        assert found[key] == ("dropped", "Off in this file: nothing to do.")
    assert "'gradient_accumulation_steps'" in found["gradient_acumulation_steps"][1]


def test_from_deepspeed_is_the_config_alone(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(MICS))
    assert MiCSConfig.from_deepspeed(MICS) == convert_deepspeed(MICS).config
    assert MiCSConfig.from_deepspeed(path) == MiCSConfig.from_deepspeed(str(path)) == MiCSConfig.from_deepspeed(MICS)
    assert convert_deepspeed(path).source == "ds.json"


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("train_batchsize", 8, "'train_batch_size'"),
        ("zero_optimisation", {"stage": 3}, "'zero_optimization.stage'"),
        ("zero_optimization", {"mics_shard_sise": 8}, "'zero_optimization.mics_shard_size'"),
        ("zero_optimization", {"stage3_max_live_parameter": 8}, "'zero_optimization.stage3_max_live_parameters'"),
        ("fp16", {"loss_scal": 8}, "'fp16.loss_scale'"),
        ("mics_shard_size", 8, "'zero_optimization.mics_shard_size'"),
        ("qqqq", 8, "none is near"),
    ],
)
def test_an_unknown_key_gets_the_nearest_known_one(key: str, value: Any, nearest: str) -> None:
    (field,) = convert_deepspeed({key: value}).report
    assert field.outcome == "unknown" and nearest in field.note


def test_zero_is_a_value_and_not_off() -> None:
    found = report(convert_deepspeed(zero(stage3_param_persistence_threshold=0, round_robin_gradients=False)))
    assert "Every parameter is sharded" in found["zero_optimization.stage3_param_persistence_threshold"][1]
    assert "Off in this file" in found["zero_optimization.round_robin_gradients"][1]


# Sharding.


@pytest.mark.parametrize(
    ("settings", "shard_size", "words"),
    [
        ({"mics_shard_size": 8}, 8, {"mics_shard_size": "shard_size=8"}),
        ({"mics_shard_size": 8.0}, 8, {"mics_shard_size": "shard_size=8"}),
        ({"mics_shard_size": -1}, "world", {"mics_shard_size": "MiCS is off", "stage": "'world'"}),
        ({}, "world", {"stage": "'node'"}),
        ({"zero_hpz_partition_size": 8}, 8, {"zero_hpz_partition_size": "more memory for optimizer states"}),
        ({"zero_hpz_partition_size": 1}, "world", {"zero_hpz_partition_size": "Off"}),
        ({"zero_hpz_partition_size": 8, "mics_shard_size": 4}, 4, {"zero_hpz_partition_size": "Superseded"}),
        ({"stage": 2}, "node", {"stage": "Stage 2 keeps whole parameters"}),
        ({"stage": 0}, "node", {"stage": "shard_size=1 would replicate"}),
        ({"stage": 1, "mics_shard_size": 8}, 8, {"stage": "ignores mics_shard_size in stage 1"}),
        ({"mics_shard_size": "auto"}, "world", {"mics_shard_size": "'auto' is no number"}),
    ],
)
def test_shard_size(settings: dict[str, Any], shard_size: int | str, words: dict[str, str]) -> None:
    conversion = convert_deepspeed(zero(**settings))
    assert conversion.config.shard_size == shard_size
    found = report(conversion)
    for key, word in words.items():
        assert word in found[f"zero_optimization.{key}"][1]


@pytest.mark.parametrize("legacy", [True, False])
def test_the_old_switch_form_of_zero(legacy: bool) -> None:
    conversion = convert_deepspeed({"zero_optimization": legacy})
    assert conversion.config.shard_size == "node"
    assert f"Stage {int(legacy)}" in report(conversion)["zero_optimization"][1]


@pytest.mark.parametrize(
    ("wanted", "node_size", "hierarchical"),
    [(True, None, "auto"), (True, 8, True), (True, 16, "auto"), (False, None, False), ("auto", None, "auto")],
)
def test_hierarchical_is_true_only_where_a_partition_is_known_to_span_nodes(
    wanted: Any, node_size: int | None, hierarchical: Any
) -> None:
    tree = zero(mics_shard_size=16, mics_hierarchical_params_gather=wanted)
    assert convert_deepspeed(tree, world_size=32, node_size=node_size).config.hierarchical == hierarchical


@pytest.mark.parametrize(
    ("settings", "offloads"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, True),
        ({"offload_param": {"device": "cpu"}}, True),
        ({"cpu_offload": True}, True),
        ({"offload_optimizer": {"device": "nvme"}}, False),
        ({"offload_optimizer": {"device": "none"}, "cpu_offload": False}, False),
        ({"offload_optimizer": None, "offload_param": {}}, False),
    ],
)
def test_offload(settings: dict[str, Any], offloads: bool) -> None:
    tree = zero(**settings)
    conversion = convert_deepspeed(tree)
    assert conversion.config.cpu_offload is offloads
    assert sorted(report(conversion)) == sorted(leaves(tree))


def test_activation_checkpointing_is_on_if_something_in_the_section_is() -> None:
    off = {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": 0, "profile": True}}
    assert not convert_deepspeed(off).config.activation_checkpointing
    assert convert_deepspeed({"activation_checkpointing": {"number_checkpoints": 4}}).config.activation_checkpointing
    on_host = convert_deepspeed({"activation_checkpointing": {"cpu_checkpointing": True}})
    assert on_host.config == MiCSConfig(activation_checkpointing=True, activation_checkpointing_offload=True)
    assert "activation_checkpointing_offload=True" in report(on_host)["activation_checkpointing.cpu_checkpointing"][1]


# Batch sizes.


@pytest.mark.parametrize(
    ("total", "micro", "steps", "world", "expected"),
    [
        (512, 8, 4, 16, (512, 8, 4, 16)),
        (512, 8, 4, None, (512, 8, 4, 16)),
        (512, 8, None, 16, (512, 8, 4, 16)),
        (512, None, 4, 16, (512, 8, 4, 16)),
        (None, 8, 4, 16, (512, 8, 4, 16)),
        (None, 8, None, 16, (128, 8, 1, 16)),
        (128, None, None, 16, (128, 8, 1, 16)),
        (512, 8, None, None, (512, 8, None, None)),
        (None, 8, 4, None, (None, 8, 4, None)),
        (None, None, None, 16, (None, None, None, 16)),
        ("auto", 8, "auto", 16, (None, 8, None, 16)),
        (512.0, 8, 4, 16, (512, 8, 4, 16)),
    ],
)
def test_batch_arithmetic(total: Any, micro: Any, steps: Any, world: int | None, expected: tuple[int | None]) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    tree = {key: value for key, value in zip(keys, (total, micro, steps), strict=True) if value is not None}
    found = convert_deepspeed(tree, world_size=world)
    numbers = (
        found.global_batch_size,
        found.micro_batch_size,
        found.gradient_accumulation_steps,
        found.world_size,
    )
    assert numbers == expected


@pytest.mark.parametrize(
    ("total", "micro", "steps", "world", "words"),
    [
        (256, 8, 4, 16, ["train_batch_size=256", "=8 x", "=4 x world_size=16 = 512", "train_batch_size=512"]),
        (100, 8, 4, None, ["train_batch_size=100", "=8 x", "=4 = 32", "train_batch_size=128"]),
        (100, 8, None, 4, ["train_batch_size=100", "world_size=4 = 32", "Try train_batch_size=128"]),
        (100, None, None, 16, ["train_batch_size=100", "world_size=16 = 16", "Try train_batch_size=112"]),
    ],
)
def test_contradicting_batch_sizes_name_the_arithmetic(
    total: int, micro: int | None, steps: int | None, world: int | None, words: list[str]
) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    tree = {key: value for key, value in zip(keys, (total, micro, steps), strict=True) if value is not None}
    with pytest.raises(MiCSConfigError) as caught:
        convert_deepspeed(tree, world_size=world)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("value", "norm"), [(1, 1.0), (0.5, 0.5), (0, None), (0.0, None), ("auto", None)])
def test_clipping(value: Any, norm: float | None) -> None:
    assert convert_deepspeed({"gradient_clipping": value}).clip_norm == norm


def test_what_deepspeed_does_by_default_is_hinted_at() -> None:
    assert any("clip at 1.0" in hint for hint in convert_deepspeed({}).hints)
    assert not any("clip" in hint for hint in convert_deepspeed({"gradient_clipping": 0}).hints)
    assert any("float32" in hint for hint in convert_deepspeed({"bf16": {"enabled": True}}).hints)


# Precision.


@pytest.mark.parametrize(
    ("tree", "precision", "mixed_precision"),
    [
        ({}, None, None),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, None, None),
        ({"bf16": {"enabled": True}}, "bf16-mixed", "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16-mixed", "bf16"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16-true", "no"),
        ({"fp16": {"enabled": True}}, "16-mixed", "fp16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, None, None),
        ({"amp": {"enabled": True, "opt_level": "O2"}}, "16-mixed", "fp16"),
        ({"torch_autocast": {"enabled": True}}, "bf16-mixed", "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "16-mixed", "fp16"),
        ({"torch_autocast": {"enabled": False, "dtype": "float16"}}, None, None),
        ({"bf16": {"enabled": True}, "amp": {"enabled": True}}, "bf16-mixed", "bf16"),
    ],
)
def test_precision(tree: dict[str, Any], precision: str | None, mixed_precision: str | None) -> None:
    conversion = convert_deepspeed(tree)
    assert (conversion.precision, conversion.mixed_precision) == (precision, mixed_precision)
    assert sorted(report(conversion)) == sorted(leaves(tree))


def test_loss_scaling_is_what_pytorchs_scaler_takes() -> None:
    fp16 = {"enabled": True, "loss_scale": 128, "initial_scale_power": 8, "loss_scale_window": 500, "hysteresis": 2}
    found = report(convert_deepspeed({"fp16": fp16}))
    assert found["fp16.loss_scale"][0] == "replaced" and "init_scale=loss_scale" in found["fp16.loss_scale"][1]
    assert "init_scale=2**initial_scale_power" in found["fp16.initial_scale_power"][1]
    assert "growth_interval=loss_scale_window" in found["fp16.loss_scale_window"][1]
    assert found["fp16.hysteresis"][0] == "dropped" and "GradScaler" in found["fp16.hysteresis"][1]


@pytest.mark.parametrize(
    ("communication", "accumulation", "reduce_dtype"),
    [
        (None, None, torch.float32),
        ("bf16", None, torch.bfloat16),
        ("fp16", None, torch.float16),
        (None, "fp32", torch.float32),
        ("bf16", "fp32", torch.float32),
        ("bf16", "bf16", torch.bfloat16),
        ("auto", None, torch.float32),
    ],
)
def test_reduce_dtype_is_the_wider_of_two_settings(
    communication: str | None, accumulation: str | None, reduce_dtype: torch.dtype
) -> None:
    tree = {"communication_data_type": communication, "data_types": {"grad_accum_dtype": accumulation}}
    assert convert_deepspeed(tree).config.reduce_dtype == reduce_dtype


# Optimizers and schedulers.


@pytest.mark.parametrize(
    ("name", "params", "target", "arguments"),
    [
        ("Adam", {"lr": 0.1}, "AdamW", {"lr": 0.1, "weight_decay": 0.0}),
        ("adam", {"lr": 0.1, "adam_w_mode": False}, "Adam", {"lr": 0.1}),
        ("AdamW", {"torch_adam": True}, "AdamW", {}),
        ("AdamW", {"betas": [0.9, 0.95], "weight_decay": 0.1}, None, {"betas": (0.9, 0.95), "weight_decay": 0.1}),
        ("OneBitAdam", {"freeze_step": 4}, "AdamW", {"weight_decay": 0.0}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, "SGD", {"lr": 0.1, "momentum": 0.9}),
        ("Adagrad", {"lr": 0.1}, "Adagrad", {"lr": 0.1}),
    ],
)
def test_optimizer(name: str, params: dict[str, Any], target: str | None, arguments: dict[str, Any]) -> None:
    optimizer = convert_deepspeed({"optimizer": {"type": name, "params": params}}).optimizer
    assert optimizer is not None
    assert (optimizer.name, optimizer.arguments) == (target or "AdamW", arguments)


@pytest.mark.parametrize("name", ["Lamb", "Lion", "Muon", "MuAdam", "OneBitLamb", "Optimizr"])
def test_an_optimizer_that_torch_lacks_is_left_to_the_script(name: str) -> None:
    conversion = convert_deepspeed({"optimizer": {"type": name, "params": {"lr": 0.1}}})
    assert conversion.optimizer is None
    assert {outcome for outcome, _ in report(conversion).values()} == {"dropped"}


def scheduler_of(conversion: Conversion) -> torch.optim.lr_scheduler.LRScheduler:
    """Runs the line that the report has for the script."""
    assert conversion.optimizer is not None
    optimizer = getattr(torch.optim, conversion.optimizer.name)(nn.Linear(2, 2).parameters(), lr=0.5)
    optimizer.param_groups[0].update(conversion.optimizer.arguments)
    code = report(conversion)["scheduler.type"][1].split("`")[1]
    module = importlib.import_module(code.partition(".")[0])
    found: torch.optim.lr_scheduler.LRScheduler = eval(
        code, {"math": math, module.__name__: module, "optimizer": optimizer}
    )
    return found


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def log_warmup(step: int, steps: int) -> float:
    return math.log(step + 1) / math.log(steps) if step < steps else 1.0


# DeepSpeed's own formulas, by the number of steps its schedule has taken.
SCHEDULES: dict[str, tuple[str, dict[str, Any], Callable[[int], float]]] = {
    "log": ("WarmupLR", {"warmup_max_lr": 0.1, "warmup_num_steps": 10}, lambda s: 0.1 * log_warmup(s, 10)),
    "linear": (
        "WarmupLR",
        {"warmup_min_lr": 0, "warmup_max_lr": 0.1, "warmup_num_steps": 10, "warmup_type": "linear"},
        lambda s: 0.1 * min(1, s / 10),
    ),
    "decay_linear": (
        "WarmupDecayLR",
        {"warmup_max_lr": 0.1, "warmup_num_steps": 10, "total_num_steps": 25, "warmup_type": "linear"},
        lambda s: 0.1 * (s / 10 if s < 10 else max(0, (25 - s) / 15)),
    ),
    "decay_log": (
        "WarmupDecayLR",
        {"warmup_max_lr": 0.1, "warmup_num_steps": 10, "total_num_steps": 25},
        lambda s: 0.1 * (log_warmup(s, 10) if s < 10 else max(0, (25 - s) / 15)),
    ),
    "cosine_linear": (
        "WarmupCosineLR",
        {"warmup_num_steps": 10, "total_num_steps": 25, "warmup_type": "linear", "cos_min_ratio": 0.1},
        lambda s: 0.5 * (s / 10 if s < 10 else 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, (s - 10) / 15)))),
    ),
    "cosine_log": (
        "WarmupCosineLR",
        {"warmup_num_steps": 10, "total_num_steps": 25, "cos_min_ratio": 0.1},
        lambda s: 0.5 * (log_warmup(s, 10) if s < 10 else 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, (s - 10) / 15)))),
    ),
    "range": (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 5, "lr_range_test_step_rate": 2},
        lambda s: 0.01 * (1 + 2 * s / 5),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_give_the_rates_of_deepspeeds_formulas(name: str) -> None:
    if name in ("linear", "decay_linear", "cosine_linear"):
        pytest.importorskip("transformers")
    kind, params, formula = SCHEDULES[name]
    tree = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}, "scheduler": {"type": kind, "params": params}}
    conversion = convert_deepspeed(tree)
    steps = 25  # of transformers' schedules the cosine rises again after its end
    assert rates(scheduler_of(conversion), steps) == pytest.approx([formula(step) for step in range(steps)], abs=1e-6)
    assert sorted(report(conversion)) == sorted(leaves(tree))


def test_one_cycle_rises_and_falls_between_the_two_rates() -> None:
    params = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 10, "cycle_second_step_size": 20}
    tree = {"optimizer": {"type": "AdamW", "params": {}}, "scheduler": {"type": "OneCycle", "params": params}}
    found = rates(scheduler_of(convert_deepspeed(tree)), 30)
    assert (found[0], max(found), found[-1]) == pytest.approx((0.01, 0.1, 0.01))
    assert found.index(max(found)) == 9


def test_the_schedules_rate_wins_over_the_optimizers() -> None:
    conversion = convert_deepspeed(MICS)
    assert conversion.optimizer is not None and conversion.optimizer.arguments["lr"] == 0.0003
    name, note = report(conversion)["optimizer.params.lr"]
    assert name == "replaced" and "lr=0.0003" in note and "warmup_max_lr" in note


def test_torchs_own_schedulers_pass_through() -> None:
    tree = {"scheduler": {"type": "StepLR", "params": {"step_size": 3, "gamma": 0.5}}}
    outcome, note = report(convert_deepspeed(tree))["scheduler.type"]
    assert outcome == "kept" and "`torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)`" in note


def test_a_scheduler_that_nobody_has_gets_the_nearest() -> None:
    tree = {"scheduler": {"type": "WarmupLP", "params": {"warmup_num_steps": 3}}}
    found = report(convert_deepspeed(tree))
    assert [outcome for outcome, _ in found.values()] == ["dropped", "dropped"]
    assert "Did you mean 'WarmupLR'?" in found["scheduler.type"][1]


# "auto".


def test_auto_is_left_to_the_script() -> None:
    conversion = convert_deepspeed(HUGGING_FACE)
    found = report(conversion)
    for key in leaves(HUGGING_FACE):
        if key.startswith(("optimizer.params", "gradient", "train_")):
            assert found[key][0] == "replaced" and "Left to the script" in found[key][1]
    assert "learning_rate of TrainingArguments" in found["optimizer.params.lr"][1]
    assert "wrap" in found["zero_optimization.reduce_bucket_size"][1]
    assert conversion.gradient_accumulation_steps is conversion.clip_norm is conversion.precision is None
    assert "accumulate_grad_batches" not in trainer_code(conversion)
    assert any("'auto'" in hint for hint in conversion.hints)


def test_auto_becomes_a_name_to_set_in_the_lines() -> None:
    conversion = convert_deepspeed(HUGGING_FACE)
    assert conversion.optimizer is not None
    code = optimizer_code(conversion.optimizer)
    given = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    for name, value in given.items():
        assert code.count(f"\n{name} = ...") == 1
        code = code.replace(f"\n{name} = ...", f"\n{name} = {value}")
    names: dict[str, Any] = {"model": nn.Linear(2, 2)}
    exec(code, names)
    assert {name: names["optimizer"].defaults[name] for name in given} == given
    assert "num_warmup_steps=" not in (note := report(conversion)["scheduler.type"][1])
    assert "math.log(warmup_num_steps)" in note


# Errors.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON: .* in line 1, column 2"),
        ('{"a": 1,}', "trailing commas; remove them"),
        ("[1, 2]", "must hold an object like .* not a list"),
        ("3", "not a number"),
        ('"x"', "not a string"),
        ("null", "not null"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(MiCSConfigError, match=words):
        convert_deepspeed(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MiCSConfigError, match=r"There is no file .*nothing\.json"):
        MiCSConfig.from_deepspeed(tmp_path / "nothing.json")
    with pytest.raises(MiCSConfigError, match="cannot be read"):
        MiCSConfig.from_deepspeed(tmp_path)


@pytest.mark.parametrize(
    ("tree", "setting", "works"),
    [
        (zero(mics_shard_size="eight"), "mics_shard_size='eight'", "Try zero_optimization.mics_shard_size=8"),
        (zero(mics_shard_size=2.5), "mics_shard_size=2.5", "=8"),
        (zero(mics_shard_size=True), "mics_shard_size=True", "=8"),
        (zero(stage=4), "stage=4", "0, 1, 2, 3"),
        (zero(stage="auto"), "stage='auto'", "Try 3"),
        (zero(mics_hierarchical_params_gather="yes"), "mics_hierarchical_params_gather='yes'", "true, false"),
        (zero(offload_param={"device": "disk"}), "device='disk'", "'nvme'"),
        (zero(offload_param="cpu"), "offload_param='cpu'", "must be an object"),
        ({"optimizer": "AdamW"}, "optimizer='AdamW'", "must be an object"),
        ({"train_batch_size": 0}, "train_batch_size=0", "Try train_batch_size=8"),
        ({"gradient_clipping": -1}, "gradient_clipping=-1", "1.0"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping='1.0'", "1.0"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled='yes'", "'auto'"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled and fp16.enabled", "to false"),
        ({"communication_data_type": "int8"}, "communication_data_type='int8'", "'bfloat16'"),
    ],
)
def test_a_wrong_value_names_the_setting_and_what_works(tree: dict[str, Any], setting: str, works: str) -> None:
    with pytest.raises(MiCSConfigError) as caught:
        convert_deepspeed(tree)
    assert setting in str(caught.value) and works in str(caught.value)


def test_the_shard_size_is_checked_against_a_known_cluster() -> None:
    with pytest.raises(MiCSConfigError, match=r"shard_size=6 does not divide a world of 16 .* 1, 2, 4, 8, 16"):
        convert_deepspeed(zero(mics_shard_size=6), world_size=16)
    with pytest.raises(MiCSConfigError, match="straddle nodes"):
        convert_deepspeed(zero(mics_shard_size=6), world_size=24, node_size=4)
    with pytest.raises(MiCSConfigError, match="world_size=0"):
        convert_deepspeed(zero(), world_size=0)


# What is written.


@pytest.mark.parametrize(
    ("tree", "node_size"),
    [
        (MICS, 8),
        (MICS, None),
        (HUGGING_FACE, None),
        ({}, None),
        (zero(mics_shard_size=8, mics_hierarchical_params_gather=False), None),
        ({"communication_data_type": "bf16"}, None),
    ],
)
def test_the_yaml_gives_back_the_config(tmp_path: Path, tree: dict[str, Any], node_size: int | None) -> None:
    conversion = convert_deepspeed(tree, node_size=node_size)
    path = tmp_path / "mics.yaml"
    path.write_text(mics_yaml(conversion))
    assert MiCSConfig.from_yaml(path) == conversion.config


def test_the_yaml_holds_what_is_not_default_and_comments_for_the_script() -> None:
    text = mics_yaml(convert_deepspeed(MICS))
    assert yaml.safe_load(text) == {"shard_size": 16, "activation_checkpointing": True, "cpu_offload": True}
    for line in ("#   gradient accumulation: 4", "#   precision (Lightning): bf16-mixed", "lr=0.0003"):
        assert line in text
    assert yaml.safe_load(mics_yaml(convert_deepspeed({}))) == {"shard_size": "node"}


def test_the_trainer_lines_make_a_trainer() -> None:
    pytest.importorskip("lightning")
    from lightning_mics import MiCSStrategy

    conversion = convert_deepspeed(MICS, node_size=8)
    code = trainer_code(conversion)
    names: dict[str, Any] = {}
    code = code.replace("Trainer(\n", "Trainer(\n    accelerator='cpu', devices=2, num_nodes=8, logger=False,\n")
    exec(code, names)
    trainer = names["trainer"]
    assert isinstance(trainer.strategy, MiCSStrategy) and trainer.strategy.config == conversion.config
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (4, 0.5)
    assert trainer.precision == "bf16-mixed"
    assert 'precision="16-mixed"' in trainer_code(convert_deepspeed({"fp16": {"enabled": True}}))


def test_the_accelerate_lines_name_what_the_plugin_takes() -> None:
    code = accelerate_code(convert_deepspeed(MICS))
    compile(code, "lines", "exec")
    for part in (
        "MiCSPlugin(shard_size=16, activation_checkpointing=True, cpu_offload=True)",
        "gradient_accumulation_steps=4",
        'mixed_precision="bf16"',
        "accelerator.clip_grad_norm_(model.parameters(), 0.5)",
    ):
        assert part in code


# The command.


@pytest.fixture
def ds_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(MICS))
    return path


def test_the_command_writes_and_reports(ds_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-config", str(ds_config), "--world-size", "16"]) == 0
    assert MiCSConfig.from_yaml("mics.yaml") == MiCSConfig.from_deepspeed(MICS)
    out = capsys.readouterr().out
    for key in leaves(MICS):
        assert f"{key} = " in out
    for title in ("kept", "replaced", "dropped", "unknown", "Next: into the training script", "Wrote mics.yaml"):
        assert title in out
    code = trainer_code(convert_deepspeed(MICS))
    assert all(line in out for line in code.splitlines())


def test_the_report_fits_into_80_columns(ds_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-config", str(ds_config)]) == 0
    lines = capsys.readouterr().out.split("Next: into the training script")[0].splitlines()
    assert max(map(len, lines)) <= 80


def test_the_command_refuses_to_overwrite(ds_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mics.yaml").write_text("shard_size: 3\n")
    assert main(["convert-config", str(ds_config)]) == 2
    assert "mics.yaml exists" in (err := capsys.readouterr().err) and "--force" in err
    assert Path("mics.yaml").read_text() == "shard_size: 3\n"
    assert main(["convert-config", str(ds_config), "--force"]) == 0
    assert MiCSConfig.from_yaml("mics.yaml").shard_size == 16


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--world-size", "32"], "x world_size=32 = 1024"),
        (["--num-machines", "2"], "Add --world-size 16"),
        (["--world-size", "15", "--num-machines", "2"], "--world-size 14"),
        (["--output", "no/folder/mics.yaml"], "cannot be written"),
        (["--format", "accelerate"], "Add --world-size 16, which is what the batch sizes imply"),
    ],
)
def test_the_command_says_what_is_wrong(
    ds_config: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["convert-config", str(ds_config), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not Path("mics.yaml").exists()


def test_the_command_writes_for_lightning_cli(ds_config: Path) -> None:
    assert main(["convert-config", str(ds_config), "--format", "lightning"]) == 0
    trainer = yaml.safe_load(Path("mics.yaml").read_text())["trainer"]
    assert trainer["strategy"]["init_args"]["shard_size"] == 16
    assert (trainer["accumulate_grad_batches"], trainer["precision"]) == (4, "bf16-mixed")


def test_the_command_writes_for_accelerate(ds_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    tree = {
        **MICS,
        "communication_data_type": "bf16",
        "data_types": {},
        "zero_optimization": {"stage": 3, "mics_shard_size": 4, "mics_hierarchical_params_gather": False},
    }
    ds_config.write_text(json.dumps(tree))
    assert main(["convert-config", str(ds_config), "--format", "accelerate", "--world-size", "16"]) == 0
    written = yaml.safe_load(Path("mics.yaml").read_text())
    assert (written["num_processes"], written["mixed_precision"]) == (16, "bf16")
    assert written["parallelism_config"]["parallelism_config_dp_shard_size"] == 4
    out = capsys.readouterr().out
    assert "MICS_HIERARCHICAL=false" in out and "MICS_REDUCE_DTYPE=bfloat16" in out


def test_reading_needs_no_process_groups() -> None:
    code = (
        "import sys; from lightning_mics.deepspeed import convert_deepspeed; convert_deepspeed({}); "
        "print(sorted(n for n in ('deepspeed', 'lightning', 'accelerate', 'transformers') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
