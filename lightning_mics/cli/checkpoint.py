"""``mics checkpoint``: which checkpoints there are, what is in one, whether it is right, and how two differ."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mics.checkpoint import (
    compare_checkpoints,
    describe_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)
from lightning_mics.checkpoint.content import Described, Difference, Listed, TensorFacts
from lightning_mics.cli.bar import byte_bar
from lightning_mics.metrics import format_bytes

_MOST_DIFFERENCES = 20
_AGES = ((86400 * 2, 86400, "days"), (3600 * 2, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


def configure(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    """Adds the commands of the command; returns what runs it."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str, **paths: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        for path, meaning in paths.items():
            command.add_argument(path, help=meaning)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(run_checkpoint=run)
        return command

    one = "a sharded checkpoint (a folder), or a full file"
    add("ls", _list, "list the checkpoints in a folder and below it", folder="a folder of checkpoints")
    show = add("show", _show, "show what is in a checkpoint", checkpoint=one)
    show.add_argument("--tensors", action="store_true", help="list every tensor")
    verify = add("verify", _verify, "read every byte and compare it with the checksums", checkpoint=one)
    diff = add("diff", _diff, "compare two checkpoints, tensor by tensor", first=one, second="another")
    diff.add_argument("--all", action="store_true", help=f"list all differences, not just {_MOST_DIFFERENCES}")
    for command in (show, verify, diff):
        command.add_argument(
            "--trust", action="store_true", help="it is your own: it may hold any object, and lack a checksum"
        )
    run: Callable[[argparse.Namespace], int] = lambda options: options.run_checkpoint(options)  # noqa: E731
    return run


def _list(options: argparse.Namespace) -> int:
    found = list_checkpoints(options.folder)
    if options.json:
        _print_json([asdict(listed) for listed in found])
        return 0
    if not found:
        print(f"No checkpoints in {options.folder}.")
        return 0
    table = _table("checkpoint", "step", "ranks", "shard size", "size", "written", "state", words=(0, 6))
    for listed in found:
        state = Text("whole", "green") if listed.problem is None else Text(listed.problem, "red")
        table.add_row(_name(listed, options.folder), *_numbers(listed), _age(listed.modified), state)
    _console().print(table)
    print("Whole: all files are there and as long as they were written. mics checkpoint verify reads every byte.")
    return 0


def _numbers(listed: Listed) -> list[str]:
    known = (listed.step, listed.world_size, listed.shard_size)
    return [*("-" if number is None else f"{number:,}" for number in known), format_bytes(listed.bytes)]


def _name(listed: Listed, folder: str) -> str:
    name = listed.path.removeprefix(folder.rstrip("/") + "/")
    return f"{name} (link)" if listed.kind == "link" else name


def _age(modified: float) -> str:
    seconds = max(0.0, time.time() - modified)
    unit, name = next((unit, name) for least, unit, name in _AGES if seconds >= least)
    return f"{seconds // unit:.0f} {name} ago"


def _show(options: argparse.Namespace) -> int:
    described = describe_checkpoint(options.checkpoint, weights_only=_trust(options))
    if options.json:
        _print_json(asdict(described))
        return 0
    console, listed = _console(), described.listed
    console.print(Text(f"{listed.path}: a {listed.kind} checkpoint", "bold"))
    facts = [
        *([] if listed.step is None else [f"step {listed.step:,}"]),
        f"written {_age(listed.modified)}",
        *([] if listed.world_size is None else [f"by {listed.world_size} ranks, shard size {listed.shard_size}"]),
        format_bytes(listed.bytes),
    ]
    console.print(", ".join(facts))
    if listed.problem is not None:
        console.print(Text(listed.problem, "red"))
    _print_parts(described, console)
    if options.tensors:
        table = _table("tensor", "dtype", "shape", "size", words=(0, 1, 2))
        for name, tensor in described.tensors.items():
            table.add_row(name, tensor.dtype, _shape(tensor), format_bytes(tensor.bytes))
        console.print(table)
    table = _table("beside tensors", "value", words=(0, 1))
    for name, value in described.values.items():
        table.add_row(name, value)
    console.print(table)
    return 0


def _print_parts(described: Described, console: Console) -> None:
    parts: dict[str, list[TensorFacts]] = {}
    for name, tensor in described.tensors.items():
        parts.setdefault(name.partition(".")[0], []).append(tensor)
    table = _table("part", "tensors", "elements", "size", "dtypes", words=(0, 4))
    for part, tensors in parts.items():
        elements = sum(tensor.numel for tensor in tensors)
        size = format_bytes(sum(tensor.bytes for tensor in tensors))
        dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors}))
        table.add_row(part, f"{len(tensors):,}", f"{elements:,}", size, dtypes)
    console.print(table)


def _shape(tensor: TensorFacts) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _verify(options: argparse.Namespace) -> int:
    with byte_bar("reading") as progress:
        found = verify_checkpoint(options.checkpoint, weights_only=_trust(options), progress=progress)
    damaged = {name: problem for name, problem in found.items() if problem is not None}
    if options.json:
        _print_json({"whole": not damaged, "files": found})
    elif damaged:
        table = _table("file", "problem", words=(0, 1))
        for name, problem in damaged.items():
            table.add_row(name, Text(problem, "red"))
        _console().print(table)
        print(f"{len(damaged)} of {len(found)} file(s) of {options.checkpoint} are not as they were written.")
    else:
        print(f"{options.checkpoint} is whole: all {len(found)} file(s) are as they were written.")
    return 1 if damaged else 0


def _diff(options: argparse.Namespace) -> int:
    with byte_bar("comparing") as progress:
        found = compare_checkpoints(options.first, options.second, weights_only=_trust(options), progress=progress)
    differences = found.differences
    if options.json:
        _print_json(asdict(found))
        return 1 if differences else 0
    equal = f"{found.equal_tensors:,} tensor(s) and {found.equal_values:,} other value(s) are equal"
    if not differences:
        print(f"No differences: {equal}, to the bit.")
        return 0
    print(f"{len(differences):,} difference(s); {equal}.")
    shown = differences if options.all else differences[:_MOST_DIFFERENCES]
    table = _table("entry", "first", "second", "largest difference", "elements", words=(0, 1, 2))
    for difference in shown:
        table.add_row(*_cells(difference))
    _console().print(table)
    if len(shown) < len(differences):
        print(f"{len(differences) - len(shown):,} more: --all lists them.")
    return 1


def _cells(difference: Difference) -> list[str]:
    same = difference.first == difference.second
    return [
        difference.name,
        "(not there)" if difference.first is None else difference.first,
        "(not there)" if difference.second is None else "same" if same else difference.second,
        "" if difference.largest is None else f"{difference.largest:.3g}",
        "" if difference.count is None else f"{difference.count:,}",
    ]


def _trust(options: argparse.Namespace) -> bool | None:
    return False if options.trust else None


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _table(*names: str, words: tuple[int, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place in words else "right", overflow="fold")
    return table


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
