"""Figures of the benchmarks. A figure is drawn only where there is more than one point on its axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mics.bench.conditions import shared_conditions
from lightning_mics.bench.spec import format_rate
from lightning_mics.bench.style import COLOURS, LEGEND_BELOW, OTHER_CURVE, OUR_COLOURS, OUR_CURVE, STYLE, save, start
from lightning_mics.bench.summary import HOPS, OURS, Spread, Summary, along, by_case, reference_of
from lightning_mics.text import format_bytes, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPARE_COLOURS = ("#882255", "#117733", "#444444")
_HOP_COLOURS = ("#bdbdbd", "#08519c", "#56a0d8", "#e69f00", "#e8e8e8")
_MARKERS = "osD^vPX*<>"


def draw(summaries: list[Summary], out: Path, prefix: str) -> list[Path]:
    """Draws all figures that the summaries of one experiment have points for; returns their PNG and SVG files."""
    import matplotlib

    files: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(summaries):
            files += [save(figure, out / f"{prefix}-{name}{suffix}") for suffix in (".png", ".svg")]
    return files


def _figures(summaries: list[Summary]) -> Iterator[tuple[str, Figure]]:
    """Yields the figures and their names: curves where the cases differ in one field, else bars of the largest case."""
    colours = _colours(summaries)
    curves: tuple[tuple[str, str, Callable[..., Figure]], ...] = (
        ("scaling", "num_nodes", _scaling),
        ("accumulation", "accumulation", _accumulation),
        ("rate", "rate", _speed_up),
    )
    drawn = False
    for name, axis, figure in curves:
        groups = along((summary for summary in summaries if getattr(summary.case, axis) is not None), axis)
        drawn = drawn or bool(groups)
        for number, group in enumerate(groups, start=1):
            yield name if len(groups) == 1 else f"{name}-{number}", figure(group, colours)
    if not drawn:
        yield from _bars(_main_case(summaries), colours)


def _bars(group: list[Summary], colours: dict[str, str]) -> Iterator[tuple[str, Figure]]:
    if len(group) < 2:
        return
    yield "step-time", _step_time(group, colours)
    if any(summary.minimum_bytes for summary in group) and any(summary.sent_bytes for summary in group):
        yield "bytes", _bytes(group, colours)
    if any(summary.hop_seconds for summary in group):
        yield "hops", _hops(group)
    if len({summary.contender.shard_size for summary in group if summary.is_ours}) > 1:
        yield "shard-size", _shard_sizes(group)


def _main_case(summaries: list[Summary]) -> list[Summary]:
    """Returns the case with most contenders; of several, the one on most nodes."""
    cases = list(by_case(summaries).values())
    return max(cases, key=lambda group: (len(group), group[0].case.num_nodes), default=[])


def _colours(summaries: list[Summary]) -> dict[str, str]:
    """Returns a colour for each label."""
    colours: dict[str, str] = {}
    ours, spare = iter(OUR_COLOURS * 9), iter(_SPARE_COLOURS * 9)
    used = set()
    for contender in (summary.contender for summary in summaries):
        if contender.label in colours:
            continue
        colour = next(ours) if contender.name == OURS else COLOURS.get(contender.name)
        if colour is None or (contender.name != OURS and colour in used):
            colour = next(spare)
        colours[contender.label] = colour
        used.add(colour)
    return colours


def _start(title: str, group: list[Summary], height: float, width: float = 8.0) -> tuple[Figure, Axes]:
    """Returns an empty figure with its title, and the conditions that all of the group share below it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, start(figure, height, title, shared_conditions(by_case(group), short=True))


# Bars.


def _start_bars(title: str, group: list[Summary], extra: float = 0.0) -> tuple[Figure, Axes]:
    figure, axes = _start(title, group, 1.5 + 0.36 * len(group) + extra)
    axes.set_yticks(range(len(group)), [summary.contender.label for summary in group])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    for label, summary in zip(axes.get_yticklabels(), group, strict=True):
        label.set_fontweight("bold" if summary.is_ours else "normal")
    return figure, axes


def _write_values(axes: Axes, ends: list[float], texts: list[str]) -> None:
    """Writes a text to the right of each bar, and makes room for it."""
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, max(ends) * 1.16 or 1)


def _quartiles(spreads: list[Spread]) -> list[list[float]]:
    """Returns how far the quartiles are from the medians, below and above."""
    return [[each.median - each.lower for each in spreads], [each.upper - each.median for each in spreads]]


def _step_time(group: list[Summary], colours: dict[str, str]) -> Figure:
    figure, axes = _start_bars("Time of an optimizer step", group)
    spreads = [summary.step_seconds for summary in group]
    medians = [spread.median for spread in spreads]
    fill = [colours[summary.contender.label] for summary in group]
    style = {"ecolor": "#222222", "capsize": 3, "elinewidth": 1.2}
    axes.barh(range(len(group)), medians, 0.68, xerr=_quartiles(spreads), color=fill, error_kw=style)
    _write_values(axes, [spread.upper for spread in spreads], [f"{format_number(value)} s" for value in medians])
    axes.set_xlabel("seconds; median, with quartiles")
    return figure


def _bytes(group: list[Summary], colours: dict[str, str]) -> Figure:
    figure, axes = _start_bars("Bytes that leave a node in an optimizer step", group, extra=0.25)
    sent = [summary.sent_bytes or 0.0 for summary in group]
    least = [summary.minimum_bytes for summary in group]
    unit = next(size for size in (2**30, 2**20, 2**10, 1) if max(*sent, *least) >= size or size == 1)
    scaled, marks = [value / unit for value in sent], [value / unit for value in least]
    axes.barh(range(len(group)), scaled, 0.68, color=[colours[summary.contender.label] for summary in group])
    for colour, width, size in (("white", 4.5, 300), ("black", 2.0, 260)):
        line = axes.scatter(
            marks, range(len(group)), s=size, c=colour, marker="|", linewidths=width, zorder=3, clip_on=False
        )
    texts = ["-" if summary.sent_bytes is None else format_bytes(summary.sent_bytes) for summary in group]
    _write_values(axes, [max(pair) for pair in zip(scaled, marks, strict=True)], texts)
    axes.set_xlabel(f"{ {2**30: 'GiB', 2**20: 'MiB', 2**10: 'KiB', 1: 'B'}[unit] }, median over nodes and rounds")
    figure.legend([line], ["least that the algorithm has to send"], loc="outside lower right", markerscale=0.6)
    return figure


def _hops(group: list[Summary]) -> Figure:
    figure, axes = _start_bars("Where the time of a step goes, on rank 0", group, extra=0.35)
    left = [0.0] * len(group)
    for hop, colour in zip(HOPS, _HOP_COLOURS, strict=True):
        seconds = [summary.hop_seconds.get(hop, 0.0) for summary in group]
        if not any(seconds):
            continue
        edge: dict[str, Any] = {"edgecolor": "#9a9a9a", "hatch": "////", "linewidth": 0} if hop == "other" else {}
        name = {"compute": "compute (emulated)", "other": "other, not told apart"}.get(hop, hop)
        axes.barh(range(len(group)), seconds, 0.68, left=left, color=colour, label=name, **edge)
        left = [begin + more for begin, more in zip(left, seconds, strict=True)]
    _write_values(axes, left, [f"{format_number(value)} s" for value in left])
    axes.set_xlabel("exposed seconds of an optimizer step")
    figure.legend(ncols=len(HOPS), **LEGEND_BELOW)
    return figure


# Curves.


def _curves(
    axes: Axes, group: list[Summary], axis: str, value: Callable[[Summary], float], colours: dict[str, str]
) -> None:
    """Draws a curve for each label."""
    labels = list(dict.fromkeys(summary.contender.label for summary in group))
    for label, marker in zip(labels, _MARKERS * 9, strict=False):
        chosen = [summary for summary in group if summary.contender.label == label]
        points = sorted((getattr(summary.case, axis), value(summary)) for summary in chosen)
        style = OUR_CURVE if chosen[0].is_ours else OTHER_CURVE
        axes.plot(*zip(*points, strict=True), marker=marker, color=colours[label], label=label, **style)
    axes.grid()


def _finish(figure: Figure, axes: Axes, x: str, y: str) -> Figure:
    """Names the axes, of which the upright one begins at zero, and adds the legend."""
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc="outside right upper", handlelength=3)
    return figure


def _ticks(axes: Axes, values: set[Any], names: Callable[[Any], str] = str) -> None:
    """Puts ticks at the measured values, on a logarithmic axis."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), [names(value) for value in sorted(values)])
    axes.minorticks_off()


def _scaling(group: list[Summary], colours: dict[str, str]) -> Figure:
    figure, axes = _start("Throughput against nodes", group, 4.4, 9.0)
    _curves(axes, group, "num_nodes", lambda summary: summary.throughput, colours)
    nodes = sorted({summary.case.num_nodes for summary in group})
    best = max(summary.throughput for summary in group if summary.case.num_nodes == nodes[0])
    line = [best * count / nodes[0] for count in nodes]
    axes.plot(nodes, line, color="#999999", ls=":", lw=1.6, label="linear, from the fastest", zorder=1)
    axes.set_xticks(nodes)
    return _finish(figure, axes, "nodes", "samples a second")


def _accumulation(group: list[Summary], colours: dict[str, str]) -> Figure:
    figure, axes = _start("Time of an optimizer step against accumulation", group, 4.4, 9.0)
    _curves(axes, group, "accumulation", lambda summary: summary.step_seconds.median, colours)
    axes.set_xticks(sorted({summary.case.accumulation for summary in group}))
    return _finish(figure, axes, "microsteps of an optimizer step", "seconds, median")


def _speed_up(group: list[Summary], colours: dict[str, str]) -> Figure:
    references = {case: reference_of(entries) for case, entries in by_case(group).items()}
    label = next(iter(references.values())).contender.label
    figure, axes = _start(f"Throughput relative to {label}", group, 4.4, 9.0)
    others = [summary for summary in group if references[summary.case] is not summary]
    _curves(axes, others, "rate", lambda entry: entry.throughput / references[entry.case].throughput, colours)
    axes.axhline(1, color="#555555", lw=1.2, ls=":", label=label)
    _ticks(axes, {summary.case.rate for summary in group}, format_rate)
    return _finish(figure, axes, "rate of a node's link", "times the throughput")


def _shard_sizes(group: list[Summary]) -> Figure:
    figure, axes = _start("Time of an optimizer step against shard size", group, 4.0)
    ours = [summary for summary in group if summary.is_ours]
    kinds = (("flat collectives", False, OUR_COLOURS[1], "s"), ("two-stage collectives", True, OUR_COLOURS[2], "o"))
    for name, hierarchical, colour, marker in kinds:
        # A group inside a node has no second stage: it is a point of both curves.
        chosen = [
            summary
            for summary in ours
            if summary.contender.hierarchical is hierarchical or summary.contender.shard_size <= summary.case.node_size
        ]
        chosen.sort(key=lambda summary: summary.contender.shard_size)
        sizes, spreads = [each.contender.shard_size for each in chosen], [each.step_seconds for each in chosen]
        medians = [spread.median for spread in spreads]
        if chosen:
            axes.errorbar(
                sizes, medians, yerr=_quartiles(spreads), color=colour, marker=marker, ms=6, lw=2, capsize=3, label=name
            )
    _ticks(axes, {summary.contender.shard_size for summary in ours})
    axes.set_ylim(bottom=0)
    axes.set_xlabel("shard size: ranks that hold one replica")
    axes.set_ylabel("seconds, median with quartiles")
    axes.grid()
    figure.legend(loc="outside right upper")
    return figure
