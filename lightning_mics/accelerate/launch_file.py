"""The file that ``accelerate launch --config_file`` takes: what it says, writing one and checking one.

Nothing here starts a process or needs Accelerate.
"""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path

from lightning_mics.accelerate.launch_check import read_settings
from lightning_mics.accelerate.launch_settings import (
    LINES,
    REPLICATE,
    SHARD,
    LaunchSettings,
    check_variable,
    launch_topology,
    mics_settings,
    yaml_scalar,
)
from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import did_you_mean, listing
from lightning_mics.topology import GroupLayout

__all__ = [
    "LaunchSettings",
    "check_environment",
    "check_launch_file",
    "launch_commands",
    "launch_topology",
    "write_launch_file",
]


def write_launch_file(
    path: str | os.PathLike[str],
    settings: LaunchSettings,
    *,
    environment: Mapping[str, str] = {},
    force: bool = False,
) -> Path:
    """Writes a file for ``accelerate launch --config_file``.

    Args:
        path: The file to write.
        settings: What it says.
        environment: ``MICS_*`` variables that the run is meant to have. Accelerate does not carry them, so that the
            file only names them, in the command to start with.
        force: Whether to replace ``path`` if it exists.

    Returns:
        The path.

    Raises:
        MiCSConfigError: If the file exists or cannot be written, or a variable is wrong.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise MiCSConfigError(
            f"{path} would be read as JSON, and this is YAML. Try {path.with_suffix('.yaml')} instead."
        )
    check_environment(settings, environment)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(_render(path.name, settings, environment))
    except FileExistsError as error:
        raise MiCSConfigError(
            f"{path} exists. Choose another name, or replace it with --force (force=True)."
        ) from error
    except OSError as error:
        raise MiCSConfigError(
            f"{path} cannot be written ({error.strerror}). Choose a file in a folder of yours."
        ) from error
    return path


def check_environment(settings: LaunchSettings, environment: Mapping[str, str]) -> GroupLayout:
    """Checks ``MICS_*`` variables beside the settings they are meant for.

    Args:
        settings: What the launch file says.
        environment: The variables, by name.

    Returns:
        The layout that the run will have, with pretended nodes if ``MICS_NODE_SIZE`` asks for them.

    Raises:
        MiCSConfigError: If a variable is unknown or wrong, or contradicts the settings.
    """
    from lightning_mics.config import MiCSConfig

    known = ["MICS_" + name.upper() for name in mics_settings()]
    for name in environment:
        if name not in known:
            hint = did_you_mean(name, known, f"Known are {', '.join(sorted(known))}.", show=str)
            raise MiCSConfigError(f"{name} is not a variable of MiCS. {hint}")
    check_variable(settings.shard_size, environment)
    node_size = MiCSConfig.from_env(environment).node_size
    return launch_topology(settings.num_processes, settings.num_machines, node_size).layout(settings.shard_size)


def launch_commands(
    path: str | os.PathLike[str], environment: Mapping[str, str] = {}, num_machines: int = 1
) -> tuple[str, str]:
    """Returns the commands that start a script by a launch file.

    Args:
        path: The launch file.
        environment: Variables to set in front of the commands.
        num_machines: Machines; with several, the commands are those of machine 0.

    Returns:
        The command for a script that uses :mod:`lightning_mics.accelerate`, and the one for a script that knows only
        Accelerate or transformers.
    """
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    rank = " --machine_rank 0" if num_machines > 1 else ""
    command = f"{variables}accelerate launch --config_file {shlex.quote(str(path))}{rank}"
    return f"{command} train.py", f"{command} -m lightning_mics.run any_script.py"


def _render(name: str, settings: LaunchSettings, environment: Mapping[str, str]) -> str:
    several = settings.num_machines > 1
    ranks = f"{settings.num_processes // settings.num_machines} on each"
    own, other = launch_commands(name, num_machines=settings.num_machines)
    on_each = f", on each of {settings.num_machines} machines with its rank" if several else ""
    ip, wrap = "", ""
    if settings.main_process_ip is not None:
        ip = f"main_process_ip: {yaml_scalar(settings.main_process_ip)}  # machine 0, as the others reach it\n"
    offload = "  fsdp_activation_checkpointing_offload: true\n" if settings.activation_checkpointing_offload else ""
    if settings.wrap is not None:
        wrap = (
            "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
            f"  fsdp_transformer_layer_cls_to_wrap: {yaml_scalar(settings.wrap)}\n"
        )
    return f"""\
# Written by the `mics` command.
# Start a script that uses lightning_mics.accelerate with it{on_each}:
#   {own}
# or one that knows only Accelerate or transformers:
#   {other}
compute_environment: LOCAL_MACHINE
distributed_type: FSDP  # how Accelerate starts one process a rank, on CPUs too
num_machines: {settings.num_machines}
num_processes: {settings.num_processes}  # of all machines{f": {ranks}" if several else ""}
machine_rank: {settings.machine_rank}{"  # --machine_rank overrides it" if several else ""}
{ip}main_process_port: {settings.main_process_port}{"  # any free one" if settings.main_process_port == 0 else ""}
rdzv_backend: static
same_network: true
mixed_precision: {yaml_scalar(settings.mixed_precision)}
use_cpu: {yaml_scalar(settings.cpu)}{"  # see the end of this file" if settings.cpu else ""}
main_training_function: main
debug: false
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: {yaml_scalar(settings.reshard_after_forward)}  # free units until backward
  fsdp_activation_checkpointing: {yaml_scalar(settings.activation_checkpointing)}
{offload}  fsdp_offload_params: {yaml_scalar(settings.cpu_offload)}  # shards and optimizer states in host memory
  fsdp_state_dict_type: {"FULL" if settings.full_checkpoint else "SHARDED"}_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true  # of pretrained weights each rank reads its own rows
{wrap}parallelism_config:  # the two sizes multiply to num_processes
  {SHARD}: {settings.shard_size}  # ranks of a partition group: together they hold one replica
  {REPLICATE}: {settings.layout.num_replicas}  # replicas
{_footer(name, settings, environment)}
"""


def _footer(name: str, settings: LaunchSettings, environment: Mapping[str, str]) -> str:
    def command(variables: Mapping[str, str]) -> str:
        return f"#   {launch_commands(name, variables, settings.num_machines)[0]}"

    lines = [
        "",
        "# Accelerate carries no other settings of MiCS to the processes, and drops keys it does not know. These go",
        f"# through the environment{' of each machine' if settings.num_machines > 1 else ''}, as MICS_ and the name in "
        "capitals:",
        *textwrap.wrap(
            listing([name for name in mics_settings() if name not in LINES]),
            width=118,
            initial_indent="#   ",
            subsequent_indent="#   ",
        ),
        "# This run is meant to be started with" if environment else "# For example:",
        command(environment or {"MICS_HIERARCHICAL": "false", "MICS_REDUCE_DTYPE": "bf16"}),
    ]
    if settings.cpu:
        lines += [
            "#",
            "# Nor does it carry use_cpu: on a machine with GPUs, keep to the CPUs with",
            command({"ACCELERATE_USE_CPU": "true", **environment}),
        ]
    return "\n".join(lines)


def check_launch_file(path: str | os.PathLike[str]) -> LaunchSettings:
    """Checks a launch file, whoever wrote it, together with the ``MICS_*`` variables of the environment.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        MiCSConfigError: If it cannot start a run; the message lists all lines to change.
    """
    file, settings = read_settings(Path(path))
    if settings is not None:
        from lightning_mics.config import MiCSConfig

        names = ["MICS_" + name.upper() for name in mics_settings()]
        try:
            MiCSConfig.from_env()
            check_environment(settings, {name: os.environ[name] for name in names if name in os.environ})
        except MiCSConfigError as error:
            file.note(error)
    file.raise_problems()
    assert settings is not None  # or a problem was noted
    return settings
