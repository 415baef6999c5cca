"""The report on a conversion, for a terminal of 80 columns."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mics.deepspeed.conversion import Conversion, Field

_LONGEST_VALUE = 40


def print_report(conversion: Conversion, console: Console) -> None:
    """Prints what became of each field, in three lists."""
    counts = Table.grid(padding=(0, 2))
    lists = (
        ("Carried over", conversion.carried, "green", "the same setting here, or in the script"),
        ("Changed", conversion.changed, "yellow", "became something else, or is not needed"),
        ("No counterpart", conversion.no_counterpart, "red", "with what to do instead"),
    )
    for title, fields, colour, meaning in lists:
        counts.add_row(Text(title, style=f"bold {colour}"), str(len(fields)), meaning)
    console.print(Text(f"{conversion.source}, field by field", style="bold"))
    console.print(counts)
    for title, fields, colour, _ in lists:
        if fields:
            console.print(Text(f"\n{title}", style=f"bold {colour}"))
            _print_fields(fields, console)
    if conversion.hints:
        console.print(Text("\nNot in the file", style="bold"))
        for hint in conversion.hints:
            _print_wrapped(hint, 2, console)


def print_next_step(conversion: Conversion, console: Console) -> None:
    """Prints the lines for the training script."""
    parts = [("With the Lightning Trainer", conversion.trainer_code())]
    parts.append(("With Accelerate", conversion.accelerate_code()))
    if optimizer := conversion.optimizer_code():
        parts.append(("Optimizer and scheduler", optimizer))
    console.print(Text("\nNext: into the training script", style="bold"))
    for title, code in parts:
        console.print(Text(f"\n{title}\n", style="bold cyan"))
        # Code is to be copied: a line that is too long stays one line.
        console.print(Text(textwrap.indent(code, "  ")), soft_wrap=True)


def _print_fields(fields: Sequence[Field], console: Console) -> None:
    """Prints fields that share a note together."""
    notes: dict[str, list[Field]] = {}
    for item in fields:
        notes.setdefault(item.note, []).append(item)
    for note, group in notes.items():
        for item in group:
            value = json.dumps(item.value)
            shown = value if len(value) <= _LONGEST_VALUE else value[: _LONGEST_VALUE - 4] + " ..."
            console.print(Text.assemble("  ", (item.key, "bold"), f" = {shown}"), soft_wrap=True)
        _print_wrapped(note, 6, console, style="dim")


def _print_wrapped(text: str, indent: int, console: Console, style: str = "") -> None:
    spaces = " " * indent
    wrapped = textwrap.fill(text, console.width, initial_indent=spaces, subsequent_indent=spaces)
    console.print(Text(wrapped, style=style), soft_wrap=True)
