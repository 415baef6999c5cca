"""Figures of a plan: how it scales, what it rests on, what a step consists of, and what fits into memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from lightning_mics.bench.style import (
    COLOURS,
    LEGEND_BELOW,
    OTHER_CURVE,
    OUR_COLOURS,
    OUR_CURVE,
    STYLE,
    require_matplotlib,
    save,
    start,
)
from lightning_mics.cli.plan.checks import NEEDS_MATPLOTLIB, PICTURES
from lightning_mics.cli.plan.page import format_duration, format_rate
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.evaluate import Plan
from lightning_mics.plan.scaling import ScalingPoint
from lightning_mics.plan.search import Misfit, Planning, apart_from
from lightning_mics.plan.sensitivity import contenders_of, sensitivity
from lightning_mics.plan.settings import Scheme
from lightning_mics.plan.simulate import COMPUTE, GATHER, REDUCE, REPLICATE, STREAMS, Event
from lightning_mics.text import format_bytes, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_DARK, _LIGHT = "#333333", "#777777"
_MARKERS: dict[Scheme, str] = {"mics": "o", "full-sharding": "s", "mesh-2d": "D", "ddp": "^"}
# Colours of Okabe and Ito and shades of them, which colour-blind people can tell apart.
_KINDS: dict[str, tuple[str, str]] = {
    "forward": ("#56b4e9", "forward"),
    "backward": ("#08519c", "backward"),
    "step": ("#111111", "optimizer"),
    GATHER: ("#009e73", "gather"),
    REDUCE: ("#e69f00", "reduce-scatter"),
    REPLICATE: ("#cc79a7", "all-reduce between replicas"),
}
_PARTS = {
    "parameters": "#08519c",
    "gradients": "#3d8fd1",
    "optimizer": "#9ecae1",
    "masters": "#6a51a3",
    "partial_sums": "#cfe3f3",
    "gathered": "#009e73",
    "communication": "#e69f00",
    "activations": "#d55e00",
    "temporaries": "#f0b48a",
    "outputs": "#f7d9c4",
    "workspaces": "#dddddd",
    "reserve": "#bdbdbd",
}
_WIDTH = 9.0
# A part of a picture: its height in inches, and what draws it.
_Panel = tuple[float, Callable[["Figure | SubFigure", float], None]]
# More events than these would be lines too thin to see.
_MOST_EVENTS = 170
_MOST_ROWS = 12
_THIN = 0.008
_SHOWN_RATES = (1.0, 0.75, 0.5, 0.375, 0.25)
# Bars that go further than this many limits are cut.
_CUT = 1.6
_GIB = 2**30


def draw(planning: Planning, scaling: Sequence[ScalingPoint], target: Path) -> list[Path]:
    """Draws the best plan into a file that ends with ``.png`` or ``.svg``, or as a PNG each into a folder.

    Raises:
        MiCSConfigError: If no plan fits, or a file cannot be written.
        MiCSError: If matplotlib is not installed.
    """
    require_matplotlib(NEEDS_MATPLOTLIB)
    import matplotlib

    panels = _panels(planning, scaling)
    try:
        with matplotlib.rc_context(STYLE):
            if target.suffix in PICTURES and not target.is_dir():
                return [save(_picture(*panels.values()), target)]
            target.mkdir(parents=True, exist_ok=True)
            return [save(_picture(panel), target / f"{name}.png") for name, panel in panels.items()]
    except OSError as error:
        raise MiCSConfigError(
            f"{target} cannot be written ({error.strerror or error}). Give --plot a file or a folder of yours."
        ) from error


def _panels(planning: Planning, points: Sequence[ScalingPoint]) -> dict[str, _Panel]:
    rows = _memory_rows(planning)
    return {
        "scaling": (4.4, lambda figure, height: _scaling(figure, height, planning, points)),
        "sensitivity": (4.8, lambda figure, height: _sensitivity(figure, height, planning)),
        "timeline": (3.4, lambda figure, height: _timeline(figure, height, planning)),
        "memory": (1.9 + 0.3 * len(rows), lambda figure, height: _memory(figure, height, planning, rows)),
    }


def _picture(*panels: _Panel) -> Figure:
    """Returns panels one below the other."""
    from matplotlib.figure import Figure

    heights = [height for height, _ in panels]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)
    for part, (height, draw_onto) in zip(parts.flat, panels, strict=True):
        draw_onto(part, height)
    return figure


def _conditions(planning: Planning) -> str:
    candidate = planning.best.candidate
    return (
        f"{planning.profile.name}, {planning.cluster.node.name}, {planning.training.precision}, micro-batches of "
        f"{candidate.micro_batch} x {candidate.accumulation}; predicted"
    )


# Scaling.


def _scaling(figure: Figure | SubFigure, height: float, planning: Planning, points: Sequence[ScalingPoint]) -> None:
    node = planning.cluster.node
    axes = start(figure, height, "Throughput that an accelerator keeps as the cluster grows", _conditions(planning))
    counts = sorted({point.num_nodes * node.num_accelerators for point in points})
    ends, missing = [], []
    for way in (*planning.contenders[::-1], planning.best):  # the best plan above the others
        curve = [point for point in points if point.label == way.candidate.label and point.plan.fits]
        if not curve:
            missing.append(f"{way.candidate.short_label} needs {format_bytes(way.memory.total)}")
            continue
        _curve(axes, curve, way.candidate.scheme)
        label = f"{way.candidate.short_label} {curve[-1].efficiency:.0%}"
        ends.append((_of_a_rank(curve[-1]), label, _colour(way.candidate.scheme)))
    level = _of_a_rank(next(point for point in points if point.efficiency is not None))
    axes.axhline(level, color="#999999", lw=1, zorder=1)
    ends.append((level, "linear scaling", _LIGHT))
    axes.axvline(planning.cluster.world_size, color="#999999", lw=1, ls=":", zorder=1)
    where = (planning.cluster.world_size, 0)
    axes.annotate("as planned", where, (4, 5), textcoords="offset points", fontsize=9, color=_LIGHT)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_ylim(0, level * 1.15)
    axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
    note = f"\nDoes not fit at any size: {', '.join(missing)}" if missing else ""
    axes.set_xlabel(f"accelerators, {node.num_accelerators} on a node{note}")
    axes.set_ylabel(f"samples/s of one {node.accelerator.name}", wrap=True)
    _label_ends(axes, counts[-1], ends)


def _of_a_rank(point: ScalingPoint) -> float:
    return point.plan.samples_per_second / point.plan.world_size


def _colour(scheme: Scheme) -> str:
    return COLOURS.get(scheme, OUR_COLOURS[0])


def _curve(axes: Axes, curve: Sequence[ScalingPoint], scheme: Scheme) -> None:
    style = OUR_CURVE if scheme == "mics" else OTHER_CURVE
    ranks, values = [point.plan.world_size for point in curve], [_of_a_rank(point) for point in curve]
    axes.plot(ranks, values, marker=_MARKERS[scheme], color=_colour(scheme), **style)


def _label_ends(axes: Axes, last: int, ends: Iterable[tuple[float, str, str]]) -> None:
    """Writes labels to the right of curves, moved apart where curves meet."""
    ordered = sorted(ends, reverse=True, key=lambda end: end[0])
    bottom, top = axes.get_ylim()
    heights = _spread([value for value, _, _ in ordered], (top - bottom) * 0.062)
    for (value, text, colour), height in zip(ordered, heights, strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 5, "relpos": (0, 0.5)}
        style: Any = {"textcoords": axes.get_yaxis_transform(), "annotation_clip": False, "arrowprops": line}
        axes.annotate(text, (last, value), (1.03, height), color=colour, fontsize=9, va="center", **style)


def _spread(values: Iterable[float], least: float) -> list[float]:
    """Returns places near to descending values that are ``least`` apart, and above zero."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and mean(groups[-2]) - mean(groups[-1]) < least * len(groups[-2] + groups[-1]) / 2:
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [mean(group) + least * ((len(group) - 1) / 2 - place) for group in groups for place in range(len(group))]
    lowest = least / 2
    for place in range(len(places) - 1, -1, -1):
        places[place] = max(places[place], lowest)
        lowest = places[place] + least
    return places


# What a plan rests on.


def _sensitivity(figure: Figure | SubFigure, height: float, planning: Planning) -> None:
    axes = start(figure, height, "A step where links give less, or where nothing overlaps", _conditions(planning))
    plans, shades = contenders_of(planning), zip(OUR_COLOURS[1:], "vPX*", strict=True)
    rates, link = _SHOWN_RATES if planning.cluster.num_nodes > 1 else (1.0,), planning.cluster.node.inter
    apart = len(rates) - 0.3  # without overlap, beside the curves
    for plan in plans:
        scheme = plan.candidate.scheme
        is_rival = scheme == "mics" and plan is not plans[0]
        colour, marker = next(shades) if is_rival else (_colour(scheme), _MARKERS[scheme])
        label = apart_from(plans[0].candidate, plan.candidate) if is_rival else plan.candidate.short_label
        found = sensitivity(planning, plan, rates)
        seconds = list(found.by_rate.values()) or [found.seconds]
        style = {**(OUR_CURVE if scheme == "mics" else OTHER_CURVE), "color": colour, "marker": marker}
        axes.plot(range(len(rates)), seconds, label=label, **style)
        axes.plot([apart], [found.without_overlap], **style)
    axes.axvline(apart - 0.3, color="#999999", lw=1, ls=":", zorder=1)
    ticks = [f"{rate:.0%}\n{format_rate(rate * link.rate)}" for rate in rates] if len(rates) > 1 else ["as predicted"]
    axes.set_xticks([*range(len(rates)), apart], [*ticks, "nothing\noverlaps"])
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.grid(axis="y")
    axes.set_xlabel("what the link of a node to others gives")
    axes.set_ylabel("s of a step")
    figure.legend(ncols=2, **LEGEND_BELOW)


# The timeline.


def _timeline(figure: Figure | SubFigure, height: float, planning: Planning) -> None:
    best = planning.best
    events, numbers = _window(best)
    shown = "the whole step" if len(numbers) == best.candidate.accumulation else _which(numbers, best)
    takes, waits = format_duration(best.time.seconds), f"{best.time.waiting:.1%}"
    title = f"A step of {best.candidate.label}: {takes}, compute waits for {waits} of it"
    axes = start(figure, height, title, f"{_conditions(planning)}; {shown}")
    begin, end = min(event.start for event in events), max(event.end for event in events)
    scale, unit = (1e3, "ms") if end - begin < 1 else (1.0, "s")
    events = [replace(e, start=(e.start - begin) * scale, end=(e.end - begin) * scale) for e in events]
    lanes = [lane for lane in STREAMS if any(event.stream == lane for event in best.time.events)]
    for (lane, phase), group in _by_kind(events).items():
        bars = [(event.start, event.end - event.start) for event in group]
        colour, label = _KINDS[phase if lane == COMPUTE else lane]
        # White edges tell neighbours apart, but would eat thin bars; edges of their own colour let all of them show.
        edge = "white" if lane == COMPUTE and len(events) <= _MOST_EVENTS else colour
        axes.broken_barh(bars, (lanes.index(lane) - 0.36, 0.72), fc=colour, ec=edge, lw=0.4, label=label)
    _draw_waits(axes, events, lanes.index(COMPUTE))
    _mark_microsteps(axes, events, numbers, best.candidate.accumulation, len(lanes))
    axes.set_yticks(range(len(lanes)), lanes)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lanes) - 0.5, -1.0)
    axes.set_xlim(0, (end - begin) * scale)
    axes.set_xlabel(unit)
    axes.spines["left"].set_visible(False)
    figure.legend(ncols=7, **LEGEND_BELOW)


def _which(numbers: Sequence[int], plan: Plan) -> str:
    many = "microstep" if len(numbers) == 1 else f"{len(numbers)} microsteps"
    return f"only the last {many} of {plan.candidate.accumulation}, and the optimizer"


def _window(plan: Plan) -> tuple[list[Event], list[int]]:
    """Returns the events of as many of the last microsteps as can be told apart, and their numbers."""
    by_microstep: defaultdict[int, list[Event]] = defaultdict(list)
    for event in plan.time.events:
        by_microstep[event.microstep].append(event)
    numbers = sorted(by_microstep)
    chosen = numbers[-1:]
    for number in reversed(numbers[:-1]):
        if sum(len(by_microstep[other]) for other in (number, *chosen)) > _MOST_EVENTS:
            break
        chosen.insert(0, number)
    return [event for number in chosen for event in by_microstep[number]], chosen


def _by_kind(events: Iterable[Event]) -> dict[tuple[str, str], list[Event]]:
    groups: dict[tuple[str, str], list[Event]] = {(COMPUTE, phase): [] for phase in ("forward", "backward", "step")}
    for event in events:
        groups.setdefault((event.stream, event.phase if event.stream == COMPUTE else ""), []).append(event)
    return {kind: group for kind, group in groups.items() if group}


def _draw_waits(axes: Axes, events: Iterable[Event], lane: int) -> None:
    """Hatches the time in which compute waits."""
    waits, now = [], 0.0
    for event in sorted((event for event in events if event.stream == COMPUTE), key=lambda event: event.start):
        if event.start > now:
            waits.append((now, event.start - now))
        now = max(now, event.end)
    last = max((start + width for start, width in waits), default=0.0)
    for is_thin in (False, True):
        chosen = [wait for wait in waits if (wait[1] < _THIN * last) is is_thin]
        # A hatch would blur in thin bars.
        style: Any = {} if is_thin else {"ec": "#c1272d", "hatch": "//////", "label": "compute waits"}
        axes.broken_barh(chosen, (lane - 0.36, 0.72), fc="#f9b9b2", lw=0, **style)


def _mark_microsteps(
    axes: Axes, events: Sequence[Event], numbers: Sequence[int], accumulation: int, num_lanes: int
) -> None:
    """Draws lines between microsteps, and writes their numbers above."""
    for count, number in enumerate(numbers, start=accumulation - len(numbers) + 1):
        chosen = [event for event in events if event.microstep == number and event.phase != "step"]
        begin, end = min(event.start for event in chosen), max(event.end for event in chosen)
        text = f"microstep {count} of {accumulation}"
        axes.text((begin + end) / 2, -0.7, text, ha="center", fontsize=9, color=_DARK)
        if number != numbers[0]:
            axes.plot([begin] * 2, [-0.9, num_lanes - 0.5], color=_DARK, lw=1, ls=":")


# Memory.


def _memory_rows(planning: Planning) -> list[Plan | Misfit]:
    """Returns the fastest plan of each partition size, or what comes closest; of many sizes those next to the best."""
    rows: dict[int, Plan | Misfit] = {}
    entries: list[Plan | Misfit] = [*planning.plans, *planning.misfits]
    for entry in entries:
        rows.setdefault(entry.candidate.shard_size, entry)
    sizes = sorted(rows)
    first = max(0, min(sizes.index(planning.best.candidate.shard_size) - _MOST_ROWS // 2, len(sizes) - _MOST_ROWS))
    return [rows[size] for size in sizes[first : first + _MOST_ROWS]]


def _memory(figure: Figure | SubFigure, height: float, planning: Planning, rows: Sequence[Plan | Misfit]) -> None:
    limit, best = planning.best.memory_limit / _GIB, planning.best.candidate.shard_size
    edge = limit * _CUT
    conditions = _conditions(planning).partition(", micro-batches")[0]
    about = f"{conditions}; for each p its fastest plan, or what comes closest; predicted"
    axes = start(figure, height, "Memory of a rank at the peak of a step", about)
    left = [0.0] * len(rows)
    for part, colour in _PARTS.items():
        sizes = [getattr(row.memory, part) / _GIB for row in rows]
        if any(sizes):
            widths = [max(0.0, min(size, edge - begin)) for size, begin in zip(sizes, left, strict=True)]
            axes.barh(range(len(rows)), widths, 0.7, left=left, color=colour, label=part.replace("_", " "))
        left = [begin + size for begin, size in zip(left, sizes, strict=True)]
    ends = [max(limit, min(total, edge)) for total in left]
    for place, (row, end, total) in enumerate(zip(rows, ends, left, strict=True)):
        _write_total(axes, row, (end, place), "... " if total > edge else "")
    axes.axvline(limit, color=_DARK, lw=1.4)
    text = f"limit {format_bytes(planning.best.memory_limit)}"
    axes.annotate(text, (limit, -0.5), (4, 3), textcoords="offset points", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"p={row.candidate.shard_size}" for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.candidate.shard_size == best else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.9)
    axes.set_xlim(0, max(ends) * 1.3)
    axes.grid(axis="x")
    axes.set_xlabel("GiB")
    figure.legend(ncols=5, **LEGEND_BELOW)


def _write_total(axes: Axes, row: Plan | Misfit, where: tuple[float, int], begin: str) -> None:
    speed = f", {format_number(row.samples_per_second)} samples/s" if isinstance(row, Plan) else ", does not fit"
    text = f"{begin}{format_bytes(row.memory.total)}{speed}"
    colour = _DARK if isinstance(row, Plan) else "#b3261e"
    axes.annotate(text, where, (5, 0), textcoords="offset points", va="center", fontsize=9, color=colour)
