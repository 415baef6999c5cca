"""What a results file says: medians, ratios, and where each way to shard wins or loses.

Step times are medians over all measured steps of all rounds. Contenders of different cases belong together (in scaling
tables and curves) if they share name and label, so a label must not depend on the number of nodes.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_mics.bench.cluster import format_rate
from lightning_mics.bench.records import Case, Contender, Record, ResultsError, read_results
from lightning_mics.metrics import Hop, format_bytes, format_number

REFERENCE = "full-sharding"
OURS = "mics"
MARGIN = 0.05
LOSS_TOLERANCE = 1e-4
VERDICTS = ("loss", "draw", "win")
HOPS = ("compute", *(hop.value for hop in Hop), "other")


@dataclass(frozen=True)
class Spread:
    """A median, the quartiles around it, and the extremes."""

    minimum: float
    lower: float
    median: float
    upper: float
    maximum: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Returns the spread of at least one value."""
        lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
        return cls(min(values), lower, middle, upper, max(values))


@dataclass(frozen=True)
class Summary:
    """All rounds of one contender in one case.

    Attributes:
        case: The conditions.
        contender: What was measured.
        rounds: Number of rounds that were measured.
        step_seconds: Seconds of an optimizer step.
        samples: Samples of an optimizer step, from all ranks.
        sent_bytes: Median over nodes and rounds of the bytes that left a node in an optimizer step.
        minimum_bytes: Least bytes that have to leave a node in an optimizer step.
        ledger_bytes: Bytes that left a node by our ledger, where there is one.
        hop_seconds: Exposed seconds of an optimizer step by hop.
        hop_calls: Collectives of an optimizer step by hop, where there is a ledger.
        gradient_bytes: Most bytes of gradients that a rank held.
        process_bytes: Most that a process grew by.
        losses: Losses of the first round.
        loss_difference: Largest relative difference from the losses of the case's first contender.
    """

    case: Case
    contender: Contender
    rounds: int
    step_seconds: Spread
    samples: int
    sent_bytes: float | None
    minimum_bytes: float
    ledger_bytes: float | None
    hop_seconds: dict[str, float]
    hop_calls: dict[str, float]
    gradient_bytes: float
    process_bytes: float
    losses: list[float]
    loss_difference: float | None

    @property
    def throughput(self) -> float:
        """Samples a second."""
        return self.samples / self.step_seconds.median

    @property
    def of_minimum(self) -> float | None:
        """Bytes sent per byte that had to be."""
        return _ratio(self.sent_bytes, self.minimum_bytes)

    @property
    def of_ledger(self) -> float | None:
        """Bytes sent per byte in the ledger."""
        return _ratio(self.sent_bytes, self.ledger_bytes)

    @property
    def floor_seconds(self) -> float | None:
        """Seconds that a node's link needs for the least bytes, however well they overlap with compute."""
        return None if self.case.rate is None else self.minimum_bytes * 8 / self.case.rate

    @property
    def is_ours(self) -> bool:
        """Whether it is this package."""
        return self.contender.name == OURS


@dataclass(frozen=True)
class Failure:
    """Rounds of a contender that were not measured, for one reason."""

    case: Case
    contender: Contender
    status: str
    reason: str
    rounds: int


@dataclass(frozen=True)
class Finding:
    """One comparison in one case.

    Attributes:
        verdict: ``"win"``, ``"draw"`` or ``"loss"`` of ours.
        case: The conditions.
        ours: One of ours.
        other: What it is compared with: another way to shard, or for two-stage collectives the same with flat ones.
        times: Throughput of ours relative to the other's.
    """

    verdict: str
    case: Case
    ours: Contender
    other: Contender
    times: float


@dataclass(frozen=True)
class Grid:
    """A table that can be drawn on a terminal and in Markdown; rows with the same group are kept together."""

    header: list[str]
    rows: list[list[str]]
    groups: list[object]
    left: int = 1

    def to_rich(self, columns: Sequence[str] | None = None) -> Table:
        """Returns the table for a terminal, where what a group has in common is a line above its rows.

        Args:
            columns: Which columns to show beside those that name a row; all by default.
        """
        shown = [
            position
            for position, name in enumerate(self.header)
            if position == self.left - 1 or (position >= self.left and (columns is None or name in columns))
        ]
        table = Table()
        for position in shown:
            is_name = position < self.left
            table.add_column(self.header[position], justify="left" if is_name else "right", no_wrap=is_name)
        before: object = None
        for row, group, following in zip(self.rows, self.groups, [*self.groups[1:], None], strict=True):
            if self.left > 1 and group != before:
                table.add_row(f"[bold]{row[0]}[/]")
            table.add_row(*(row[position] for position in shown), end_section=group != following)
            before = group
        return table

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        rule = ["---" if position < self.left else "---:" for position in range(len(self.header))]
        lines = [self.header, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


# Aggregation.


def summarise(records: Iterable[Record]) -> list[Summary]:
    """Returns a summary of each contender in each case, experiment by experiment.

    Of several measurements of the same round the last one counts. Contenders without a measured round have no summary;
    :func:`failures` returns those.
    """
    latest = _latest(records)
    experiments = list(dict.fromkeys(record.case.experiment for record in latest))
    series = list(dict.fromkeys(_series(record.contender) for record in latest))
    groups: dict[tuple[Case, Contender], list[Record]] = {}
    for record in filter(_is_measured, latest):
        groups.setdefault((record.case, record.contender), []).append(record)
    order = sorted(
        groups,
        key=lambda pair: (experiments.index(pair[0].experiment), _case_order(pair[0]), series.index(_series(pair[1]))),
    )
    losses: dict[Case, list[float]] = {}
    for case, contender in order:
        losses.setdefault(case, groups[case, contender][0].losses)
    return [_summary(groups[pair], losses[pair[0]]) for pair in order]


def failures(records: Iterable[Record]) -> list[Failure]:
    """Returns what failed or was skipped and did not succeed later."""
    latest = _latest(records)
    # A package that was installed in between changes the stack, not who it is.
    measured = {(record.case, _series(record.contender)) for record in latest if _is_measured(record)}
    counts = Counter(
        (record.case, record.contender, *_problem(record))
        for record in latest
        if not _is_measured(record)
        and not (record.status == "skipped" and (record.case, _series(record.contender)) in measured)
    )
    return [Failure(*what, rounds=rounds) for what, rounds in counts.items()]


def _series(contender: Contender) -> tuple[str, str]:
    return contender.name, contender.label


def _latest(records: Iterable[Record]) -> list[Record]:
    return list({record.key(): record for record in records}.values())


def _is_measured(record: Record) -> bool:
    return record.status == "ok" and bool(record.step_seconds)


def _problem(record: Record) -> tuple[str, str]:
    if record.status == "ok":
        return "failed", "no step was measured"
    return record.status, " ".join((record.error or "no reason given").split())


def _case_order(case: Case) -> tuple[object, ...]:
    rate = math.inf if case.rate is None else case.rate
    return case.num_nodes, case.node_size, rate, case.accumulation, case.key()


def _summary(records: list[Record], reference_losses: list[float]) -> Summary:
    first = records[0]
    sent = [count for record in records for count in record.sent_bytes]
    ledger = [record.ledger_bytes for record in records if record.ledger_bytes is not None]
    differences = [_loss_difference(record.losses, reference_losses) for record in records]
    return Summary(
        case=first.case,
        contender=first.contender,
        rounds=len(records),
        step_seconds=Spread.of([seconds for record in records for seconds in record.step_seconds]),
        samples=first.samples,
        sent_bytes=statistics.median(sent) if sent else None,
        minimum_bytes=first.minimum_bytes,
        ledger_bytes=statistics.median(ledger) if ledger else None,
        hop_seconds=_medians(record.hop_seconds for record in records),
        hop_calls=_medians(record.ledger_calls or {} for record in records),
        gradient_bytes=max(record.gradient_bytes for record in records),
        process_bytes=max(record.process_bytes for record in records),
        losses=first.losses,
        loss_difference=max((entry for entry in differences if entry is not None), default=None),
    )


def _medians(tables: Iterable[dict[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for table in tables:
        for name, value in table.items():
            values.setdefault(name, []).append(value)
    return {name: statistics.median(entries) for name, entries in values.items()}


def _loss_difference(losses: list[float], reference: list[float]) -> float | None:
    """Returns the largest relative difference over the steps that both have; infinite if a loss is not finite."""
    pairs = list(zip(losses, reference, strict=False))
    if not pairs:
        return None
    if not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return math.inf
    return max(abs(loss - other) / (abs(other) or 1.0) for loss, other in pairs)


def by_case(summaries: Iterable[Summary]) -> dict[Case, list[Summary]]:
    """Returns the summaries of each case."""
    cases: dict[Case, list[Summary]] = {}
    for summary in summaries:
        cases.setdefault(summary.case, []).append(summary)
    return cases


def by_experiment(summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Returns the summaries of each experiment."""
    experiments: dict[str, list[Summary]] = {}
    for summary in summaries:
        experiments.setdefault(summary.case.experiment, []).append(summary)
    return experiments


def along(summaries: Iterable[Summary], axis: str) -> list[list[Summary]]:
    """Returns groups of summaries whose cases differ in one field only, in which they take several values."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        rest = {name: value for name, value in asdict(summary.case).items() if name != axis}
        groups.setdefault(repr(rest), []).append(summary)
    return [group for group in groups.values() if len({getattr(summary.case, axis) for summary in group}) > 1]


def reference_of(summaries: list[Summary]) -> Summary:
    """Returns what the others of a case are compared with: full sharding if it is there, else the first."""
    return next((summary for summary in summaries if summary.contender.name == REFERENCE), summaries[0])


def communication_share(summary: Summary) -> float | None:
    """Returns the part of a step in which rank 0 waits for collectives; ``None`` if they were not timed."""
    hops = [summary.hop_seconds[hop.value] for hop in Hop if hop.value in summary.hop_seconds]
    return _ratio(sum(hops), sum(summary.hop_seconds.values())) if hops else None


def efficiency(summaries: Iterable[Summary]) -> dict[str, dict[int, float]]:
    """Returns weak scaling of cases that differ in the number of nodes.

    Returns:
        For each contender's label, and each number of nodes: throughput per node relative to that on the smallest
        number of nodes on which the contender was measured.
    """
    curves: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        curves.setdefault(_series(summary.contender), []).append(summary)
    result: dict[str, dict[int, float]] = {}
    for (_, label), curve in curves.items():
        per_node = {summary.case.num_nodes: summary.throughput / summary.case.num_nodes for summary in curve}
        result[label] = {nodes: value / per_node[min(per_node)] for nodes, value in sorted(per_node.items())}
    return result


# Conditions in words.


def _nodes(case: Case) -> str:
    return f"{_count(case.num_nodes, 'node')} x {_count(case.node_size, 'rank')}"


def _rate(case: Case) -> str:
    return "links not limited" if case.rate is None else f"{format_rate(case.rate)} a node"


def _compute(case: Case) -> str:
    forward, backward = (format_number(seconds * 1e3) for seconds in case.compute)
    if not any(case.compute):
        return "real compute only"
    return f"emulated compute of {forward} ms forward and {backward} ms backward a block and microstep"


def _model(case: Case) -> str:
    details = [f"{case.model[name]} {word}" for name, word in (("num_layers", "layers"),) if name in case.model]
    details += [f"width {case.model['width']}"] if "width" in case.model else []
    if "num_parameters" in case.model:
        details.append(f"{format_number(case.model['num_parameters'] / 1e6)} M parameters")
    name = str(case.model.get("name", "unnamed model"))
    return f"{name} ({', '.join(details)})" if details else name


_FACTS: dict[str, Callable[[Case], str]] = {
    "nodes": _nodes,
    "rate": _rate,
    "accumulation": lambda case: f"{_count(case.accumulation, 'microstep')} a step",
    "compute": _compute,
    "model": _model,
    "microbatch": lambda case: f"{_count(case.microbatch_size, 'sample')} a rank and microstep",
    "blocks": lambda case: f"{_count(case.num_blocks, 'block')}",
}
_PLACE = ("nodes", "rate", "accumulation")


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


def _is_shared(fact: str, cases: Iterable[Case]) -> bool:
    return len({_FACTS[fact](case) for case in cases}) <= 1


def shared_conditions(cases: Iterable[Case], *, short: bool = False) -> str:
    """Returns in words what all cases have in common; if ``short``, only what matters most."""
    cases = list(cases)
    facts = [name for name in (_PLACE if short else _FACTS) if _is_shared(name, cases)]
    words = [_FACTS[name](cases[0]) for name in facts]
    if short and _is_shared("compute", cases):
        words.append("emulated compute" if any(cases[0].compute) else "real compute")
    return ", ".join(words)


def own_conditions(case: Case, cases: Iterable[Case]) -> str:
    """Returns in words how a case differs from the others; nothing, if it does not."""
    cases = list(cases)
    return ", ".join(fact(case) for name, fact in _FACTS.items() if not _is_shared(name, cases))


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


# Tables.


def _grid(summaries: list[Summary], header: list[str], cells: Callable[[Summary], list[str]]) -> Grid:
    """Returns a table with a row for each summary, that begins with how its case differs and the contender."""
    cases = list(by_case(summaries))
    begin = [["case"] * (len(cases) > 1), ["contender"]]
    rows = [
        [*[own_conditions(summary.case, cases)] * (len(cases) > 1), summary.contender.label, *cells(summary)]
        for summary in summaries
    ]
    left = sum(map(len, begin))
    return Grid([*begin[0], *begin[1], *header], rows, [summary.case for summary in summaries], left)


def comparison_grid(summaries: list[Summary]) -> Grid:
    """Returns the table of contenders, with their throughput relative to the reference of their case."""
    references = {case: reference_of(group) for case, group in by_case(summaries).items()}
    labels = list(dict.fromkeys(reference.contender.label for reference in references.values()))

    def cells(summary: Summary) -> list[str]:
        lower, median, upper = map(
            format_number, (summary.step_seconds.lower, summary.step_seconds.median, summary.step_seconds.upper)
        )
        return [
            median,
            f"{lower}-{upper}",
            format_number(summary.throughput),
            f"{summary.throughput / references[summary.case].throughput:.2f}",
            _or_dash(summary.sent_bytes, format_bytes),
            _or_dash(summary.of_minimum, "{:.2f}".format),
            _or_dash(summary.of_ledger, "{:.3f}".format),
            _or_dash(summary.floor_seconds, format_number),
            _or_dash(communication_share(summary), "{:.0%}".format),
            format_bytes(summary.gradient_bytes),
            format_bytes(summary.process_bytes),
        ]

    header = ["step s", "quartiles", "samples/s", f"x of {labels[0] if len(labels) == 1 else 'the first'}"]
    header += ["out of a node", "sent / minimum", "sent / ledger", "floor s", "waits", "gradients", "process memory"]
    return _grid(summaries, header, cells)


def comparison_tables(summaries: list[Summary]) -> list[Table]:
    """Returns the table of contenders in parts that fit into a narrow terminal: times, bytes, memory."""
    grid = comparison_grid(summaries)
    header = grid.header[grid.left :]
    return [grid.to_rich(header[:4]), grid.to_rich(header[4:9]), grid.to_rich(header[9:])]


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
    return Grid(["contender", *(_count(count, "node") for count in nodes)], rows, [None] * len(rows))


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
    rows: dict[tuple[str, str], set[int]] = {}
    stages: dict[tuple[str, str], set[str]] = {}
    for contender in (summary.contender for summary in summaries):
        rows.setdefault((contender.label, contender.stack), set()).add(contender.shard_size)
        stages.setdefault((contender.label, contender.stack), set()).add("two" if contender.hierarchical else "one")
    cells = [
        [*what, ", ".join(map(str, sorted(sizes))), " or ".join(sorted(stages[what]))] for what, sizes in rows.items()
    ]
    return Grid(["contender", "runs on", "shard size", "stages of a collective"], cells, [None] * len(cells), left=2)


# Findings.


def headlines(summaries: Iterable[Summary]) -> list[str]:
    """Returns for each case a sentence on our fastest contender and the reference."""
    sentences = []
    for case, group in by_case(summaries).items():
        ours = [summary for summary in group if summary.is_ours]
        reference = reference_of(group)
        if not ours or reference.is_ours:
            continue
        best = max(ours, key=lambda summary: summary.throughput)
        times = best.throughput / reference.throughput
        sentence = f"{best.contender.label} has {times:.2f} times the throughput of {reference.contender.label}"
        share = _ratio(best.sent_bytes, reference.sent_bytes) if reference.minimum_bytes else None
        if share is not None:
            sentence += f" and sends {share:.1%} of its bytes out of a node"
        sentences.append(f"{sentence} ({shared_conditions([case], short=True)}).")
    return sentences


def wins_and_losses(summaries: Iterable[Summary]) -> list[Finding]:
    """Returns how each of ours compares with everything else, and two-stage collectives with flat ones.

    A difference of up to 5 % is a draw.
    """
    return [
        _finding(ours, other)
        for group in by_case(summaries).values()
        for other in group
        for ours in group
        if ours.is_ours and (not other.is_ours or _is_flat_of(ours.contender, other.contender))
    ]


def _is_flat_of(staged: Contender, flat: Contender) -> bool:
    return staged.hierarchical and not flat.hierarchical and flat.shard_size == staged.shard_size


def _finding(ours: Summary, other: Summary) -> Finding:
    times = ours.throughput / other.throughput
    return Finding(_verdict(times), ours.case, ours.contender, other.contender, times)


def _verdict(times: float) -> str:
    if times > 1 + MARGIN:
        return "win"
    return "loss" if times < 1 - MARGIN else "draw"


# The report.


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
        for line in [*headlines(group), *_verdict_lines(group), *_failure_lines(name, failed)]:
            console.print(f"- {line}", markup=False)


def write_report(results: Sequence[Path], out: Path) -> list[Path]:
    """Writes ``benchmarks.md`` and its figures into a folder, which is made if it is missing.

    Returns:
        What was written, the Markdown first.

    Raises:
        ResultsError: If the results are damaged or empty.
        MiCSError: If matplotlib is not installed.
    """
    from lightning_mics.bench.figures import draw
    from lightning_mics.bench.style import require_matplotlib

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
        parts += _list("Failed or skipped", _failure_lines(name, failed))
    page = out / "benchmarks.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [page, *files]


def _read(results: Path) -> list[Record]:
    records = read_results(results)
    if not records:
        raise ResultsError(f"{results}: there is no measurement in it. Run the benchmarks first.")
    return _latest(records)


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
    sentences = headlines(group)
    parts += ["In short:", *_list("", sentences)] if sentences else []
    parts += [comparison_grid(group).to_markdown()]
    for scaling in along(group, "num_nodes"):
        parts += ["### Weak scaling", "Throughput per node, relative to the contender's smallest number of nodes."]
        parts += [efficiency_grid(scaling).to_markdown()]
    parts += [f"![{_caption(path)}]({path.name})" for path in figures]
    parts += _list("Where ours is slower, as fast and faster", _verdict_lines(group))
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


_VERDICT_WORDS = {"loss": "Slower than", "draw": "About as fast as", "win": "Faster than"}


def _verdict_lines(group: list[Summary]) -> list[str]:
    """Returns a line for each verdict on ours against each other contender, losses first."""
    cases = list(by_case(group))
    lines: dict[tuple[str, str], dict[str, list[str]]] = {}
    findings = wins_and_losses(group)
    for finding in sorted(findings, key=lambda entry: VERDICTS.index(entry.verdict)):
        place = own_conditions(finding.case, cases)
        entry = f"{finding.times:.2f}{f' ({place})' if place else ''}"
        entries = lines.setdefault((finding.verdict, _opponent(finding)), {})
        entries.setdefault(finding.ours.label, []).append(entry)
    return [
        f"{_VERDICT_WORDS[verdict]} {opponent}, in times its throughput: "
        + "; ".join(f"{label} {', '.join(entries)}" for label, entries in ours.items())
        for (verdict, opponent), ours in lines.items()
    ]


def _opponent(finding: Finding) -> str:
    label = finding.other.label
    return f"flat collectives, {label}" if finding.other.name == OURS else label


def _failure_lines(experiment: str, failed: list[Failure]) -> list[str]:
    return [
        f"{failure.contender.label} {failure.status} in {_count(failure.rounds, 'round')} "
        f"({shared_conditions([failure.case], short=True)}): {failure.reason}"
        for failure in failed
        if failure.case.experiment == experiment
    ]
