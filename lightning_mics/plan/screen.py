"""What the planner found, for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mics.metrics import Hop, Traffic, format_bytes, format_number
from lightning_mics.plan.evaluate import Plan
from lightning_mics.plan.hardware import Node
from lightning_mics.plan.scaling import ScalingPoint
from lightning_mics.plan.search import UNKNOWN_ACTIVATIONS, Misfit, Planning
from lightning_mics.plan.settings import Candidate
from lightning_mics.plan.simulate import COMPUTE, GATHER, REDUCE, REPLICATE, STREAMS, Event, StepTime
from lightning_mics.plan.write import accelerate_code, precision_of, trainer_code
from lightning_mics.topology import GroupLayout

if TYPE_CHECKING:
    from lightning_mics.trace.links import Measurement

_GIB = 2**30
_WIDEST = 100
_MOST_LAYOUT_NODES = 4
_HARDLY_BUSY = 0.05
# What a cell of the timeline shows, by stream and phase.
_LETTERS = {
    (COMPUTE, "forward"): "F",
    (COMPUTE, "backward"): "B",
    (COMPUTE, "step"): "O",
    GATHER: "G",
    REDUCE: "R",
    REPLICATE: "A",
}
_SHORT_NAMES = {"full-sharding": "full sharding", "mesh-2d": "2-D mesh", "ddp": "DDP"}


def print_planning(
    planning: Planning,
    scaling: Sequence[ScalingPoint],
    console: Console,
    *,
    top: int = 10,
    assumed: Collection[str] = (),
) -> None:
    """Prints what was asked, what fits, why the rest does not, and the best plan in detail.

    Args:
        planning: The answer of the planner.
        scaling: Points of weak scaling.
        console: Where to print.
        top: Rows of the ranked table.
        assumed: What was not given: ``"batch"``, ``"sequence"`` or both.
    """
    _print_question(planning, console, assumed)
    if planning.plans:
        _print_ranking(planning, console, top)
    if planning.misfits:
        _print_misfits(planning, console)
    if not planning.plans:
        return
    _print_best(planning, console)
    _print_contenders(planning, console)
    _print_scaling(planning, scaling, console)
    _print_next_steps(planning, console)


def _heading(text: str, console: Console) -> None:
    console.print(Text(f"\n{text}", style="bold"), soft_wrap=True)


def _say(text: str, console: Console) -> None:
    console.print(Text(textwrap.fill(text, min(console.width, _WIDEST))), soft_wrap=True)


def _table(*columns: str, left: int = 1, gap: int = 2) -> Table:
    """Returns an empty table whose first columns hold words, and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False)
    for place, name in enumerate(columns):
        is_word = place < left
        table.add_column(name, justify="left" if is_word else "right", no_wrap=not is_word, vertical="bottom")
    return table


def _short(value: float) -> str:
    """Returns a number with three digits and k, M, B or T."""
    for unit in ("", "k", "M", "B"):
        if abs(value) < 999.5:
            return f"{value:.3g}{' ' * bool(unit)}{unit}"
        value /= 1000
    return f"{value:.3g} T"


# What is known.


def print_names(title: str, names: Iterable[str], console: Console) -> None:
    """Prints names under a title."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    width = min(console.width, _WIDEST)
    lines = textwrap.fill(", ".join(names), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    console.print(Text(f"{lines}\n"), soft_wrap=True)


def print_instances(nodes: Iterable[Node], console: Console) -> None:
    """Prints a table of instances."""
    console.print(Text("Instances (--instance)", style="bold"), soft_wrap=True)
    table = _table("instance", "accelerators", "memory\nof each", "inside, of\na rank", "between,\nof a node", left=2)
    for node in nodes:
        accelerator = node.accelerator
        links = _rate(node.intra.bandwidth), _rate(node.inter.bandwidth)
        count = f"{node.num_accelerators} x {accelerator.name}"
        table.add_row(node.name, count, format_bytes(accelerator.memory), *links)
    console.print(table)
    console.print()


def print_measurement(measurement: Measurement, console: Console) -> None:
    """Prints what was measured of a cluster."""
    node, accelerator = measurement.cluster.node, measurement.cluster.node.accelerator
    title = f"Measured on {_count(measurement.cluster.num_nodes, 'node')} x {node.num_accelerators} {accelerator.name}"
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = _table("link", "rate", "latency", "fits within")
    links = (
        ("inside a node, of a rank", node.intra, measurement.intra),
        ("between nodes, of a node", node.inter, measurement.inter),
    )
    for name, link, fit in links:
        within = "assumed" if fit is None else f"{fit.error:.0%}"
        table.add_row(name, _rate(link.rate), f"{format_number(link.latency * 1e6)} us", within)
    console.print(table)
    rate = max(accelerator.peak_flops.values()) * accelerator.compute_efficiency
    _say(
        f"A rank computes {format_number(rate / 1e12)} TFLOP/s, copies {_rate(accelerator.memory_bandwidth)} and has "
        f"{format_bytes(accelerator.memory)}.",
        console,
    )


# What is planned.


def _print_question(planning: Planning, console: Console, assumed: Collection[str]) -> None:
    profile, cluster, node = planning.profile, planning.cluster, planning.cluster.node
    rows = {
        "model": f"{profile.name}: {_short(profile.numel)} parameters, {len(profile.blocks)} blocks "
        f"(figures from {_source(profile.source)})",
        "samples": _samples(planning, "sequence" in assumed),
        "training": f"{precision_of(planning.training)}, {planning.training.optimizer}",
        "hardware": f"{_count(cluster.num_nodes, 'node')} x {node.num_accelerators} {node.accelerator.name}"
        f" ({node.name}), {cluster.world_size} ranks",
        "links": f"inside a node {_rate(node.intra.rate)} for each rank, between nodes {_rate(node.inter.rate)} for "
        "each node",
        "batch": _batch(planning, "batch" in assumed),
        "memory": f"{format_bytes(planning.memory_limit)} for each rank"
        + f" ({UNKNOWN_ACTIVATIONS:.0%} are kept free for activations)" * (not profile.knows_activations),
    }
    console.print(Text("What is planned", style="bold"))
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="dim"), Text(value))
    console.print(grid)
    if not profile.knows_activations:
        _say(
            "Nothing is known of this model's samples, so activations are left out, and each weight counts for one "
            f"multiplication and addition a {'sample' if profile.sequence_length is None else 'token'}. Let the "
            "factory return (model, sample), where sample is a batch of one sample or more.",
            console,
        )


def _source(source: str) -> str:
    return {"trace": "a trace", "formula": "a formula"}.get(source, source)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rate(bytes_per_second: float) -> str:
    return f"{format_number(bytes_per_second / 1e9)} GB/s"


def _samples(planning: Planning, assumed: bool) -> str:
    length = planning.profile.sequence_length
    if length is None:
        return "no sequences" if planning.profile.knows_activations else "unknown"
    why = " (assumed: the longest that the model takes; --sequence)" if assumed else ""
    return f"{length:,} tokens each{why}"


def _batch(planning: Planning, assumed: bool) -> str:
    micro_batch, accumulation = planning.choices.batches[0]
    batch = planning.cluster.world_size * micro_batch * accumulation
    text = f"{_count(batch, 'sample')} in an optimizer step"
    if assumed:
        text += (
            f" (assumed: {planning.cluster.world_size} ranks x micro-batches of {micro_batch} x {accumulation} "
            "microsteps; --global-batch)"
        )
    return text


# What fits and what does not.


def _print_ranking(planning: Planning, console: Console, top: int) -> None:
    has_tokens = planning.profile.sequence_length is not None
    _heading("What fits, the fastest first", console)
    names = [
        "#",
        "p",
        "sta-\nges",
        "micro-\nbatch",
        "recom-\npute",
        "re-\nshard",
        f"GiB of\n{_gib(planning.memory_limit)}",
    ]
    names += ["step\ns", "sam-\nples/s", *["tokens\n/s"] * has_tokens, "TFLOP/s\na rank", "MFU", "waits"]
    table = _table(*names, left=0, gap=1)
    for rank, plan in enumerate(planning.plans[:top], start=1):
        table.add_row(str(rank), *_ranked(plan, planning), style="bold" if rank == 1 else "")
    console.print(table)
    more = len(planning.plans) - top
    _say(
        "p: ranks of a partition group. Stages of a collective: 2 across nodes, then inside them. Micro-batch: samples "
        "of a rank x microsteps. Reshard: blocks are freed after the forward pass. Waits: exposed communication."
        + (f" {_count(more, 'more plan')} fit: --top." if more > 0 else ""),
        console,
    )


def _ranked(plan: Plan, planning: Planning) -> list[str]:
    candidate, length = plan.candidate, planning.profile.sequence_length
    return [
        str(candidate.shard_size),
        "-" if candidate.shard_size == 1 else "2" if candidate.hierarchical else "1",
        f"{candidate.micro_batch} x {candidate.accumulation}",
        _yes(candidate.activation_checkpointing),
        _yes(candidate.reshard_after_forward),
        _gib(plan.memory.total),
        format_number(plan.time.seconds),
        format_number(plan.samples_per_second),
        *([] if length is None else [_short(plan.samples_per_second * length)]),
        format_number(plan.model_flops / 1e12),
        f"{plan.mfu:.1%}",
        f"{waiting(plan.time):.1%}",
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _gib(count: float) -> str:
    return f"{count / _GIB:.1f}"


def waiting(time: StepTime) -> float:
    """Returns the part of a step in which compute waits for communication."""
    return sum(time.exposed.values()) / time.seconds


def _print_misfits(planning: Planning, console: Console) -> None:
    _heading(f"What does not fit into {format_bytes(planning.memory_limit)}", console)
    fitting = {size: len(plans) for size, plans in _by_size(planning.plans).items()}
    table = _table("p", "settings\nthat fit", "the closest of the others", left=3)
    for size, misfits in sorted(_by_size(planning.misfits).items()):
        fits = fitting.get(size, 0)
        table.add_row(str(size), f"{fits} of {fits + len(misfits)}", _why(misfits[0]))
    console.print(table)


def _by_size(plans: Iterable[Plan | Misfit]) -> dict[int, list[Plan | Misfit]]:
    groups: defaultdict[int, list[Plan | Misfit]] = defaultdict(list)
    for plan in plans:
        groups[plan.candidate.shard_size].append(plan)
    return groups


def _why(misfit: Plan | Misfit) -> str:
    """Returns the reason without the partition size, and the settings."""
    needed, limit = format_bytes(misfit.memory.total), format_bytes(misfit.memory_limit)
    return f"needs {needed} of {limit} ({_settings(misfit.candidate)})"


def _settings(candidate: Candidate) -> str:
    words = [f"micro-batches of {candidate.micro_batch}"]
    words += ["recompute"] * candidate.activation_checkpointing
    words += ["no reshard"] * (not candidate.reshard_after_forward)
    return ", ".join(words)


# The best plan.


def _print_best(planning: Planning, console: Console) -> None:
    best = planning.best
    _heading(f"The fastest: {best.candidate.label}, {_settings(best.candidate)}", console)
    width = min(console.width, _WIDEST)
    console.print(
        Text("\n".join(layout_lines(best.candidate.layout(planning.cluster.topology), width))), soft_wrap=True
    )
    _print_memory(best, console)
    _print_traffic(planning, console)
    _print_timeline(best, console)


def layout_lines(layout: GroupLayout, width: int) -> list[str]:
    """Returns the layout as it prints, shortened to a few nodes and to a width."""
    lines = str(layout).splitlines()
    num_nodes = layout.topology.num_nodes
    if num_nodes > _MOST_LAYOUT_NODES:
        nodes = lines[1 : num_nodes + 1]
        lines[1 : num_nodes + 1] = [*nodes[:2], f"  ... ({num_nodes - 3} more nodes)", nodes[-1]]
    return [line if len(line) <= width else line[: line.rindex(" ", 0, width - 3)] + " ..." for line in lines]


def _print_memory(plan: Plan, console: Console) -> None:
    memory, limit = plan.memory, plan.memory_limit
    share = memory.total / limit
    _heading(f"Memory of a rank: {format_bytes(memory.total)} of {format_bytes(limit)}, {share:.0%}", console)
    parts = {name.replace("_", " "): size for name, size in memory.parts().items() if size}
    room = max(10, min(console.width, _WIDEST) - 32)
    mark = "#" if console.options.ascii_only else "█"
    for name, size in parts.items():
        bar = mark * round(room * size / max(parts.values()))
        console.print(Text(f"  {name:<14}{format_bytes(size):>10}  {bar}"), soft_wrap=True)
    console.print(Text(f"  {'free':<14}{format_bytes(limit - memory.total):>10}"), soft_wrap=True)


def _print_traffic(planning: Planning, console: Console) -> None:
    best = planning.best
    _heading("What a node sends in an optimizer step", console)
    table = _table("collective", "calls", "inside", "out of the node")
    for hop, traffic in best.traffic.items():
        if traffic.calls:
            table.add_row(
                hop.value, f"{traffic.calls:,}", format_bytes(traffic.intra_bytes), format_bytes(traffic.inter_bytes)
            )
    console.print(table)
    _say(_savings(planning), console)


def _leaving(plan: Plan) -> int:
    """Returns the bytes that leave a node in a step."""
    total: Traffic = sum((plan.traffic[hop] for hop in Hop), Traffic())
    return total.inter_bytes


def _savings(planning: Planning) -> str:
    full = next((plan for plan in planning.contenders if plan.candidate.scheme == "full-sharding"), None)
    ours, theirs = _leaving(planning.best), 0 if full is None else _leaving(full)
    if planning.cluster.num_nodes == 1:
        return "There is one node: nothing leaves it."
    if not ours or not theirs:
        return f"{format_bytes(ours)} leave a node; with full sharding {format_bytes(theirs)}."
    times = theirs / ours
    how = f"{times:.1f} times less than" if times > 1.05 else "about as much as" if times > 0.95 else "more than"
    return f"{format_bytes(ours)} leave a node: {how} with full sharding ({format_bytes(theirs)})."


def _print_timeline(plan: Plan, console: Console) -> None:
    time, microsteps = plan.time, plan.candidate.accumulation
    window = last_microstep(time)
    which = "the step" if microsteps == 1 else f"the last of {microsteps} microsteps"
    seconds = window[-1].end - window[0].start if window else 0.0
    _heading(
        f"Timeline of {which}, with the optimizer: {format_duration(seconds)} of {format_duration(time.seconds)}",
        console,
    )
    for line in timeline_lines(window, min(console.width, _WIDEST) - 12):
        console.print(Text(f"  {line}"), soft_wrap=True)
    _say(
        "F forward, B backward, O optimizer, G gather, R reduce-scatter, A all-reduce between replicas; small: for a "
        "part of the time; dots: compute waits.",
        console,
    )
    waits = ", ".join(f"{hop} {seconds / time.seconds:.1%}" for hop, seconds in time.exposed.items())
    _say(f"Compute waits for {waiting(time):.1%} of the step: {waits}.", console)


def format_duration(seconds: float) -> str:
    """Returns seconds as people read them, for example ``'574 ms'``."""
    return f"{format_number(seconds * 1e3)} ms" if seconds < 1 else f"{format_number(seconds)} s"


def last_microstep(time: StepTime) -> list[Event]:
    """Returns the events of the last microstep and of the optimizer."""
    last = max((event.microstep for event in time.events), default=0)
    return [event for event in time.events if event.microstep == last]


def timeline_lines(events: Sequence[Event], width: int) -> list[str]:
    """Draws events as a line of letters for each stream.

    Args:
        events: Events of a part of a step.
        width: Columns of a line.

    Returns:
        Lines, each with the name of its stream.
    """
    if not events:
        return []
    begin, end = min(event.start for event in events), max(event.end for event in events)
    cells = max(10, width - 11)
    size = (end - begin) / cells
    lines = []
    for stream in STREAMS:
        chosen = [event for event in events if event.stream == stream]
        if chosen:
            lines.append(f"{stream:<11}{_draw(chosen, begin, size, cells)}".rstrip())
    return lines


def _draw(events: Iterable[Event], begin: float, size: float, cells: int) -> str:
    shares: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(cells)]
    idle = " "
    for event in events:
        idle = "." if event.stream == COMPUTE else " "
        letter = _LETTERS.get(event.stream) or _LETTERS[event.stream, event.phase]
        first, last = (event.start - begin) / size, (event.end - begin) / size
        for cell in range(int(first), min(cells, int(last) + 1)):
            shares[cell][letter] += max(0.0, min(last, cell + 1) - max(first, cell))
    return "".join(_cell(share, idle) for share in shares)


def _cell(share: Mapping[str, float], idle: str) -> str:
    busy = sum(share.values())
    if busy < (_HARDLY_BUSY if idle == "." else 1e-9):
        return idle
    letter = max(share, key=lambda name: share[name])
    return letter if busy >= 0.5 else letter.lower()


# Compared with others.


def _print_contenders(planning: Planning, console: Console) -> None:
    best = planning.best
    _heading("Compared with other ways to train, with the same batch and settings", console)
    table = _table("", "step s", "times as\nlong", "out of\na node", f"GiB of {_gib(best.memory_limit)}\na rank needs")
    for plan in (best, *planning.contenders):
        times = plan.time.seconds / best.time.seconds
        speed = [format_number(plan.time.seconds), f"{times:.2f}"] if plan.fits else ["-", "-"]
        memory = _gib(plan.memory.total) + ("" if plan.fits else " does not fit")
        table.add_row(
            plan.candidate.label, *speed, format_bytes(_leaving(plan)), memory, style="bold" if plan is best else ""
        )
    console.print(table)


def _print_scaling(planning: Planning, points: Sequence[ScalingPoint], console: Console) -> None:
    _heading("Weak scaling: samples/s, and efficiency against the smallest cluster it fits", console)
    labels = {plan.candidate.label: short_label(plan) for plan in (planning.best, *planning.contenders)}
    found = {(point.num_nodes, point.label): point for point in points}
    table = _table("nodes", "ranks", *labels.values(), left=0)
    for count in sorted({point.num_nodes for point in points}):
        here = count == planning.cluster.num_nodes
        cells = [_scaled(found.get((count, label))) for label in labels]
        ranks = count * planning.cluster.node.num_accelerators
        table.add_row(f"{'* ' * here}{count}", f"{ranks:,}", *cells, style="bold" if here else "")
    console.print(table)
    _say("* as planned; -: does not fit, or the partition does not divide the cluster.", console)


def short_label(plan: Plan) -> str:
    """Returns what to call a plan where there is little room."""
    return _SHORT_NAMES.get(plan.candidate.scheme, plan.candidate.label)


def _scaled(point: ScalingPoint | None) -> str:
    if point is None or point.efficiency is None:
        return "-"
    return f"{format_number(point.plan.samples_per_second)} {point.efficiency:>4.0%}"


def _print_next_steps(planning: Planning, console: Console) -> None:
    candidate = planning.best.candidate
    _heading("Next", console)
    loader = f"DataLoader(..., batch_size={candidate.micro_batch})"
    parts: tuple[tuple[str, Callable[[Planning], str]], ...] = (
        ("With the Lightning Trainer", trainer_code),
        ("With Accelerate", accelerate_code),
    )
    for title, code in parts:
        console.print(Text(f"{title}, and {loader}:"), soft_wrap=True)
        # Code is to be copied: a line that is too long stays one line.
        console.print(Text(textwrap.indent(code(planning), "  ")), soft_wrap=True)
    if planning.training.state_dtype is not None:
        _say(f"Accelerate has no name for this precision: build the model in {planning.training.state_dtype}.", console)
    _say("As a file for accelerate launch: --write mics.yaml; for LightningCLI: add --format lightning.", console)
