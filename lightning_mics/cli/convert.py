"""``mics convert-config``: a DeepSpeed configuration as settings of MiCS, with a report and lines for the script."""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mics.accelerate.launch_file import LaunchSettings, launch_commands, write_launch_file
from lightning_mics.cli.code import Code, call, layout_call, write_text
from lightning_mics.deepspeed import Conversion, Field, Optimizer, convert_deepspeed
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ClusterTopology, check_positive_int

_FORMATS = ("mics", "accelerate", "lightning")
# What Accelerate's launch file has no place for travels in variables.
_BESIDE_THE_LAUNCH_FILE = ("hierarchical", "reduce_dtype")
_COLOURS = {"kept": "green", "replaced": "yellow", "dropped": "red", "unknown": "red"}
_LONGEST_VALUE = 40


def configure(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    """Adds the options of the command; returns what runs it."""
    add = parser.add_argument
    add("deepspeed_config", type=Path, help="a DeepSpeed configuration (JSON)")
    add("--world-size", type=int, metavar="N", help="number of ranks, to check sizes against")
    add("--num-machines", type=int, metavar="N", help="number of machines, with equally many ranks")
    add("--main-process-ip", metavar="IP", help="address of machine 0, for --format accelerate")
    add("--output", type=Path, default=Path("mics.yaml"), help="what to write (default: mics.yaml)")
    add(
        "--format",
        choices=_FORMATS,
        default=_FORMATS[0],
        help="for MiCSConfig.from_yaml, for accelerate launch --config_file, or for LightningCLI (default: mics)",
    )
    add("--force", action="store_true", help="replace the output if it exists")
    return _convert


def _convert(options: argparse.Namespace) -> None:
    node_size = _node_size(options.world_size, options.num_machines)
    conversion = convert_deepspeed(options.deepspeed_config, world_size=options.world_size, node_size=node_size)
    if options.format == "accelerate":
        use = f"Start a script with it: {_write_for_accelerate(conversion, options)}"
    elif options.format == "lightning":
        write_text(options.output, lightning_yaml(conversion), force=options.force)
        use = f"Pass it to a script that uses LightningCLI: fit --config {options.output}"
    else:
        write_text(options.output, mics_yaml(conversion), force=options.force)
        use = f"Read it with MiCSConfig.from_yaml({str(options.output)!r})."
    console = Console(highlight=False)
    _print_report(conversion, console)
    _print_next_step(conversion, console)
    print(f"\nWrote {options.output}. {use}")


def _node_size(world_size: int | None, num_machines: int | None) -> int | None:
    """Returns the number of ranks on a machine, as far as it is known."""
    if num_machines is None:
        return None
    check_positive_int("num_machines", num_machines, 2)
    if world_size is None:
        raise MiCSConfigError(f"--num-machines {num_machines} needs the number of ranks, too. Add --world-size 16.")
    check_positive_int("world_size", world_size, 8)
    if world_size % num_machines:
        below = max(1, world_size // num_machines) * num_machines
        raise MiCSConfigError(
            f"--world-size {world_size} cannot be spread evenly over --num-machines {num_machines}. Try --world-size "
            f"{below}."
        )
    return world_size // num_machines


# Files.


def _write_for_accelerate(conversion: Conversion, options: argparse.Namespace) -> str:
    """Writes a file for ``accelerate launch --config_file``; returns the command that starts a script with it."""
    world_size, num_machines = options.world_size, options.num_machines or 1
    if world_size is None:
        why = ", which is what the batch sizes imply" if conversion.world_size else ""
        raise MiCSConfigError(
            f"A launch file for Accelerate names the number of ranks. Add --world-size {conversion.world_size or 8}"
            f"{why}."
        )
    topology = ClusterTopology(world_size=world_size, node_size=world_size // num_machines)
    settings = LaunchSettings(
        shard_size=topology.resolve_shard_size(conversion.config.shard_size),
        num_processes=world_size,
        num_machines=num_machines,
        main_process_ip=options.main_process_ip,
        mixed_precision=conversion.mixed_precision or "no",
        activation_checkpointing=bool(conversion.config.activation_checkpointing),
        activation_checkpointing_offload=conversion.config.activation_checkpointing_offload,
        cpu_offload=conversion.config.cpu_offload,
    )
    variables = {
        f"MICS_{name.upper()}": str(value).lower()
        for name, value in conversion.settings().items()
        if name in _BESIDE_THE_LAUNCH_FILE
    }
    write_launch_file(options.output, settings, environment=variables, force=options.force)
    return launch_commands(options.output, variables)[0]


def lightning_yaml(conversion: Conversion) -> str:
    """Returns a ``trainer`` section for LightningCLI."""
    strategy = {"class_path": "lightning_mics.MiCSStrategy", "init_args": conversion.settings()}
    comment = f"# Converted from {conversion.source}. For LightningCLI; add num_nodes and devices.\n"
    trainer = {"strategy": strategy, **_trainer_arguments(conversion)}
    return comment + yaml.safe_dump({"trainer": trainer}, sort_keys=False)


def mics_yaml(conversion: Conversion) -> str:
    """Returns a file for ``MiCSConfig.from_yaml``, with what belongs into the training script in its comments."""
    optimizer = conversion.optimizer
    outside = {
        "micro batch of a rank": conversion.micro_batch_size,
        "gradient accumulation": conversion.gradient_accumulation_steps,
        "global batch": conversion.global_batch_size,
        "gradient clipping (norm)": conversion.clip_norm,
        "precision (Lightning)": conversion.precision,
        "mixed_precision (Accelerate)": conversion.mixed_precision,
        "optimizer": call(f"torch.optim.{optimizer.name}", _optimizer_arguments(optimizer)) if optimizer else None,
    }
    lines = [f"  {name}: {value}" for name, value in outside.items() if value is not None]
    if lines:
        lines = ["", "Not MiCS settings, but for the training script:", *lines]
    lines.insert(0, f"MiCS settings converted from {conversion.source}. Read them with MiCSConfig.from_yaml(...).")
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return comments + "\n" + yaml.safe_dump(conversion.settings(), sort_keys=False)


# Lines for the script.


def trainer_code(conversion: Conversion) -> str:
    """Returns the lines that create a Lightning ``Trainer``."""
    arguments = {"strategy": call("MiCSStrategy", conversion.settings()), **_trainer_arguments(conversion)}
    imports = ["from lightning.pytorch import Trainer", "from lightning_mics import MiCSStrategy"]
    return "\n".join([*imports, "", layout_call("trainer = Trainer", arguments)])


def _trainer_arguments(conversion: Conversion) -> dict[str, Any]:
    arguments = {
        "accumulate_grad_batches": conversion.gradient_accumulation_steps,
        "precision": conversion.precision,
        "gradient_clip_val": conversion.clip_norm,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def accelerate_code(conversion: Conversion) -> str:
    """Returns the lines that create a ``MiCSAccelerator`` and clip with it."""
    arguments = {
        "mics_plugin": call("MiCSPlugin", conversion.settings()),
        "gradient_accumulation_steps": conversion.gradient_accumulation_steps,
        "mixed_precision": conversion.mixed_precision,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    lines = ["from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin", ""]
    lines.append(layout_call("accelerator = MiCSAccelerator", given))
    if conversion.clip_norm is not None:
        lines += ["", "if accelerator.sync_gradients:  # before optimizer.step()"]
        lines.append(f"    accelerator.clip_grad_norm_(model.parameters(), {conversion.clip_norm})")
    return "\n".join(lines)


def optimizer_code(optimizer: Optimizer) -> str:
    """Returns the lines that create an optimizer."""
    open_lines = [f"{name} = ...  # 'auto' in the file" for name in optimizer.open]
    line = layout_call(f"optimizer = torch.optim.{optimizer.name}", _optimizer_arguments(optimizer))
    return "\n".join(["import torch", "", *open_lines, line])


def _optimizer_arguments(optimizer: Optimizer) -> dict[str, Any]:
    left_open = {name: Code(name) for name in optimizer.open}
    return {"": Code("model.parameters()"), **optimizer.arguments, **left_open}


# The screen.


def _print_report(conversion: Conversion, console: Console) -> None:
    """Prints what became of each field, in the file's order; neighbours that share a note share it."""
    console.print(Text(f"{conversion.source}, field by field\n", style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    for (outcome, note), fields in itertools.groupby(conversion.report, lambda item: (item.outcome, item.note)):
        names = Text("\n").join(_named(item) for item in fields)
        table.add_row(Text(outcome, style=_COLOURS[outcome]), Text.assemble(names, "\n", (note, "dim")))
    console.print(table)
    if conversion.hints:
        console.print(Text("\nNot in the file", style="bold"))
        for hint in conversion.hints:
            console.print(Text(hint))


def _named(item: Field) -> Text:
    value = json.dumps(item.value)
    shown = value if len(value) <= _LONGEST_VALUE else value[: _LONGEST_VALUE - 4] + " ..."
    return Text.assemble((item.key, "bold"), f" = {shown}")


def _print_next_step(conversion: Conversion, console: Console) -> None:
    """Prints the lines for the training script."""
    parts = {"With the Lightning Trainer": trainer_code(conversion), "With Accelerate": accelerate_code(conversion)}
    if conversion.optimizer is not None:
        parts["Optimizer"] = optimizer_code(conversion.optimizer)
    console.print(Text("\nNext: into the training script", style="bold"))
    for title, code in parts.items():
        console.print(Text(f"\n{title}\n", style="bold cyan"))
        # Code is to be copied: a line that is too long stays one line.
        console.print(Text(textwrap.indent(code, "  ")), soft_wrap=True)
