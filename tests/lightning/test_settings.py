"""Every setting reaches both strategies, from Python and from the files of LightningCLI."""

from __future__ import annotations

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from settings_tools import OTHER_VALUES, other_settings

from lightning_mics import MiCSConfig, MiCSStrategy
from lightning_mics.config import Settings
from lightning_mics.errors import MiCSConfigError
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.lightning import common

both = pytest.mark.parametrize("strategy", [MiCSStrategy, FabricStrategy], ids=["trainer", "fabric"])
every_setting = pytest.mark.parametrize(
    ("name", "value", "expected"), other_settings(), ids=[name for name, _, _ in other_settings()]
)


@both
@every_setting
def test_a_strategy_takes_every_setting(strategy: Any, name: str, value: Any, expected: MiCSConfig) -> None:
    assert strategy(**{name: value}).config == expected
    assert strategy(config=MiCSConfig(verify=False), **{name: value}).config == expected.replace(verify=False)
    assert strategy(config=expected).config == strategy(config=expected, **{name: None}).config == expected


@both
def test_positions_keep_their_meaning(strategy: Any) -> None:
    assert strategy(8).config == MiCSConfig(shard_size=8)
    later = {
        "cast_forward_inputs": True,
        "ignore": (),
        "verify_every": None,
        "on_mismatch": "raise",
        "async_checkpoint": False,
        "optimizer_shard_size": "partition",
        "replication_reduce_dtype": None,
        "replication_gather_dtype": None,
        "master_weights": "partition",
        "activation_checkpointing_offload": False,
        "uneven_inputs": "error",
    }
    late = ("memory_limit", "output_dtype", *later)
    positions = [name for name in OTHER_VALUES if name not in late]
    values = [OTHER_VALUES[name] for name in positions]
    made = strategy(*values, MiCSConfig(output_dtype="float16"), False, "gloo", timedelta(seconds=5), "36GiB")
    assert made.config == MiCSConfig(**{**OTHER_VALUES, **later})
    assert made.process_group_backend == "gloo"
    with pytest.raises(TypeError, match="multiple values for argument 'shard_size'"):
        strategy(8, shard_size=8)


@both
def test_a_wrong_name_suggests_the_nearest(strategy: Any) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'shardsize'\. Did you mean 'shard_size'\?"):
        strategy(shardsize=8)
    with pytest.raises(TypeError, match=r"Did you mean 'timeout'\?"):
        strategy(time_out=8)


WRONG = [
    ({"storage_options": "key"}, "storage_options= must be a mapping, not str"),
    ({"save_distributed_checkpoint": "no"}, "save_distributed_checkpoint='no' is not a switch"),
    ({"timeout": 30}, r"timeout=30 is not a length of time\. Try timeout=timedelta\(seconds=30\)"),
    ({"timeout": timedelta(0)}, r"Try timeout=timedelta\(seconds=1800\)"),
    ({"process_group_backend": 8}, "process_group_backend=8 is not the name of a backend"),
]


@both
@pytest.mark.parametrize(("arguments", "told"), WRONG)
def test_a_wrong_argument_is_refused_where_it_is_given(strategy: Any, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(MiCSConfigError, match=told):
        strategy(**arguments)


@both
def test_tools_see_every_setting_with_type_and_description(strategy: Any) -> None:
    arguments = inspect.signature(strategy).parameters
    own = {"config", "save_distributed_checkpoint", "process_group_backend", "timeout", "storage_options"}
    assert arguments.keys() == OTHER_VALUES.keys() | own
    assert all(arguments[name].default is None for name in OTHER_VALUES)
    assert arguments["save_distributed_checkpoint"].default is True
    hints = get_type_hints(strategy.__init__)
    assert all(hints[name] == arguments[name].annotation for name in arguments)
    assert "Ranks in a partition group" in strategy.__init__.__doc__


def test_what_type_checkers_see_are_the_settings() -> None:
    fields = get_type_hints(MiCSConfig)
    assert get_type_hints(Settings) == {name: fields[name] | None for name in MiCSConfig.setting_names()}


def make_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], *options: str) -> Any:
    """Returns the Trainer that LightningCLI makes of a file, and of options behind it."""
    file, strategy = folder / "trainer.yaml", {"class_path": "lightning_mics.MiCSStrategy", "init_args": settings}
    file.write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", "devices": 4, "strategy": strategy}}))
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(file), "--trainer.logger", "false", *options])
    return LightningCLI(BoringModel, run=False, save_config_callback=None, seed_everything_default=False).trainer


@every_setting
def test_lightning_cli_takes_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, expected: MiCSConfig
) -> None:
    assert make_trainer(tmp_path, monkeypatch, {name: value}).strategy.config == expected


def test_lightning_cli_checks_types_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--trainer.strategy.init_args.verify=false"
    assert make_trainer(tmp_path, monkeypatch, {"shard_size": 2}, option).strategy.config.verify is False
    for settings, words in (({"node_size": "many"}, "many"), ({"shardsize": 2}, "shardsize")):
        with pytest.raises(SystemExit):
            make_trainer(tmp_path, monkeypatch, settings)
        assert words in capsys.readouterr().err


def test_lightning_cli_explains_settings() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(MiCSStrategy, "strategy")
    text = " ".join(parser.format_help().split())
    assert "--strategy.shard_size SHARD_SIZE Ranks in a partition group" in text


@pytest.mark.parametrize(
    ("asked", "offload", "made"),
    [(None, False, "nccl"), (None, True, "cpu:gloo,cuda:nccl"), ("cuda:nccl,cpu:gloo", True, "cuda:nccl,cpu:gloo")],
)
def test_the_process_group_has_the_backends_that_offload_needs(asked: str | None, offload: bool, made: str) -> None:
    with (
        mock.patch.object(common, "_init_dist_connection") as init,
        mock.patch.object(common, "check_backends") as check,
    ):
        cuda, config, wait = torch.device("cuda", 1), MiCSConfig(cpu_offload=offload), timedelta(seconds=9)
        assert common.init_process_group(mock.Mock(), cuda, asked, wait, config) == made
    assert init.call_args.args[1] == made
    assert init.call_args.kwargs == {"timeout": wait, "device_id": cuda}
    check.assert_called_once_with(config, "cuda")
