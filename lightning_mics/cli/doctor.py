"""``mics doctor``: what could spoil a job, in one table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mics.cli.code import write_text
from lightning_mics.cli.plan.page import Page
from lightning_mics.errors import MiCSConfigError
from lightning_mics.processes import exit_on_signals

if TYPE_CHECKING:
    from lightning_mics.doctor.findings import Check, Findings

_EXAMPLES = """examples:
  mics doctor
  torchrun --standalone --nproc-per-node 8 -m lightning_mics doctor
  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 \\
      -m lightning_mics doctor --checkpoint-folder /shared/run1
"""
_STYLES = {"ok": "green", "look at": "yellow", "broken": "bold red"}
_SHORTEST = 2


def configure(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the options of ``mics doctor`` to its parser; returns what runs it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("--checkpoint-folder", metavar="DIR", help="where a job will save: looked at on all ranks")
    add("--limit", type=float, default=50.0, metavar="SECONDS", help="end with what is known then (default: 50)")
    add("--json", nargs="?", const="-", metavar="FILE", help="everything as JSON, into a file or alone on the screen")
    add("--force", action="store_true", help="replace the file of --json if it exists")
    return _run


def _run(options: argparse.Namespace) -> int:
    from lightning_mics.doctor.examination import Examination
    from lightning_mics.doctor.meeting import Launch

    if options.limit < _SHORTEST:
        raise MiCSConfigError(f"--limit {options.limit:g} is too short. Try --limit {_SHORTEST} or more.")
    folder = options.checkpoint_folder
    if folder is not None and "://" in folder:
        raise MiCSConfigError(
            f"--checkpoint-folder {folder} is a URL, and only folders can be looked at. Leave it out."
        )
    exit_on_signals()
    launch = Launch.from_env(os.environ)
    examination = Examination(launch, options.limit, None if folder is None else Path(folder))
    code = 2
    if launch.rank == 0:
        try:
            code = _report(options, examination.collect(), alone=not launch.is_launched)
        finally:
            examination.announce(code)
    else:
        code = examination.verdict()
    if examination.hangs:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what hangs would keep the interpreter
    return code


def _report(options: argparse.Namespace, findings: Findings, *, alone: bool) -> int:
    """Shows what was found; returns the exit code."""
    from lightning_mics.core.failures import write_error_file
    from lightning_mics.doctor.checks import all_checks

    checks = all_checks(findings)
    if options.json is not None:
        text = _to_json(findings, checks)
        if options.json == "-":
            print(text, end="", flush=True)
        else:
            write_text(Path(options.json), text, force=options.force)
    if options.json != "-":
        _show(checks, alone=alone)
    broken = [check.name for check in checks if check.verdict == "broken"]
    if broken:
        write_error_file(f"mics doctor: broken: {', '.join(broken)}; see its table above", earlier=1)
    return int(bool(broken))


def _show(checks: Sequence[Check], *, alone: bool) -> None:
    page = Page(Console(highlight=False))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, width=page.width)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=1)
    for check in checks:
        table.add_row(check.name, Text(check.verdict, style=_STYLES[check.verdict]), Text(check.found))
    page.console.print(table)
    bad = [check for check in checks if check.step]
    if bad:
        page.heading("Next")
        for check in bad:
            page.say(f"{check.name}: {check.step}")
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in _STYLES}
    told = [f"{counts['broken']} broken" if counts["broken"] else "", f"{counts['look at']} to look at"]
    page.heading(
        "Verdict: " + (", ".join(filter(None, told)) if counts["broken"] or counts["look at"] else "all is well")
    )
    if alone:
        page.lines("")
        page.say("This was one process of this machine. On all cards of it, or on all nodes (on each the same line):")
        page.lines(_EXAMPLES.partition("\n")[2].partition("\n")[2].rstrip())
    page.console.file.flush()


def _to_json(findings: Findings, checks: Sequence[Check]) -> str:
    told = dataclasses.asdict(findings)
    for name, places in (("links", "nodes"), ("inside", "ranks")):
        told[name] = [{places: list(pair), "bytes_per_second": rate} for pair, rate in told[name].items()]
    return json.dumps({"checks": [dataclasses.asdict(check) for check in checks], **told}, indent=2) + "\n"
