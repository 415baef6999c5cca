"""How answers of the planner look in a terminal: headings, wrapped sentences, tables, and numbers with their units."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mics.text import format_number

_WIDEST = 100


class Page:
    """Prints onto a console, in lines no wider than people like to read (``width``)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = min(console.width, _WIDEST)

    def lines(self, text: str, style: str = "") -> None:
        """Prints lines as they are, also those that are too long."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def heading(self, text: str) -> None:
        """Prints a heading below an empty line."""
        self.lines(f"\n{text}", style="bold")

    def say(self, text: str) -> None:
        """Prints sentences."""
        self.lines(textwrap.fill(text, self.width))

    def table(
        self, names: Iterable[str], rows: Iterable[Sequence[str]], *, words: int = 1, gap: int = 2, bold: int = -1
    ) -> None:
        """Prints a table whose first columns hold ``words``, the others numbers; the row at ``bold`` stands out."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False)
        names = list(names)
        lines = max(name.count("\n") for name in names)
        for place, name in enumerate(names):
            is_word, above = place < words, "\n" * (lines - name.count("\n"))
            table.add_column(above + name, justify="left" if is_word else "right", no_wrap=not is_word)
        for place, row in enumerate(rows):
            table.add_row(*row, style="bold" if place == bold else "")
        self.console.print(table)


def format_count(number: int, noun: str) -> str:
    """Returns a number of things, for example ``'2 nodes'``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_rate(bytes_per_second: float) -> str:
    """Returns a rate, for example ``'12.5 GB/s'``."""
    return f"{format_number(bytes_per_second / 1e9)} GB/s"


def format_duration(seconds: float) -> str:
    """Returns seconds as people read them, for example ``'574 ms'``."""
    return f"{format_number(seconds * 1e3)} ms" if seconds < 1 else f"{format_number(seconds)} s"


def format_short(value: float) -> str:
    """Returns a number with three digits and k, M, B or T."""
    for unit in ("", "k", "M", "B"):
        if abs(value) < 999.5:
            return f"{value:.3g}{' ' * bool(unit)}{unit}"
        value /= 1000
    return f"{value:.3g} T"
