"""What ``mics config`` does with its flags, and what it asks for where they leave something open."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.prompt import Confirm, IntPrompt, Prompt

from lightning_mics.accelerate.launch_file import (
    LaunchSettings,
    check_environment,
    check_launch_file,
    launch_commands,
    launch_topology,
    write_launch_file,
)
from lightning_mics.errors import MiCSConfigError
from lightning_mics.precision import ACCELERATE_PRECISIONS
from lightning_mics.topology import ClusterTopology, ShardSize


def write_by_flags(options: argparse.Namespace) -> None:
    """Writes the launch file that the flags of ``mics config`` describe, and shows its groups and how to start.

    What the flags leave open is asked for in a terminal, unless ``options.yes``; elsewhere the defaults hold.

    Args:
        options: The flags.

    Raises:
        MiCSConfigError: If they cannot work, or leave open what has no default.
    """
    if options.output.exists() and not options.force:  # before any question is asked
        raise MiCSConfigError(f"{options.output} exists. Give another --output, or replace it with --force.")
    environment = environment_by_flags(options)
    try:
        settings = settings_by_flags(options, interactive=sys.stdin.isatty() and not options.yes)
    except EOFError as error:
        print()
        raise MiCSConfigError("The input ended before the last answer. Try again, or give flags and --yes.") from error
    layout: object = check_environment(settings, environment)
    if options.shard_size == "auto":
        layout = f"The shard size is decided from the model; without MICS_SHARD_SIZE=auto it is {settings.shard_size}."
    write_launch_file(options.output, settings, environment=environment, force=options.force)
    print(f"\n{layout}\n\nWrote {options.output}. {_how_to_start(options.output, settings, environment)}")


def show_check(path: Path) -> None:
    """Checks a launch file and shows its groups and how to start.

    Args:
        path: The file.

    Raises:
        MiCSConfigError: If it cannot start a run.
    """
    settings = check_launch_file(path)
    environment = {name: os.environ[name] for name in ("MICS_NODE_SIZE",) if name in os.environ}
    print(f"{path} can start a run.\n\n{check_environment(settings, environment)}\n")
    print(_how_to_start(path, settings, {}))


def _how_to_start(path: Path, settings: LaunchSettings, environment: Mapping[str, str]) -> str:
    own, other = launch_commands(path, environment, settings.num_machines)
    each = f", on each of {settings.num_machines} machines with its rank," if settings.num_machines > 1 else ""
    lines = [
        f"Start a script{each} with",
        f"  {own}",
        "or, if it only knows Accelerate or transformers, with",
        f"  {other}",
    ]
    if settings.cpu:
        lines.append("On a machine with GPUs, put ACCELERATE_USE_CPU=true in front: Accelerate does not carry use_cpu.")
    return "\n".join(lines)


def environment_by_flags(options: argparse.Namespace) -> dict[str, str]:
    """Returns the ``MICS_*`` variables for the flags that Accelerate does not carry."""
    given = {
        "MICS_SHARD_SIZE": "auto" if options.shard_size == "auto" else None,
        "MICS_HIERARCHICAL": options.hierarchical,
        "MICS_NODE_SIZE": options.node_size,
        "MICS_REDUCE_DTYPE": options.reduce_dtype,
    }
    return {name: str(value) for name, value in given.items() if value is not None}


def settings_by_flags(options: argparse.Namespace, *, interactive: bool) -> LaunchSettings:
    """Returns the settings that the flags describe.

    Args:
        options: The flags of ``mics config``.
        interactive: Whether to ask for what they leave open.

    Raises:
        MiCSConfigError: If they cannot work, or leave open what has no default.
    """
    asker = _Asker(interactive)
    machines = asker.number(options.num_machines, "Machines", 1)
    processes = _processes(asker, options, machines)
    topology = launch_topology(processes, machines, options.node_size)
    return LaunchSettings(
        num_processes=processes,
        num_machines=machines,
        main_process_ip=_address(asker, options.main_process_ip, machines),
        cpu=asker.switch(options.cpu, "Compute on CPUs?", _count_accelerators() == 0),
        shard_size=_shard_size(asker, options.shard_size, topology),
        mixed_precision=asker.word(options.mixed_precision, "Precision", list(ACCELERATE_PRECISIONS)),
        machine_rank=options.machine_rank,
        main_process_port=options.main_process_port,
        reshard_after_forward=not options.no_reshard_after_forward,
        activation_checkpointing=options.activation_checkpointing,
        cpu_offload=options.cpu_offload,
        full_checkpoint=options.full_checkpoint,
        wrap=options.wrap,
    )


def _processes(asker: _Asker, options: argparse.Namespace, machines: int) -> int:
    if options.num_processes is not None:
        return options.num_processes
    accelerators = _count_accelerators()
    if options.processes_per_machine is None and not accelerators and not asker.interactive:
        raise MiCSConfigError(
            "How many processes to start is not given, and this machine has no accelerators to count. Give "
            "--processes-per-machine or --num-processes, such as --processes-per-machine 4."
        )
    each = asker.number(options.processes_per_machine, "Processes on each machine", accelerators or 4)
    return machines * each


def _count_accelerators() -> int:
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _address(asker: _Asker, given: str | None, machines: int) -> str | None:
    if given is not None or machines == 1:
        return given
    if not asker.interactive:
        raise MiCSConfigError(
            f"--num-machines {machines} needs the address of machine 0, where the others reach it. Give it with "
            "--main-process-ip, such as --main-process-ip 10.0.0.1."
        )
    return asker.text("Address of machine 0, where the others reach it", socket.gethostname())


def _shard_size(asker: _Asker, given: ShardSize | None, topology: ClusterTopology) -> int:
    if given is None and asker.interactive:
        works = topology.valid_shard_sizes()
        return asker.choice("Shard size: ranks that hold one replica together", works, topology.node_size)
    return topology.resolve_shard_size("node" if given in (None, "auto") else given)


class _Asker:
    """Takes what is given; asks for the rest in a terminal, and takes defaults elsewhere."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self._console = Console(highlight=False)

    def number(self, given: int | None, question: str, default: int) -> int:
        if given is not None or not self.interactive:
            return default if given is None else given
        while True:
            answer = IntPrompt.ask(question, default=default, console=self._console)
            if answer >= 1:
                return answer
            self._console.print("[prompt.invalid]Please enter a number from 1 up")

    def choice(self, question: str, works: Sequence[int], default: int) -> int:
        return IntPrompt.ask(
            question, choices=[str(number) for number in works], default=default, console=self._console
        )

    def text(self, question: str, default: str) -> str:
        return Prompt.ask(question, default=default, console=self._console)

    def switch(self, given: bool | None, question: str, default: bool) -> bool:
        if given is not None or not self.interactive:
            return bool(given)
        return Confirm.ask(question, default=default, console=self._console)

    def word(self, given: str | None, question: str, words: Sequence[str]) -> Any:
        if given is not None or not self.interactive:
            return words[0] if given is None else given
        return Prompt.ask(question, choices=list(words), default=words[0], console=self._console)
