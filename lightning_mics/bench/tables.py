"""The tables of a report, for a terminal and for Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_mics.bench.conditions import counted, own_conditions
from lightning_mics.bench.summary import HOPS, Summary, by_case, communication_share, efficiency, grouped, reference_of
from lightning_mics.text import format_bytes, format_number

LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Grid:
    """A table that can be drawn on a terminal and in Markdown; rows with the same group are kept together."""

    header: list[str]
    rows: list[list[str]]
    groups: list[object]
    left: int = 1

    def to_rich(self, columns: Sequence[str] | None = None) -> Group:
        """Returns the table for a terminal, where what a group has in common stands above a table of its own.

        Args:
            columns: Which columns to show beside those that name a row; all by default.
        """
        shown = [
            position
            for position, name in enumerate(self.header)
            if position == self.left - 1 or (position >= self.left and (columns is None or name in columns))
        ]
        widths = {position: max(len(row[position]) for row in self.rows) for position in shown}
        tables: list[RenderableType] = []
        for _, rows in itertools.groupby(zip(self.groups, self.rows, strict=True), key=lambda pair: pair[0]):
            table = Table()
            for position in shown:
                is_name = position < self.left
                justify: Literal["left", "right"] = "left" if is_name else "right"
                table.add_column(self.header[position], justify=justify, no_wrap=is_name, min_width=widths[position])
            for _, row in rows:
                table.add_row(*(row[position] for position in shown))
            if self.left > 1:
                tables.append(Text(row[0], style="bold"))
            tables.append(table)
        return Group(*tables)

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        rule = ["---" if position < self.left else "---:" for position in range(len(self.header))]
        lines = [self.header, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _grid(summaries: list[Summary], header: list[str], cells: Callable[[Summary], list[str]]) -> Grid:
    """Returns a table with a row for each summary, that begins with how its case differs and the contender."""
    cases = list(by_case(summaries))
    groups: list[object] = [summary.case for summary in summaries]
    rows = [[summary.contender.label, *cells(summary)] for summary in summaries]
    if len(cases) == 1:
        return Grid(["contender", *header], rows, groups)
    rows = [[own_conditions(summary.case, cases), *row] for summary, row in zip(summaries, rows, strict=True)]
    return Grid(["case", "contender", *header], rows, groups, left=2)


def comparison_grid(summaries: list[Summary]) -> Grid:
    """Returns the table of contenders, with their throughput relative to the reference of their case."""
    references = {case: reference_of(group) for case, group in by_case(summaries).items()}
    labels = list(dict.fromkeys(reference.contender.label for reference in references.values()))

    def cells(summary: Summary) -> list[str]:
        spread = summary.step_seconds
        return [
            format_number(spread.median),
            f"{format_number(spread.lower)}-{format_number(spread.upper)}",
            format_number(summary.throughput),
            f"{summary.throughput / references[summary.case].throughput:.2f}",
            _or_dash(summary.sent_bytes, format_bytes),
            _or_dash(summary.of_minimum, "{:.2f}".format),
            _or_dash(summary.of_ledger, "{:.3f}".format),
            _or_dash(summary.floor_seconds, format_number),
            _or_dash(communication_share(summary), "{:.0%}".format),
            format_bytes(summary.gradient_bytes),
            _or_dash(summary.model_bytes, format_bytes) + ("" if summary.competes else "*"),
            format_bytes(summary.process_bytes),
        ]

    header = ["step s", "quartiles", "samples/s", f"x of {labels[0] if len(labels) == 1 else 'the first'}"]
    header += ["out of a node", "sent / minimum", "sent / ledger", "floor s", "waits", "gradients", "model states"]
    header.append("device memory" if all(summary.case.hardware for summary in summaries) else "process memory")
    return _grid(summaries, header, cells)


def comparison_tables(summaries: list[Summary]) -> list[Group]:
    """Returns the table of contenders in parts that fit into a narrow terminal: times, bytes, the rest."""
    grid = comparison_grid(summaries)
    header = grid.header[grid.left :]
    return [grid.to_rich(header[:4]), grid.to_rich(header[4:8]), grid.to_rich(header[8:])]


def loss_line(summaries: list[Summary]) -> str:
    """Says whether all contenders of each case trained alike."""
    apart = [s for s in summaries if s.loss_difference is not None and s.loss_difference > LOSS_TOLERANCE]
    if not apart:
        return f"Training losses of all contenders are equal within {LOSS_TOLERANCE:g}."
    differing = ", ".join(f"{s.contender.label} ({s.loss_difference:.1e})" for s in apart)
    return f"TRAINING LOSSES DIFFER from the first contender's: {differing}. Their speeds cannot be compared."


def efficiency_grid(summaries: list[Summary]) -> Grid:
    """Returns weak scaling: a row for each contender and a column for each number of nodes."""
    curves = efficiency(summaries)
    nodes = sorted({summary.case.num_nodes for summary in summaries})
    rows = [
        [label, *(_or_dash(curve.get(count), "{:.1%}".format) for count in nodes)] for label, curve in curves.items()
    ]
    return Grid(["contender", *(counted(count, "node") for count in nodes)], rows, [None] * len(rows))


def hop_grid(summaries: list[Summary]) -> Grid:
    """Returns exposed seconds by hop, and collectives where they were counted."""

    def cell(summary: Summary, hop: str) -> str:
        calls = summary.hop_calls.get(hop)
        seconds = _or_dash(summary.hop_seconds.get(hop), format_number)
        return seconds if calls is None else f"{seconds} ({format_number(calls)} calls)"

    return _grid(summaries, [f"{hop} s" for hop in HOPS], lambda summary: [cell(summary, hop) for hop in HOPS])


def loss_grid(summaries: list[Summary]) -> Grid:
    """Returns whether contenders train to the same losses as the first one of their case."""

    def cells(summary: Summary) -> list[str]:
        ends = [f"{loss:.5f}" for loss in (summary.losses[0], summary.losses[-1])] if summary.losses else ["-", "-"]
        difference = summary.loss_difference
        equal = "-" if difference is None else "yes" if difference <= LOSS_TOLERANCE else "no"
        return [*ends, _or_dash(difference, "{:.1e}".format), equal]

    header = ["first loss", "last loss", "largest relative difference", f"equal within {LOSS_TOLERANCE:g}"]
    return _grid(summaries, header, cells)


def contender_grid(summaries: list[Summary]) -> Grid:
    """Returns what each contender runs on and how it shards."""
    rows = []
    for (label, stack), group in grouped(
        (summary.contender for summary in summaries), lambda contender: (contender.label, contender.stack)
    ).items():
        sizes = sorted({contender.shard_size for contender in group})
        stages = sorted({"two" if contender.hierarchical else "one" for contender in group})
        rows.append([label, stack, ", ".join(map(str, sizes)), " or ".join(stages)])
    return Grid(["contender", "runs on", "shard size", "stages of a collective"], rows, [None] * len(rows), left=2)
