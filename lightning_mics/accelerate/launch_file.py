"""The file that ``accelerate launch --config_file`` takes: what it says, writing one and checking one.

Nothing here starts a process or needs Accelerate.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import yaml

from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ClusterTopology, GroupLayout, check_positive_int, divisors

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
DEFAULT_PORT = 29500
SHARD = "parallelism_config_dp_shard_size"
REPLICATE = "parallelism_config_dp_replicate_size"

# Settings of MiCS that Accelerate carries, by the section and the key it knows them by.
CARRIED = {
    "shard_size": ("parallelism_config", SHARD),
    "wrap": ("fsdp_config", "fsdp_transformer_layer_cls_to_wrap"),
    "reshard_after_forward": ("fsdp_config", "fsdp_reshard_after_forward"),
    "activation_checkpointing": ("fsdp_config", "fsdp_activation_checkpointing"),
    "cpu_offload": ("fsdp_config", "fsdp_offload_params"),
    "param_dtype": ("", "mixed_precision"),
}


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """What a launch file says.

    Attributes:
        shard_size: Ranks in a partition group.
        num_processes: Ranks on all machines together.
        num_machines: Machines, each with the same number of ranks.
        machine_rank: Which of the machines this one is, from 0.
        main_process_ip: Address of machine 0. Needed with several machines.
        main_process_port: Port on machine 0. 0 takes a free one, which only works on a single machine and is the
            default there; with several machines the default is 29500.
        mixed_precision: Precision of parameters while they are gathered: ``"no"``, ``"bf16"`` or ``"fp16"``.
        cpu: Whether the ranks compute on CPUs.
        reshard_after_forward: Whether units are freed between forward and backward.
        activation_checkpointing: Whether units recompute their activations in the backward pass.
        cpu_offload: Whether shards, their gradients and optimizer states live in host memory.
        full_checkpoint: Whether ``save_state`` also writes the whole weights, for ``from_pretrained``.
        wrap: Class names of the modules that become FSDP units, separated by commas.

    Raises:
        MiCSConfigError: If a value is wrong, or the sizes do not fit together.
    """

    shard_size: int
    num_processes: int
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    mixed_precision: Precision = "no"
    cpu: bool = False
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    full_checkpoint: bool = False
    wrap: str | None = None

    def __post_init__(self) -> None:
        topology = launch_topology(self.num_processes, self.num_machines)
        check_positive_int("shard_size", self.shard_size, topology.node_size)
        topology.layout(self.shard_size)
        self._check_machines()
        self._check_port()
        if self.mixed_precision not in PRECISIONS:
            raise MiCSConfigError(
                f"mixed_precision={self.mixed_precision!r} is not known here. Values that work: 'no', 'bf16', 'fp16'."
            )
        for name in ("cpu", "reshard_after_forward", "activation_checkpointing", "cpu_offload", "full_checkpoint"):
            if not isinstance(getattr(self, name), bool):
                raise MiCSConfigError(
                    f"{name}={getattr(self, name)!r} is not a switch. Values that work: True or False."
                )
        if self.wrap is not None:
            object.__setattr__(self, "wrap", check_wrap(self.wrap))

    def _check_machines(self) -> None:
        rank, last = self.machine_rank, self.num_machines - 1
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= last:
            works = "0" if last == 0 else f"0 to {last}"
            raise MiCSConfigError(
                f"machine_rank={rank!r} is not one of the num_machines={self.num_machines}. Values that work: {works}."
            )
        ip = self.main_process_ip
        if ip is not None and (not isinstance(ip, str) or not ip.strip()):
            raise MiCSConfigError(f"main_process_ip={ip!r} is not an address. Try main_process_ip='10.0.0.1'.")
        if ip is None and self.num_machines > 1:
            raise MiCSConfigError(
                f"num_machines={self.num_machines} needs main_process_ip, the address of machine 0 at which the others "
                "reach it. Try main_process_ip='10.0.0.1'."
            )

    def _check_port(self) -> None:
        several = self.num_machines > 1
        if self.main_process_port is None:
            object.__setattr__(self, "main_process_port", DEFAULT_PORT if several else 0)
        port = self.main_process_port
        if isinstance(port, bool) or not isinstance(port, int) or not int(several) <= port <= 65535:
            why = f", and all {self.num_machines} machines must know it" if several and port == 0 else ""
            raise MiCSConfigError(
                f"main_process_port={port!r} is not a port{why}. Try main_process_port={DEFAULT_PORT}."
            )

    @property
    def layout(self) -> GroupLayout:
        """Which rank holds which shard of which replica."""
        return launch_topology(self.num_processes, self.num_machines).layout(self.shard_size)


def launch_topology(num_processes: int, num_machines: int = 1, node_size: int | None = None) -> ClusterTopology:
    """Returns the cluster that a launch makes.

    Args:
        num_processes: Ranks on all machines together.
        num_machines: Machines, each with the same number of ranks.
        node_size: Ranks of a pretended node (``MICS_NODE_SIZE``); the ranks of a machine, if not given.

    Raises:
        MiCSConfigError: If a number is wrong, or the processes cannot be spread evenly over the machines.
    """
    check_positive_int("num_processes", num_processes, 8)
    check_positive_int("num_machines", num_machines, 1)
    if num_processes % num_machines:
        raise MiCSConfigError(
            f"num_processes={num_processes} cannot be spread evenly over num_machines={num_machines}. "
            f"Values that work: num_processes={even_numbers(num_processes, num_machines)}, or "
            f"num_machines={listing(divisors(num_processes))}."
        )
    return ClusterTopology(world_size=num_processes, node_size=node_size or num_processes // num_machines)


def even_numbers(num_processes: int, num_machines: int) -> str:
    """Returns the numbers of processes next to ``num_processes`` that spread evenly over the machines."""
    below = num_processes // num_machines * num_machines
    return listing([number for number in (below, below + num_machines) if number])


def listing(values: Sequence[int]) -> str:
    """Returns ``1``, ``1 or 2``, ``1, 2 or 4``."""
    words = [str(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def check_wrap(wrap: object) -> str:
    """Returns class names separated by single commas.

    Raises:
        MiCSConfigError: If ``wrap`` is something else.
    """
    names = [name.strip() for name in wrap.split(",")] if isinstance(wrap, str) else []
    if not names or not all(name.isidentifier() for name in names):
        raise MiCSConfigError(
            f"wrap={wrap!r} is not a list of class names. Separate them by commas, as in wrap='GPT2Block,Embedding'."
        )
    return ",".join(names)


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

    known = ["MICS_" + entry.name.upper() for entry in dataclasses.fields(MiCSConfig)]
    for name in environment:
        if name not in known:
            raise MiCSConfigError(f"{name} is not a variable of MiCS. {_did_you_mean(name, known)}")
    shard_size = environment.get("MICS_SHARD_SIZE")
    if shard_size not in (None, str(settings.shard_size), "auto"):
        raise MiCSConfigError(
            f"MICS_SHARD_SIZE={shard_size} contradicts shard_size={settings.shard_size}. Leave the variable out: the "
            "launch file carries the shard size."
        )
    node_size = MiCSConfig.from_env(environment).node_size
    return launch_topology(settings.num_processes, settings.num_machines, node_size).layout(settings.shard_size)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."


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
    parts = [_header(name, settings), _machine_lines(settings), _fsdp_lines(settings), _size_lines(settings)]
    return "\n".join([*parts, _footer(name, settings, environment)]) + "\n"


def _header(name: str, settings: LaunchSettings) -> str:
    own, other = launch_commands(name, num_machines=settings.num_machines)
    each = f", on each of {settings.num_machines} machines with its rank" if settings.num_machines > 1 else ""
    return (
        "# Written by the `mics` command.\n"
        f"# Start a script that uses lightning_mics.accelerate with it{each}:\n"
        f"#   {own}\n"
        "# or one that knows only Accelerate or transformers:\n"
        f"#   {other}"
    )


def _machine_lines(settings: LaunchSettings) -> str:
    several = settings.num_machines > 1
    each = f": {settings.num_processes // settings.num_machines} on each" if several else ""
    lines = [
        "compute_environment: LOCAL_MACHINE",
        "distributed_type: FSDP  # how Accelerate starts one process a rank, on CPUs too",
        f"num_machines: {settings.num_machines}",
        f"num_processes: {settings.num_processes}  # of all machines{each}",
        f"machine_rank: {settings.machine_rank}" + ("  # --machine_rank overrides it" if several else ""),
    ]
    if settings.main_process_ip is not None:
        lines.append(f"main_process_ip: {yaml_scalar(settings.main_process_ip)}  # machine 0, as the others reach it")
    free = "  # any free one" if settings.main_process_port == 0 else ""
    lines += [
        f"main_process_port: {settings.main_process_port}{free}",
        "rdzv_backend: static",
        "same_network: true",
        f"mixed_precision: {yaml_scalar(settings.mixed_precision)}",
        f"use_cpu: {yaml_scalar(settings.cpu)}" + ("  # see the end of this file" if settings.cpu else ""),
        "main_training_function: main",
        "debug: false",
    ]
    return "\n".join(lines)


def _fsdp_lines(settings: LaunchSettings) -> str:
    lines = [
        "fsdp_config:",
        "  fsdp_version: 2",
        f"  fsdp_reshard_after_forward: {yaml_scalar(settings.reshard_after_forward)}  # free units until backward",
        f"  fsdp_activation_checkpointing: {yaml_scalar(settings.activation_checkpointing)}",
        f"  fsdp_offload_params: {yaml_scalar(settings.cpu_offload)}  # shards and optimizer states in host memory",
        f"  fsdp_state_dict_type: {'FULL' if settings.full_checkpoint else 'SHARDED'}_STATE_DICT",
        "  fsdp_cpu_ram_efficient_loading: false  # every rank reads pretrained weights, none starts from empty ones",
    ]
    if settings.wrap is not None:
        lines += [
            "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
            f"  fsdp_transformer_layer_cls_to_wrap: {yaml_scalar(settings.wrap)}",
        ]
    return "\n".join(lines)


def _size_lines(settings: LaunchSettings) -> str:
    return "\n".join(
        [
            "parallelism_config:  # the two sizes multiply to num_processes",
            f"  {SHARD}: {settings.shard_size}  # ranks of a partition group: together they hold one replica",
            f"  {REPLICATE}: {settings.layout.num_replicas}  # replicas",
        ]
    )


def _footer(name: str, settings: LaunchSettings, environment: Mapping[str, str]) -> str:
    def command(variables: Mapping[str, str]) -> str:
        return f"#   {launch_commands(name, variables, settings.num_machines)[0]}"

    others = [name for name in mics_settings() if name not in CARRIED]
    lines = [
        "",
        "# Accelerate carries no other settings of MiCS to the processes, and drops keys it does not know. These go",
        f"# through the environment{' of each machine' if settings.num_machines > 1 else ''}, as MICS_ and the name in "
        "capitals:",
        f"#   {', '.join(others)}",
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


def yaml_scalar(value: bool | str) -> str:
    """Writes a value so that YAML reads the same one; the bare word ``no`` would mean false."""
    if isinstance(value, bool):
        return "true" if value else "false"
    plain = re.fullmatch(r"[A-Za-z_][\w.,-]*", value) and yaml.safe_load(value) == value
    return value if plain else "'" + value.replace("'", "''") + "'"


def mics_settings() -> list[str]:
    """Returns the names of all settings of MiCS."""
    from lightning_mics.config import MiCSConfig

    return [entry.name for entry in dataclasses.fields(MiCSConfig)]


def check_launch_file(path: str | os.PathLike[str]) -> LaunchSettings:
    """Checks a launch file, whoever wrote it.

    ``MICS_SHARD_SIZE`` and ``MICS_NODE_SIZE`` of the environment are taken into account.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        MiCSConfigError: If it cannot start a run; the message lists all lines to change.
    """
    from lightning_mics.accelerate.launch_check import read_settings

    return read_settings(Path(path))
