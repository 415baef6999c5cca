"""``mics plan --list``: the models and the hardware that have names."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Console

from lightning_mics.cli.plan.page import Page, format_rate
from lightning_mics.plan.hardware import find_instance, known_names
from lightning_mics.text import format_bytes
from lightning_mics.trace.models import known_models


def print_known() -> None:
    """Prints all names."""
    page = Page(Console(highlight=False))
    _print_names("Models (--model)", known_models(), page)
    _print_instances(page)
    for section in ("accelerators", "fabrics", "networks", "hosts"):
        _print_names(f"{section.capitalize()}, for a file (--cluster)", known_names(section), page)


def _print_names(title: str, names: Iterable[str], page: Page) -> None:
    page.lines(title, style="bold")
    indent = "  "
    text = ", ".join(names)
    text = textwrap.fill(text, page.width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    page.lines(f"{text}\n")


def _print_instances(page: Page) -> None:
    page.lines("Instances (--instance)", style="bold")
    nodes = [find_instance(name, 1).node for name in known_names("instances")]
    rows = [
        (
            node.name,
            f"{node.num_accelerators} x {node.accelerator.name}",
            format_bytes(node.accelerator.memory),
            format_rate(node.intra.bandwidth),
            format_rate(node.inter.bandwidth),
        )
        for node in nodes
    ]
    page.table(
        ["instance", "accelerators", "memory\nof each", "inside, of\na rank", "between,\nof a node"], rows, words=2
    )
    page.console.print()
