"""The report on results files: on a terminal, and as a page with figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_mics.bench.conditions import shared_conditions
from lightning_mics.bench.figures import draw
from lightning_mics.bench.findings import MARGIN, failure_lines, headlines, limit_lines, verdict_lines
from lightning_mics.bench.records import Record, ResultsError, read_results
from lightning_mics.bench.style import require_matplotlib
from lightning_mics.bench.summary import Summary, along, by_case, by_experiment, failures, latest, summarise
from lightning_mics.bench.tables import (
    comparison_grid,
    comparison_tables,
    contender_grid,
    efficiency_grid,
    hop_grid,
    loss_grid,
    loss_line,
)


def print_report(results: Path, console: Console) -> None:
    """Prints tables and findings of a results file.

    Raises:
        ResultsError: If the file is damaged or holds nothing.
    """
    records = _read(results)
    failed = failures(records)
    summaries = summarise(records)
    for name in _experiments(records):
        group = by_experiment(summaries).get(name, [])
        console.rule(f"[bold]{name}[/]")
        if group:
            console.print(shared_conditions(by_case(group)), markup=False)
            for table in comparison_tables(group):
                console.print(table)
            console.print(loss_line(group), markup=False)
        for scaling in along(group, "num_nodes"):
            console.print("Weak scaling: throughput per node, relative to the smallest number of nodes")
            console.print(efficiency_grid(scaling).to_rich())
        for line in [*headlines(group), *limit_lines(group), *verdict_lines(group), *failure_lines(name, failed)]:
            console.print(f"- {line}", markup=False)


def write_report(results: Sequence[Path], out: Path) -> list[Path]:
    """Writes ``benchmarks.md`` and its figures into a folder, which is made if it is missing.

    Returns:
        What was written, the Markdown first.

    Raises:
        ResultsError: If the results are damaged or empty.
        MiCSError: If matplotlib is not installed.
    """
    require_matplotlib("Figures need matplotlib, which is not installed: pip install 'lightning-mics[bench]'")
    records = [record for path in results for record in _read(path)]
    summaries, failed = summarise(records), failures(records)
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    parts = ["# Benchmarks", _preamble()]
    for name in _experiments(records):
        group = by_experiment(summaries).get(name, [])
        figures = draw(group, out, slug(name))
        files += figures
        runs = [record for record in records if record.case.experiment == name]
        parts += [f"## {name}", *_section(group, runs, [path for path in figures if path.suffix == ".svg"])]
        parts += _list("Failed or skipped", failure_lines(name, failed))
    page = out / "benchmarks.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [page, *files]


def _read(results: Path) -> list[Record]:
    records = read_results(results)
    if not records:
        raise ResultsError(f"{results}: there is no measurement in it. Run the benchmarks first.")
    return latest(records)


def slug(name: str) -> str:
    """Returns a name that is good for files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "experiment"


def _experiments(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(record.case.experiment for record in records))


def _preamble() -> str:
    return (
        "Times are medians over all measured optimizer steps of all rounds, with quartiles. *Out of a node* is what "
        "the kernel counted on a node's link in an optimizer step, headers included; *minimum* is the least that the "
        "algorithm has to send by its formula, *ledger* what lightning-mics counted itself, and *floor* the time that "
        "the link needs for the minimum. *Waits* is the part of a step in which rank 0 waits for collectives. "
        f"Differences of up to {MARGIN:.0%} count as draws."
    )


def _section(group: list[Summary], records: list[Record], figures: list[Path]) -> list[str]:
    """Returns the paragraphs of an experiment."""
    facts = [*([f"Conditions: {shared_conditions(by_case(group))}."] if group else []), *_environments(records)]
    parts = ["\n".join(f"- {fact}" for fact in facts)]
    if not group:
        return [*parts, "Nothing could be measured."]
    sentences = [*headlines(group), *limit_lines(group)]
    parts += ["In short:", *_list("", sentences)] if sentences else []
    parts += [comparison_grid(group).to_markdown()]
    for scaling in along(group, "num_nodes"):
        parts += ["### Weak scaling", "Throughput per node, relative to the contender's smallest number of nodes."]
        parts += [efficiency_grid(scaling).to_markdown()]
    parts += [f"![{_caption(path)}]({path.name})" for path in figures]
    parts += _list("Where ours is slower, as fast and faster", verdict_lines(group))
    parts += ["### Where the time goes", "Exposed seconds of an optimizer step.", hop_grid(group).to_markdown()]
    parts += ["### Training losses", loss_grid(group).to_markdown()]
    return [*parts, "### Contenders", contender_grid(group).to_markdown()]


def _caption(path: Path) -> str:
    return " ".join(dict.fromkeys(path.stem.split("-")))


def _list(title: str, lines: list[str]) -> list[str]:
    heading = [f"### {title}"] if title else []
    return [*heading, "\n".join(f"- {line}" for line in lines)] if lines else []


def _environments(records: list[Record]) -> list[str]:
    """Returns a sentence for each combination of machine and versions, with the dates of its runs."""
    days: dict[str, set[str]] = {}
    for run in (record.run for record in records):
        versions = run.get("versions") or {}
        words = [f"{run['num_cpus']} CPUs"] if "num_cpus" in run else []
        words += [f"kernel {run['kernel']}"] if "kernel" in run else []
        words += [f"Python {run['python']}"] if "python" in run else []
        words += [f"{name} {version}" for name, version in versions.items() if version]
        days.setdefault(", ".join(words), set()).add(str(run.get("date", "an unknown day"))[:10])
    return [f"Measured on {', '.join(sorted(dates))} with {words}." for words, dates in days.items() if words]
