"""The plugin: MiCS settings from arguments, environment variables and the launch file, in this order of authority."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lightning_mics.accelerate.launch_check import check_keys
from lightning_mics.config import MiCSConfig, Wrap
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ShardSize

_SHARD, _REPLICATE = "PARALLELISM_CONFIG_DP_SHARD_SIZE", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE"
_OTHER_PARALLELISM = ("tp", "cp", "sp")
_SWITCHES = {
    "FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward",
    "FSDP_OFFLOAD_PARAMS": "cpu_offload",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
}


@dataclass(kw_only=True)
class MiCSPlugin:
    """How :class:`MiCSAccelerator` shards, gathers and synchronises.

    The fields are those of :class:`~lightning_mics.MiCSConfig`. What is not given comes from ``MICS_*`` environment
    variables (``MICS_SHARD_SIZE``, ``MICS_HIERARCHICAL`` ...), then from the file that ``accelerate launch
    --config_file`` was given, then from the defaults. An explicit argument always wins.

    Args:
        shard_size: Ranks in a partition group: a number, ``"node"``, ``"world"``, or ``"auto"`` for the smallest one
            that is predicted to fit into memory.
        node_size: Ranks on a node; by default what the launcher says.
        hierarchical: Whether collectives of a partition that spans nodes run in two stages.
        wrap: What becomes an FSDP unit.
        reshard_after_forward: Whether units, except the root, are freed between forward and backward.
        param_dtype: Gather dtype; overrides what ``mixed_precision`` asks for.
        reduce_dtype: Dtype of gradient reduction.
        output_dtype: Dtype to which the root's outputs are cast.
        cast_forward_inputs: Whether floating-point inputs of units are cast to ``param_dtype``.
        activation_checkpointing: Whether units recompute their activations in the backward pass.
        cpu_offload: Whether shards, gradients and optimizer states live in host memory.
        verify: Whether the first accumulation window is checked.
        memory_limit: What ``shard_size="auto"`` may use on a rank, for example ``"36GiB"``.
        full_checkpoint: Whether ``save_state`` also writes the whole weights, for ``from_pretrained``.
        config: A whole :class:`~lightning_mics.MiCSConfig` instead of variables and file; arguments override it.

    After construction ``config`` holds the complete settings, and every field its value in them.

    Raises:
        MiCSConfigError: If a setting is wrong, or variables and launch file contradict each other.
    """

    shard_size: ShardSize | None = None
    node_size: int | None = None
    hierarchical: bool | Literal["auto"] | None = None
    wrap: Wrap | None = None
    reshard_after_forward: bool | None = None
    param_dtype: torch.dtype | str | None = None
    reduce_dtype: torch.dtype | str | None = None
    output_dtype: torch.dtype | str | None = None
    cast_forward_inputs: bool | Literal["units"] | None = None
    activation_checkpointing: bool | None = None
    cpu_offload: bool | None = None
    verify: bool | None = None
    memory_limit: int | str | None = None
    full_checkpoint: bool | None = None
    config: MiCSConfig | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in fields(MiCSConfig)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.config is None:
            launched = launched_settings(os.environ, own_shard_size="shard_size" in given)
            self.config = MiCSConfig.from_env(defaults=launched, **given)
        else:
            self.config = self.config.replace(**given)
        for name in names:
            setattr(self, name, getattr(self.config, name))
        if self.full_checkpoint is None:
            self.full_checkpoint = os.environ.get("FSDP_STATE_DICT_TYPE", "") == "FULL_STATE_DICT"


def launched_settings(environ: Mapping[str, str], *, own_shard_size: bool = False) -> dict[str, Any]:
    """Returns the settings that ``accelerate launch`` carried from its file into the environment.

    Args:
        environ: The environment variables.
        own_shard_size: Whether the caller has a shard size of its own, so that the file's does not count.

    Raises:
        MiCSConfigError: If they cannot work; the message names the line of the file to change.
    """
    if environ.get("FSDP_VERSION", "2") != "2":
        raise MiCSConfigError(
            f"The launch file has fsdp_version: {environ['FSDP_VERSION']}, and MiCS is built on version 2. Change the "
            "line to 'fsdp_version: 2'."
        )
    settings: dict[str, Any] = {
        setting: environ[name].lower() == "true" for name, setting in _SWITCHES.items() if name in environ
    }
    if environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        settings["wrap"] = environ["FSDP_TRANSFORMER_CLS_TO_WRAP"].replace(" ", "").split(",")
    if _SHARD in environ and not own_shard_size:
        settings["shard_size"] = _launched_shard_size(environ)
    return settings


def _launched_shard_size(environ: Mapping[str, str]) -> int:
    shard, replicate = int(environ[_SHARD]), int(environ.get(_REPLICATE, "1"))
    for kind in _OTHER_PARALLELISM:
        size = environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1")
        if size != "1":
            raise MiCSConfigError(
                f"The launch file has parallelism_config_{kind}_size: {size}, which MiCS does not combine with. Change "
                f"the line to 'parallelism_config_{kind}_size: 1'."
            )
    world = int(environ.get("WORLD_SIZE", "0")) or shard * replicate
    if shard * replicate != world:
        works = (
            f"change the line to 'parallelism_config_dp_replicate_size: {world // shard}'"
            if shard > 0 and world % shard == 0
            else f"choose a parallelism_config_dp_shard_size that divides {world}"
        )
        raise MiCSConfigError(
            f"The launch file has parallelism_config_dp_shard_size: {shard} and parallelism_config_dp_replicate_size: "
            f"{replicate}, which make {shard * replicate} processes, but {world} are running: {works}. "
            "'mics config --check FILE' checks a file before it is launched."
        )
    variable = environ.get("MICS_SHARD_SIZE")
    # The file has no word for "auto", so its number is a placeholder then.
    if variable is not None and variable.strip() not in (str(shard), "auto"):
        raise MiCSConfigError(
            f"MICS_SHARD_SIZE={variable} contradicts the launch file's parallelism_config_dp_shard_size: {shard}. "
            "Unset the variable, or change the line."
        )
    return shard


def launched_world_size() -> int:
    """Returns the number of processes that torchrun, Accelerate or MPI started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 1)


def _launch_file() -> Path | None:
    """Returns the file that ``accelerate launch``, this process's parent, was given; ``None`` if none can be found."""
    parent = Path("/proc") / str(os.getppid())
    try:
        words = (parent / "cmdline").read_text().split("\0")
        folder = (parent / "cwd").resolve(strict=True)
    except OSError:
        return None
    for option, value in itertools.pairwise([*words, ""]):
        name, _, attached = option.partition("=")
        if name == "--config_file":
            file = folder / (attached or value)
            return file if file.suffix in (".yaml", ".yml") and file.is_file() else None
    return None


def take_over_launch() -> None:
    """Makes a launch by ``accelerate launch`` or ``torchrun`` ours.

    The launch file asks Accelerate for FSDP to get one process a rank; the flags would make Accelerate and transformers
    shard and load models their own way. And without a hint Accelerate runs the ranks of a machine without accelerators
    one by one, each on its own.

    Raises:
        MiCSConfigError: If the launch file has lines that Accelerate has dropped.
    """
    file = _launch_file()
    if file is not None:
        check_keys(file)
    for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        os.environ.pop(flag, None)
    if launched_world_size() > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
