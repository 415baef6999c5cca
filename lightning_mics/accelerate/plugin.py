"""The plugin: MiCS settings from arguments, environment variables and the launch file, in this order of authority."""

from __future__ import annotations

import dataclasses
import itertools
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_mics.accelerate.launch_check import check_keys
from lightning_mics.accelerate.launch_settings import FIXED, LINES, REPLICATE, SHARD, check_variable, replicas_that_work
from lightning_mics.config import MiCSConfig, build_config, check_switch
from lightning_mics.errors import MiCSConfigError
from lightning_mics.familiar import takes_familiar_names
from lightning_mics.pretrained.huggingface import read_on_demand

_Plugin = typing.TypeVar("_Plugin")
_SWITCHES = (
    "reshard_after_forward",
    "cpu_offload",
    "activation_checkpointing",
    "activation_checkpointing_offload",
)

if TYPE_CHECKING:
    _Settings = MiCSConfig
else:
    # The settings of MiCSConfig, each None until it is given.
    _Settings = dataclasses.make_dataclass(
        "_Settings",
        [(name, kind | None, None) for name, kind in typing.get_type_hints(MiCSConfig).items()],
        kw_only=True,
        frozen=True,
    )


def _with_familiar_names(plugin: type[_Plugin]) -> type[_Plugin]:
    plugin.__init__ = takes_familiar_names(plugin.__init__)  # type: ignore[method-assign]
    return plugin


@_with_familiar_names
@dataclasses.dataclass(kw_only=True, frozen=True)
class MiCSPlugin(_Settings):
    """How :class:`MiCSAccelerator` shards, gathers and synchronises.

    It takes the settings of :class:`~lightning_mics.MiCSConfig`, and two of its own. What is not given comes from
    ``MICS_*`` environment variables (``MICS_SHARD_SIZE``, ``MICS_HIERARCHICAL`` ...), then from the file that
    ``accelerate launch --config_file`` was given, then from the defaults. An explicit argument always wins.

    Args:
        full_checkpoint: Whether ``save_state`` also writes the whole weights, for ``from_pretrained``.
        config: A whole :class:`~lightning_mics.MiCSConfig` instead of variables and file; arguments override it.

    After construction ``config`` holds the complete settings, and every field its value in them.

    Raises:
        MiCSConfigError: If a setting is wrong, or variables and launch file contradict each other.
    """

    full_checkpoint: bool | None = None
    config: MiCSConfig = None  # type: ignore[assignment]  # it is there after construction

    def __post_init__(self) -> None:
        names = MiCSConfig.setting_names()
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        own: MiCSConfig | None = self.__dict__["config"]
        if own is not None:
            config = build_config(own, given)
        else:
            launched = launched_settings(os.environ, own_shard_size="shard_size" in given)
            config = MiCSConfig.from_env(defaults=launched, **given)
        complete: dict[str, Any] = {name: getattr(config, name) for name in names}
        if self.full_checkpoint is None:
            complete["full_checkpoint"] = os.environ.get("FSDP_STATE_DICT_TYPE") == "FULL_STATE_DICT"
        else:
            check_switch("full_checkpoint", self.full_checkpoint)
        for name, value in {**complete, "config": config}.items():
            object.__setattr__(self, name, value)


def launched_settings(environ: Mapping[str, str], *, own_shard_size: bool = False) -> dict[str, Any]:
    """Returns the settings that ``accelerate launch`` carried from its file into the environment.

    Args:
        environ: The environment variables.
        own_shard_size: Whether the caller has a shard size of its own, so that the file's does not count.

    Raises:
        MiCSConfigError: If they cannot work; the message names the line of the file to change.
    """
    # Accelerate names its variables after the lines.
    carried = {name: key.upper() for name, (_, key) in LINES.items()}
    carried["wrap"] = "FSDP_TRANSFORMER_CLS_TO_WRAP"
    settings: dict[str, Any] = {
        name: environ[carried[name]].lower() == "true" for name in _SWITCHES if carried[name] in environ
    }
    if environ.get(carried["wrap"]):
        settings["wrap"] = environ[carried["wrap"]].replace(" ", "").split(",")
    shards = carried["shard_size"] in environ and not own_shard_size
    for (section, key), (works, why) in FIXED.items():
        value = environ.get(key.upper(), works)
        if value != works and (shards or section != "parallelism_config"):
            raise MiCSConfigError(
                f"The launch file has {key}: {value}, which {why}. Change the line to '{key}: {works}'."
            )
    if shards:
        settings["shard_size"] = _launched_shard_size(environ)
    return settings


def _launched_shard_size(environ: Mapping[str, str]) -> int:
    shard, replicas = int(environ[SHARD.upper()]), int(environ.get(REPLICATE.upper(), "1"))
    running = int(environ.get("WORLD_SIZE", "0")) or shard * replicas
    if shard * replicas != running:
        raise MiCSConfigError(
            f"The launch file has {SHARD}: {shard} and {REPLICATE}: {replicas}, which make {shard * replicas} "
            f"processes, but {running} are running: {replicas_that_work(shard, running)}. 'mics config --check FILE' "
            "checks a file before it is launched."
        )
    check_variable(shard, environ)
    return shard


def launched_world_size() -> int:
    """Returns the number of processes that torchrun, Accelerate or MPI started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 1)


def take_over_launch() -> None:
    """Makes a launch by ``accelerate launch`` or ``torchrun`` ours.

    The launch file asks Accelerate for FSDP to get one process a rank; from the flags in the environment, Accelerate
    would shard and transformers would load models (``from_pretrained``) their own way. And without a hint Accelerate
    runs the ranks of a machine without accelerators one by one, each on its own. All of them read the environment, so
    that is what changes here, before an ``Accelerator``, ``TrainingArguments`` or a pretrained model is made. From then
    on ``from_pretrained`` leaves weights unread until they are needed, unless the file says
    ``fsdp_cpu_ram_efficient_loading: false``.

    Raises:
        MiCSConfigError: If the launch file has lines that Accelerate has dropped.
    """
    file = _launch_file()
    if file is not None:
        check_keys(file)
    for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        os.environ.pop(flag, None)
    if launched_world_size() > 1:
        if not torch.accelerator.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
        read_on_demand(when=_shares_loading)


def _shares_loading() -> bool:
    """Returns whether this process is one of several and shall read only its part of pretrained weights."""
    wanted = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "true").lower() != "false"
    return wanted and launched_world_size() > 1


def _launch_file() -> Path | None:
    """Returns the file of the ``accelerate launch`` that started this process; it only stands in the command."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # started by something else
        return None
    import psutil

    try:
        launcher = psutil.Process(os.getppid())
        words, folder = launcher.cmdline(), Path(launcher.cwd())
    except psutil.Error:
        return None
    for option, value in itertools.pairwise([*words, ""]):
        name, _, attached = option.partition("=")
        if name in ("--config_file", "--config-file"):
            file = folder / (attached or value)
            return file if file.suffix in (".yaml", ".yml") and file.is_file() else None
    return None
