"""Settings are checked once, by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from settings_tools import other_settings
from torch import nn

from lightning_mics import MiCSConfig, MiCSConfigError
from lightning_mics.errors import CheckpointError, MiCSError, SelfCheckError


def test_defaults_shard_over_a_node_and_reduce_in_float32() -> None:
    config = MiCSConfig()
    assert (config.shard_size, config.hierarchical, config.wrap) == ("node", "auto", "auto")
    assert (config.param_dtype, config.reduce_dtype, config.verify) == (None, torch.float32, True)


def test_a_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MiCSConfig().shard_size = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        MiCSConfig(2)  # type: ignore[misc]
    assert hash(MiCSConfig(shard_size=2)) == hash(MiCSConfig(shard_size=2))


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_have_several_spellings(spelling: object) -> None:
    assert MiCSConfig(param_dtype=spelling).param_dtype is torch.bfloat16  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "value", "works"),
    [
        ("shard_size", 0, "Try shard_size="),
        ("shard_size", -1, "Try shard_size="),
        ("shard_size", 2.0, "Try shard_size="),
        ("shard_size", True, "Try shard_size="),
        ("shard_size", None, "Try shard_size="),
        ("shard_size", "rack", "'node', 'world' or 'auto'"),
        ("node_size", 0, "Try node_size="),
        ("node_size", "8", "Try node_size="),
        ("hierarchical", "yes", "'auto', True, False"),
        ("hierarchical", 1, "'auto', True, False"),
        ("reshard_after_forward", None, "True or False"),
        ("activation_checkpointing", "yes", "'selective', a number such as 2"),
        ("activation_checkpointing", -1, "'selective', a number such as 2"),
        ("activation_checkpointing", 0, "'selective', a number such as 2"),
        ("activation_checkpointing", [], "a module class"),
        ("activation_checkpointing", {"Block": 1}, "a module class"),
        ("cpu_offload", 1, "True or False"),
        ("verify", "no", "True or False"),
        ("cast_forward_inputs", "all", "'units'"),
        ("param_dtype", "int8", "'bfloat16'"),
        ("param_dtype", torch.int64, "'bfloat16'"),
        ("reduce_dtype", "float", "'float32'"),
        ("output_dtype", 7, "'float32'"),
        ("wrap", 3, "a module class"),
        ("wrap", [], "a module class"),
        ("wrap", [nn.Linear, 3], "a module class"),
        ("wrap", int, "a module class"),
    ],
)
def test_a_wrong_value_names_the_setting_and_what_works(setting: str, value: object, works: str) -> None:
    with pytest.raises(MiCSConfigError) as caught:
        MiCSConfig(**{setting: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"{setting}={value!r}" in message
    assert works in message


@pytest.mark.parametrize("wrap", ["auto", "Block", nn.Linear, [nn.Linear, "Block"], ("Block",), lambda module: True])
def test_every_kind_of_wrap_is_taken(wrap: object) -> None:
    assert MiCSConfig(wrap=wrap).wrap is wrap  # type: ignore[arg-type]


def test_from_dict_suggests_the_nearest_name() -> None:
    assert MiCSConfig.from_dict({"shard_size": 4, "verify": False}) == MiCSConfig(shard_size=4, verify=False)
    with pytest.raises(MiCSConfigError, match=r"Unknown MiCS setting 'shardsize'\. Did you mean 'shard_size'"):
        MiCSConfig.from_dict({"shardsize": 4})
    with pytest.raises(MiCSConfigError, match="Known settings: shard_size, "):
        MiCSConfig.from_dict({"zzz": 4})


def test_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mics.yaml"
    path.write_text("shard_size: 4\nparam_dtype: bf16\nwrap: [Block]\n")
    assert MiCSConfig.from_yaml(path) == MiCSConfig(shard_size=4, param_dtype=torch.bfloat16, wrap=["Block"])
    path.write_text("")
    assert MiCSConfig.from_yaml(path) == MiCSConfig()
    path.write_text("- 4\n")
    with pytest.raises(MiCSConfigError, match="'shard_size: 8', not a list"):
        MiCSConfig.from_yaml(path)


def test_from_env_loses_to_explicit_arguments() -> None:
    environ = {"MICS_SHARD_SIZE": "4", "MICS_HIERARCHICAL": "false", "MICS_PARAM_DTYPE": "bf16", "OTHER": "1"}
    found = MiCSConfig.from_env(environ)
    assert found == MiCSConfig(shard_size=4, hierarchical=False, param_dtype="bfloat16")
    assert MiCSConfig.from_env(environ, shard_size=2).shard_size == 2
    with pytest.raises(MiCSConfigError, match="shard_size=0"):
        MiCSConfig.from_env({"MICS_SHARD_SIZE": "0"})


@pytest.mark.parametrize(("name", "value", "expected"), other_settings(), ids=[name for name, _, _ in other_settings()])
def test_every_setting_comes_from_dicts_files_and_variables(
    tmp_path: Path, name: str, value: Any, expected: MiCSConfig
) -> None:
    assert name in MiCSConfig.setting_names()
    assert MiCSConfig.from_dict({name: value}) == MiCSConfig().replace(**{name: value}) == expected
    (tmp_path / "mics.yaml").write_text(f"{name}: {json.dumps(value)}\n")
    assert MiCSConfig.from_yaml(tmp_path / "mics.yaml") == expected
    variables = {f"MICS_{name.upper()}": value if isinstance(value, str) else json.dumps(value)}
    assert MiCSConfig.from_env(variables) == expected
    assert MiCSConfig.from_env({}, defaults={name: value}) == MiCSConfig.from_env({}, **{name: value}) == expected


UNREADABLE = {
    "shard_size: 8\nverify: true\nshard_size: 4\n": "'shard_size' is there twice, in lines 1 and 3. Remove one",
    "wrap: [{a: 1, a: 2}]\n": "'a' is there twice, in line 1",
    "shard_size: 8\nwrap: [Block\n": "is not YAML here .* to the form 'shard_size: 8'",
    "shard_size: 2020-13-45\n": "this is not YAML .* should look like 'shard_size: 8'",
}


@pytest.mark.parametrize(("text", "told"), UNREADABLE.items())
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "mics.yaml").write_text(text)
    with pytest.raises(MiCSConfigError, match=rf"mics\.yaml.*{told}"):
        MiCSConfig.from_yaml(tmp_path / "mics.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MiCSConfigError, match=r"none\.yaml cannot be read \(No such file"):
        MiCSConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["MICS_SHARD_SIZ", "mics_shard_size", "MICS_HIERARCHIC", "MICS_VERIFY_EVRY"])
def test_a_mistyped_variable_is_an_error(name: str) -> None:
    with pytest.raises(MiCSConfigError, match=rf"{name}, which is no setting.*Did you mean MICS_"):
        MiCSConfig.from_env({name: "8"})


def test_a_variable_of_another_kind_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="MICS_HOME is no setting of MiCS"):
        assert MiCSConfig.from_env({"MICS_HOME": "/home"}) == MiCSConfig()


@pytest.mark.parametrize("value", ["[Block", "{a: 1"])
def test_a_variable_that_is_not_yaml_is_named(value: str) -> None:
    with pytest.raises(MiCSConfigError, match=r"MICS_WRAP='.*': this is not YAML"):
        MiCSConfig.from_env({"MICS_WRAP": value})


@pytest.mark.parametrize("setting", ["param_dtype", "reduce_dtype", "output_dtype"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, "float8_e4m3fn", torch.complex64])
def test_a_dtype_that_nothing_can_be_summed_in_is_refused(setting: str, dtype: Any) -> None:
    with pytest.raises(MiCSConfigError, match=rf"{setting}=.*Values that work: None, 'float32'"):
        MiCSConfig(**{setting: dtype})


def test_gradients_between_replicas_take_16_bits_or_those_of_the_reduction() -> None:
    with pytest.raises(
        MiCSConfigError, match=r"replication_reduce_dtype=torch\.float32 has more than 16 bits.*'bfloat16'"
    ):
        MiCSConfig(replication_reduce_dtype="float32")


def test_replace_checks_anew() -> None:
    assert MiCSConfig().replace(shard_size=2).shard_size == 2
    with pytest.raises(MiCSConfigError, match="shard_size=0"):
        MiCSConfig().replace(shard_size=0)


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(MiCSConfigError, MiCSError) and issubclass(MiCSConfigError, ValueError)
    assert issubclass(CheckpointError, MiCSError) and issubclass(CheckpointError, ValueError)
    assert issubclass(SelfCheckError, MiCSError) and issubclass(SelfCheckError, RuntimeError)
