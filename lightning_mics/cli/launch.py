"""``mics config``: writes a file for ``accelerate launch --config_file``, or checks one."""

from __future__ import annotations

import argparse
import functools
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.prompt import Confirm, IntPrompt, InvalidResponse, Prompt

from lightning_mics.accelerate.launch_file import (
    LaunchSettings,
    check_environment,
    check_launch_file,
    launch_commands,
    launch_topology,
    write_launch_file,
)
from lightning_mics.accelerate.launch_settings import LINES, mics_settings
from lightning_mics.errors import MiCSConfigError
from lightning_mics.precision import ACCELERATE_PRECISIONS
from lightning_mics.text import int_or_word
from lightning_mics.topology import ClusterTopology


def configure(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the options of ``mics config``; returns what it does with them."""
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--check", type=Path, metavar="FILE", help="only check this file and show its groups; write nothing")
    add("--output", type=Path, default=Path("mics.yaml"), metavar="FILE", help="what to write (default: mics.yaml)")
    add("--force", action="store_true", help="replace the output if it exists")
    add("--yes", action="store_true", help="ask nothing: take the default of what is not given")
    add(
        "--shard-size",
        type=int_or_word,
        metavar="N",
        help="ranks of a partition group, 'node' (default), 'world' or 'auto'",
    )
    add("--num-machines", type=int, metavar="N", help="default: 1")
    processes = parser.add_mutually_exclusive_group()
    processes.add_argument("--num-processes", type=int, metavar="N", help="of all machines together")
    processes.add_argument("--processes-per-machine", type=int, metavar="N", help="default: its accelerators")
    add("--machine-rank", type=int, default=0, metavar="N", help="which machine the file is for (default: 0)")
    add("--main-process-ip", metavar="HOST", help="address of machine 0; needed with several machines")
    add("--main-process-port", type=int, metavar="PORT", help="default: a free one, 29500 with several machines")
    add("--mixed-precision", choices=tuple(ACCELERATE_PRECISIONS), help="default: no")
    add("--cpu", action=switch, help="compute on CPUs")
    add("--activation-checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--cpu-offload", action="store_true", help="keep shards and optimizer states in host memory")
    add("--full-checkpoint", action="store_true", help="save_state also writes the whole weights")
    add("--no-reshard-after-forward", action="store_true", help="keep gathered units until the backward pass")
    add("--wrap", metavar="CLASSES", help="module classes that become units, separated by commas (default: automatic)")
    add("--hierarchical", choices=("auto", "true", "false"), help="two-stage collectives; travels by environment")
    add("--node-size", type=int, metavar="N", help="ranks of a pretended node; travels by environment")
    add("--reduce-dtype", metavar="DTYPE", help="dtype of gradient reduction; travels by environment")
    return functools.partial(_run, parser)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.check is not None:
        given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
        others = ", ".join("--" + name.replace("_", "-") for name in given if name not in ("check", "run"))
        if others:
            raise MiCSConfigError(
                f"--check only reads a file, so {others} would do nothing. Leave out one or the other."
            )
        _show_check(options.check)
        return 0
    try:
        _write(options)
    except KeyboardInterrupt:
        print("\nmics: stopped; nothing is written.", file=sys.stderr)
        return 130
    return 0


def _show_check(path: Path) -> None:
    settings = check_launch_file(path)
    environment = {name: os.environ[name] for name in ("MICS_NODE_SIZE",) if name in os.environ}
    print(f"{path} can start a run.\n\n{check_environment(settings, environment)}\n")
    print(_how_to_start(path, settings, {}))


def _write(options: argparse.Namespace) -> None:
    """Writes what the flags describe, and shows its groups and how to start.

    What the flags leave open is asked for in a terminal, unless ``--yes``; elsewhere the defaults hold.
    """
    if options.output.exists() and not options.force:  # before any question is asked
        raise MiCSConfigError(f"{options.output} exists. Give another --output, or replace it with --force.")
    environment = _environment(options)
    try:
        settings = _settings(options, _Asker(sys.stdin.isatty() and not options.yes))
    except EOFError as error:
        print()
        raise MiCSConfigError("The input ended before the last answer. Try again, or give flags and --yes.") from error
    layout: object = check_environment(settings, environment)
    if options.shard_size == "auto":
        layout = f"The shard size is decided from the model; without MICS_SHARD_SIZE=auto it is {settings.shard_size}."
    write_launch_file(options.output, settings, environment=environment, force=options.force)
    print(f"\n{layout}\n\nWrote {options.output}. {_how_to_start(options.output, settings, environment)}")


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


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Returns the ``MICS_*`` variables for the flags that have no line in the file."""
    names = [name for name in mics_settings() if name not in LINES]
    if options.shard_size == "auto":
        names.insert(0, "shard_size")
    given = {name: getattr(options, name, None) for name in names}
    return {f"MICS_{name.upper()}": str(value) for name, value in given.items() if value is not None}


class _Asker:
    """Takes what is given; asks for the rest in a terminal, and takes defaults elsewhere."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self._console = Console(highlight=False)

    def __call__(
        self, given: Any, question: str, default: Any, kind: Any = Prompt, choices: Sequence[object] = ()
    ) -> Any:
        if given is not None or not self.interactive:
            return default if given is None else given
        return kind.ask(question, default=default, choices=[*map(str, choices)] or None, console=self._console)


class _Count(IntPrompt):
    def process_response(self, value: str) -> int:
        number = super().process_response(value)
        if number < 1:
            raise InvalidResponse("[prompt.invalid]Please enter a number from 1 up")
        return number


def _settings(options: argparse.Namespace, ask: _Asker) -> LaunchSettings:
    machines = ask(options.num_machines, "Machines", 1, _Count)
    processes = _processes(options, ask, machines)
    topology = launch_topology(processes, machines, options.node_size)
    return LaunchSettings(
        num_processes=processes,
        num_machines=machines,
        main_process_ip=_address(options, ask, machines),
        cpu=ask(options.cpu, "Compute on CPUs?", ask.interactive and _count_accelerators() == 0, Confirm),
        shard_size=_shard_size(options, ask, topology),
        mixed_precision=ask(options.mixed_precision, "Precision", "no", Prompt, tuple(ACCELERATE_PRECISIONS)),
        machine_rank=options.machine_rank,
        main_process_port=options.main_process_port,
        reshard_after_forward=not options.no_reshard_after_forward,
        activation_checkpointing=options.activation_checkpointing,
        cpu_offload=options.cpu_offload,
        full_checkpoint=options.full_checkpoint,
        wrap=options.wrap,
    )


def _processes(options: argparse.Namespace, ask: _Asker, machines: int) -> int:
    if options.num_processes is not None:
        return options.num_processes
    accelerators = _count_accelerators()
    if options.processes_per_machine is None and not accelerators and not ask.interactive:
        raise MiCSConfigError(
            "How many processes to start is not given, and this machine has no accelerators to count. Give "
            "--processes-per-machine or --num-processes, such as --processes-per-machine 4."
        )
    return machines * ask(options.processes_per_machine, "Processes on each machine", accelerators or 4, _Count)


def _count_accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _address(options: argparse.Namespace, ask: _Asker, machines: int) -> str | None:
    if options.main_process_ip is None and machines > 1 and not ask.interactive:
        raise MiCSConfigError(
            f"--num-machines {machines} needs the address of machine 0, where the others reach it. Give it with "
            "--main-process-ip, such as --main-process-ip 10.0.0.1."
        )
    if machines == 1:
        return options.main_process_ip
    return ask(options.main_process_ip, "Address of machine 0, where the others reach it", socket.gethostname())


def _shard_size(options: argparse.Namespace, ask: _Asker, topology: ClusterTopology) -> int:
    question, works = "Shard size: ranks that hold one replica together", topology.valid_shard_sizes()
    given = "node" if options.shard_size == "auto" else options.shard_size
    return topology.resolve_shard_size(ask(given, question, topology.node_size, IntPrompt, works))
