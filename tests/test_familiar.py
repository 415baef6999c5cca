"""Arguments by the names of Lightning's and Accelerate's FSDP: each means something here, or is refused in words."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from lightning.fabric import strategies as fabric
from lightning.pytorch import strategies as pytorch
from models import Block, Regressor
from torch import nn
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

from lightning_mics import MiCSConfig, MiCSConfigError, MiCSStrategy
from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.core.units import plan_units, unit_names
from lightning_mics.fabric import MiCSStrategy as FabricStrategy

ways = pytest.mark.parametrize("way", [MiCSStrategy, FabricStrategy, MiCSPlugin])
bf16, fp32 = torch.bfloat16, torch.float32
MEANS: list[tuple[str, Any, dict[str, Any]]] = [
    ("sharding_strategy", "FULL_SHARD", {"shard_size": "world"}),
    ("sharding_strategy", ShardingStrategy.SHARD_GRAD_OP, {"shard_size": "world", "reshard_after_forward": False}),
    ("sharding_strategy", 3, {"shard_size": 1}),
    ("sharding_strategy", "HYBRID_SHARD", {"shard_size": "node"}),
    ("sharding_strategy", ShardingStrategy._HYBRID_SHARD_ZERO2, {"shard_size": "node", "reshard_after_forward": False}),
    ("reshard_after_forward", "SHARD_GRAD_OP", {"reshard_after_forward": False}),
    ("reshard_after_forward", ShardingStrategy.FULL_SHARD, {"reshard_after_forward": True}),
    ("data_parallel_size", 8, {"shard_size": 8}),
    ("device_mesh", (4, 2), {"shard_size": 2}),
    ("auto_wrap_policy", {Block, nn.Linear}, {"wrap": (Block, nn.Linear)}),
    ("auto_wrap_policy", "transformer_based_wrap", {}),
    ("transformer_cls_names_to_wrap", ["Block"], {"wrap": ("Block",)}),
    ("cpu_offload", CPUOffload(offload_params=True), {"cpu_offload": True}),
    ("cpu_offload", CPUOffload(offload_params=False), {"cpu_offload": False}),
    ("cpu_offload", CPUOffloadPolicy(), {"cpu_offload": True}),
    ("mixed_precision", MixedPrecision(param_dtype=bf16), {"param_dtype": bf16, "reduce_dtype": bf16}),
    (
        "mixed_precision",
        MixedPrecision(bf16, fp32, cast_root_forward_inputs=False),
        {"param_dtype": bf16, "cast_forward_inputs": False},
    ),
    (
        "mixed_precision_policy",
        MixedPrecisionPolicy(bf16, output_dtype=fp32),
        {"param_dtype": bf16, "output_dtype": fp32},
    ),
    ("ignored_modules", "head", {"ignore": "head"}),
    ("use_orig_params", True, {}),
    ("sync_module_states", True, {}),
    ("limit_all_gathers", True, {}),
    ("forward_prefetch", False, {}),
    ("backward_prefetch", BackwardPrefetch.BACKWARD_PRE, {}),
    ("backward_prefetch", "backward_pre", {}),
    ("fsdp_version", 2, {}),
    ("tensor_parallel_size", 1, {}),
    ("cpu_ram_efficient_loading", False, {}),
    ("cpu_ram_efficient_loading", True, {}),
    ("min_num_params", 0, {}),
    ("activation_checkpointing_policy", {Block}, {"activation_checkpointing": {Block}}),
    ("stage", 3, {"shard_size": "world"}),
    ("stage", 2, {"shard_size": "world", "reshard_after_forward": False}),
    ("stage", 1, {"shard_size": 1, "optimizer_shard_size": "world"}),
    ("stage", 0, {"shard_size": 1}),
    ("mics_shard_size", 8, {"shard_size": 8}),
    ("mics_shard_size", -1, {"shard_size": "world"}),
    ("mics_hierarchical_params_gather", False, {"hierarchical": False}),
    ("offload_optimizer", True, {"cpu_offload": True}),
    ("offload_parameters", False, {}),
    ("offload_params_device", "cpu", {}),
    ("overlap_comm", True, {}),
    ("load_full_weights", True, {}),
    ("logging_batch_size_per_gpu", "auto", {}),
]
REFUSED: list[tuple[str, Any, str]] = [
    ("sharding_strategy", "HALF_SHARD", "Known are FULL_SHARD"),
    ("data_parallel_size", "auto", "Use shard_size="),
    ("tensor_parallel_size", 2, "tensor_parallel_size=1"),
    ("device_mesh", (2, 2, 2), "Use shard_size="),
    ("auto_wrap_policy", "size_based_wrap", "Use wrap="),
    ("auto_wrap_policy", functools.partial(size_based_auto_wrap_policy, min_num_params=5), "Use wrap="),
    ("auto_wrap_policy", CustomPolicy(lambda module: False), "Use wrap="),
    ("min_num_params", 100_000, "Use wrap="),
    ("state_dict_type", "LOCAL_STATE_DICT", "Use 'full' or 'sharded'"),
    ("mixed_precision", "bf16", "Use param_dtype="),
    ("mixed_precision", MixedPrecision(buffer_dtype=bf16), "Use param_dtype="),
    ("use_orig_params", False, "own names and shapes"),
    ("sync_module_states", False, "rank 0's values"),
    ("backward_prefetch", BackwardPrefetch.BACKWARD_POST, "by itself"),
    ("fsdp_version", 1, "FSDP2"),
    ("state_dict_config", FullStateDictConfig(), "rank 0"),
    ("param_init_fn", print, "reset_parameters"),
    ("process_group", object(), "shard_size="),
    ("device_id", 0, "devices="),
    ("accelerator", "cpu", "Trainer or to Fabric"),
    ("stage", 4, "Known are 0 to 3"),
    ("stage", True, "Known are 0 to 3"),
    ("offload_optimizer_device", "nvme", "Use cpu_offload=True"),
    ("nvme_path", "/local_nvme", "Use cpu_offload=True"),
    ("allgather_bucket_size", 200_000_000, "Choose them by wrap="),
    ("initial_scale_power", 16, "precision='16-mixed'"),
    ("exclude_frozen_parameters", True, "all parameters"),
    ("remote_device", "cpu", "meta device"),
]


@ways
@pytest.mark.parametrize(("name", "value", "means"), MEANS)
def test_a_familiar_argument_says_what_it_became(
    way: Any, name: str, value: Any, means: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning_mics")
    assert way(**{name: value}).config == MiCSConfig(**means)
    (line,) = caplog.messages
    assert line.startswith(f"{name}=") and ("became" if means else "is what MiCS does anyway") in line


@ways
@pytest.mark.parametrize(("name", "value", "told"), REFUSED)
def test_a_familiar_argument_that_means_nothing_is_refused(way: Any, name: str, value: Any, told: str) -> None:
    with pytest.raises(MiCSConfigError, match=f"{name}=.* means nothing to MiCS") as refused:
        way(**{name: value})
    assert told in str(refused.value)


@pytest.mark.parametrize("word", ["full", "FULL_STATE_DICT", StateDictType.FULL_STATE_DICT])
def test_the_kind_of_checkpoint_goes_by_its_familiar_name(word: Any) -> None:
    assert MiCSPlugin(state_dict_type=word).full_checkpoint is True
    with pytest.raises(MiCSConfigError, match="means full_checkpoint=True, but full_checkpoint=False is given too"):
        MiCSPlugin(state_dict_type=word, full_checkpoint=False)
    for strategy in (MiCSStrategy, FabricStrategy):
        assert strategy(state_dict_type=word)._save_distributed_checkpoint is False
        assert strategy(state_dict_type="sharded")._save_distributed_checkpoint is True


@ways
def test_arguments_that_contradict_each_other_are_refused(way: Any) -> None:
    assert way(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 4)).config == MiCSConfig(shard_size=4)
    assert way(sharding_strategy="HYBRID_SHARD", shard_size=2).config == MiCSConfig(shard_size=2)
    assert way(stage=3, mics_shard_size=2).config == MiCSConfig(shard_size=2)
    assert way(stage=2, shard_size=2).config == MiCSConfig(shard_size=2, reshard_after_forward=False)
    assert way(offload_optimizer=True, offload_parameters=False).config == MiCSConfig(cpu_offload=True)
    with pytest.raises(MiCSConfigError, match="means shard_size=1, but shard_size=2 is given too"):
        way(stage=1, shard_size=2)
    with pytest.raises(MiCSConfigError, match="means shard_size='world', but shard_size=2 is given too"):
        way(sharding_strategy="FULL_SHARD", shard_size=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sharding_strateg'"):
        way(sharding_strateg="FULL_SHARD")


POLICIES: dict[str, Any] = {
    "classes": ModuleWrapPolicy({Block}),
    "transformer": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block}),
    "own": lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, Block),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_wrap_policies_choose_the_units_that_they_chose(policy: Callable[..., bool]) -> None:
    model = Regressor(2)
    expected = unit_names(model, plan_units(model, Block))
    assert unit_names(model, plan_units(model, MiCSStrategy(auto_wrap_policy=policy).config.wrap)) == expected


@pytest.mark.parametrize(
    "wrap", [{"Block", "Linear"}, frozenset({"Block", "Linear"}), {"Block": 1, "Linear": 2}.keys()]
)
def test_every_collection_is_a_choice_of_units(wrap: Any) -> None:
    assert MiCSConfig(wrap=wrap).wrap == ("Block", "Linear")
    assert MiCSConfig(wrap={nn.Linear, Block}) == MiCSConfig(wrap=(Block, nn.Linear))


THEIRS: dict[str, Callable[..., Any]] = {
    "Trainer FSDPStrategy": pytorch.FSDPStrategy,
    "Trainer ModelParallelStrategy": pytorch.ModelParallelStrategy,
    "Fabric FSDPStrategy": fabric.FSDPStrategy,
    "Fabric ModelParallelStrategy": fabric.ModelParallelStrategy,
    "Accelerate's plugin": FullyShardedDataParallelPlugin,
    "FullyShardedDataParallel": FullyShardedDataParallel,
    "fully_shard": fully_shard,
    "DeepSpeedStrategy": pytorch.DeepSpeedStrategy,
}


@ways
@pytest.mark.parametrize("theirs", THEIRS.values(), ids=THEIRS.keys())
def test_no_name_of_theirs_is_unknown_here(way: Any, theirs: Callable[..., Any]) -> None:
    for name, parameter in inspect.signature(theirs).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        try:
            way(**{name: object()})
        except (MiCSConfigError, TypeError) as refused:
            assert f"{name}=" in str(refused), (name, refused)
        else:
            raise AssertionError(f"{name} is ignored")
