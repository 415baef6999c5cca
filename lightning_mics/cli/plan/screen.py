"""What the planner found, for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mics.cli.plan.drawings import last_microstep, layout_lines, timeline_lines
from lightning_mics.cli.plan.page import Page, format_count, format_duration, format_rate, format_short
from lightning_mics.cli.plan.write import accelerate_code, trainer_code
from lightning_mics.plan.evaluate import Plan
from lightning_mics.plan.host import explain_host
from lightning_mics.plan.scaling import ScalingPoint
from lightning_mics.plan.search import (
    UNKNOWN_ACTIVATIONS,
    Misfit,
    Planning,
    explain_advice,
    explain_division,
    what_helps,
)
from lightning_mics.plan.sensitivity import RATES, explain_assumptions, sensitivity
from lightning_mics.plan.settings import Candidate, Training
from lightning_mics.text import format_bytes, format_number

_GIB = 2**30
_Entry = TypeVar("_Entry", Plan, Misfit)


def print_planning(
    planning: Planning,
    scaling: Sequence[ScalingPoint],
    console: Console,
    *,
    top: int = 10,
    assumed: Collection[str] = (),
) -> None:
    """Prints what was asked, what fits, why the rest does not, and the best plan in detail.

    The ranked table has ``top`` rows. What was not given is ``assumed``: ``"batch"``, ``"sequence"`` or both.
    """
    page = Page(console)
    _print_question(planning, page, assumed)
    if planning.plans:
        _print_ranking(planning, page, top)
    if planning.misfits:
        _print_misfits(planning, page)
    if not planning.plans:
        return
    _print_best(planning, page)
    _print_contenders(planning, page)
    _print_scaling(planning, scaling, page)
    _print_next_steps(planning, page)


# What is planned.


def _print_question(planning: Planning, page: Page, assumed: Collection[str]) -> None:
    profile = planning.profile
    page.console.print(Text("What is planned", style="bold"))
    grid = Table.grid(padding=(0, 2))
    for name, value in question(planning, assumed).items():
        grid.add_row(Text(name, style="dim"), Text(value))
    page.console.print(grid)
    if not profile.knows_activations:
        page.say(
            "Nothing is known of this model's samples, so activations are left out, and each weight counts for one "
            f"multiplication and addition a {'sample' if profile.sequence_length is None else 'token'}. Let the "
            "factory return (model, sample), where sample is a batch of one sample or more."
        )


def question(planning: Planning, assumed: Collection[str]) -> dict[str, str]:
    """Returns what is planned, by name; what was not given is ``assumed``, as :func:`print_planning` has it."""
    profile, cluster, node = planning.profile, planning.cluster, planning.cluster.node
    source = {"trace": "a trace", "formula": "a formula"}.get(profile.source, profile.source)
    kept_free = "" if profile.knows_activations else f" ({UNKNOWN_ACTIVATIONS:.0%} are kept free for activations)"
    return {
        "model": f"{profile.name}: {format_short(profile.numel)} parameters{_used(planning)}, "
        f"{len(profile.blocks)} blocks (figures from {source})",
        "samples": _samples(planning, "sequence" in assumed),
        "training": ", ".join(_training(planning.training)),
        "hardware": f"{format_count(cluster.num_nodes, 'node')} x {node.num_accelerators} {node.accelerator.name}"
        f" ({node.name}), {cluster.world_size} ranks",
        "links": f"inside a node {format_rate(node.intra.rate)} for each rank, between nodes "
        f"{format_rate(node.inter.rate)} for each node",
        "batch": _batch(planning, "batch" in assumed),
        "memory": f"{format_bytes(planning.memory_limit)} for each rank{kept_free}",
    }


def _used(planning: Planning) -> str:
    profile = planning.profile
    words = []
    if profile.active_numel is not None:
        words.append(f"{format_short(profile.active_numel)} for each token")
    if profile.trainable_numel < profile.numel:
        words.append(f"{format_short(profile.trainable_numel)} trained")
    return f" ({', '.join(words)})" if words else ""


def _training(training: Training) -> list[str]:
    words = [training.precision, str(training.optimizer), *training.variant.words]
    words += [f"blocks compiled, {training.compile_gain:g} times as fast"] * (training.compile_gain != 1)
    return words + ["outputs dropped before the backward pass"] * (not training.holds_outputs)


def _samples(planning: Planning, assumed: bool) -> str:
    length = planning.profile.sequence_length
    if length is None:
        return "no sequences" if planning.profile.knows_activations else "unknown"
    why = " (assumed: the longest that the model takes; --sequence)" if assumed else ""
    return f"{length:,} tokens each{why}"


def _batch(planning: Planning, assumed: bool) -> str:
    ranks, (micro_batch, accumulation) = planning.cluster.world_size, planning.choices.batches[0]
    text = f"{format_count(ranks * micro_batch * accumulation, 'sample')} in an optimizer step"
    if assumed:
        text += (
            f" (assumed: {ranks} ranks x micro-batches of {micro_batch} x {accumulation} microsteps; --global-batch)"
        )
    return text


# What fits and what does not.


def _print_ranking(planning: Planning, page: Page, top: int) -> None:
    by_speed = planning.choices.ranking == "throughput"
    page.heading(f"What fits, the {'fastest' if by_speed else 'best'} first")
    rows = [[str(rank), *_ranked(plan, planning)] for rank, plan in enumerate(planning.plans[:top], start=1)]
    names = ["#", "p", "sta-\nges", "micro-\nbatch", "re-\ncom-\npute", "re-\nshard"]
    names += [f"GiB of\n{_gib(planning.memory_limit)}", "sam-\nples/s", "waits", "step\ns", *_conditions(planning)]
    page.table(names, rows, words=0, gap=1, bold=0)
    more = len(planning.plans) - top
    page.say(
        "p: ranks of a partition group (8/64: and 64 divide the optimizer states). Stages of a collective: 2 across "
        "nodes, then inside them. Micro-batch: samples of a rank x microsteps. Recompute: blocks in the backward pass; "
        "sel.: all but matrix products and attention. Reshard: blocks are freed after the forward pass. Waits: exposed "
        f"communication. {_about_conditions(planning)}"
        + (f" {format_count(more, 'more plan')} fit: --top." if more > 0 else "")
    )
    for reason in reasons(planning):
        page.say(reason)


def reasons(planning: Planning) -> list[str]:
    """Returns why the best plan is advised, and what that rests on."""
    found = (explain_advice(planning), explain_division(planning), explain_assumptions(planning))
    return [reason for reason in found if reason is not None]


def _ranked(plan: Plan, planning: Planning) -> list[str]:
    candidate = plan.candidate
    return [
        str(candidate.shard_size) + (f"/{candidate.optimizer_shard_size}" if candidate.slices > 1 else ""),
        "-" if candidate.shard_size == 1 else "2" if candidate.hierarchical else "1",
        f"{candidate.micro_batch} x {candidate.accumulation}",
        {"": "no", "all": "yes", "selective": "sel."}.get(candidate.recomputation, candidate.recomputation),
        "yes" if candidate.reshard_after_forward else "no",
        _gib(plan.memory.total),
        format_number(plan.samples_per_second),
        f"{plan.time.waiting:.1%}",
        format_number(plan.time.seconds),
        *_under_conditions(planning, plan),
    ]


def _conditions(planning: Planning) -> list[str]:
    """Returns the heads of the columns of what a step takes under worse conditions."""
    rates = RATES if planning.cluster.num_nodes > 1 else ()
    return [f"links\nat\n{rate:.0%}" for rate in rates] + ["no\nover-\nlap"]


def _about_conditions(planning: Planning) -> str:
    links = "links between nodes give less of their rate, or if " if planning.cluster.num_nodes > 1 else ""
    return f"The last columns are the step in s if {links}compute waits for each collective."


def _under_conditions(planning: Planning, plan: Plan) -> list[str]:
    found = sensitivity(planning, plan)
    return [format_number(seconds) for seconds in (*found.by_rate.values(), found.without_overlap)]


def _gib(count: float) -> str:
    return f"{count / _GIB:.1f}"


def _print_misfits(planning: Planning, page: Page) -> None:
    page.heading(f"What does not fit into {format_bytes(planning.memory_limit)}")
    page.table(["p", "settings\nthat fit", "the closest of the others"], misfit_rows(planning), words=3)


def misfit_rows(planning: Planning) -> list[list[str]]:
    """Returns for each partition size how many settings fit, and what would let in the closest of the others."""
    fitting, misfits = _by_size(planning.plans), _by_size(planning.misfits)
    rows = []
    for size, group in sorted(misfits.items()):
        fits, closest = len(fitting[size]), group[0]
        missing = format_bytes(closest.memory.total - closest.memory_limit)
        why = f"{missing} too much ({settings(closest.candidate)})"
        remedies = " or ".join(what_helps(planning, closest))
        why += f": {remedies}" if remedies else ""
        rows.append([str(size), f"{fits} of {fits + len(group)}", why])
    return rows


def _by_size(entries: Iterable[_Entry]) -> defaultdict[int, list[_Entry]]:
    groups: defaultdict[int, list[_Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.candidate.shard_size].append(entry)
    return groups


def settings(candidate: Candidate, *, microsteps: bool = False) -> str:
    """Returns what a rank does with its samples, in few words; with the number of ``microsteps`` if asked for."""
    words = [f"micro-batches of {candidate.micro_batch}{f' x {candidate.accumulation}' * microsteps}"]
    how = candidate.recomputation
    words += ["recompute" if how == "all" else f"recompute {how}"] * bool(how)
    words += ["inputs on the host"] * candidate.activation_checkpointing_offload
    words += ["no reshard"] * (not candidate.reshard_after_forward)
    return ", ".join(words)


# The best plan.


def _print_best(planning: Planning, page: Page) -> None:
    best, length = planning.best, planning.profile.sequence_length
    which = "fastest" if best is planning.fastest else "best"
    page.heading(f"The {which}: {best.candidate.label}, {settings(best.candidate)}")
    tokens = "" if length is None else f", {format_short(best.samples_per_second * length)} tokens/s"
    rate = f"{format_number(best.model_flops / 1e12)} TFLOP/s a rank, MFU {best.mfu:.1%}"
    page.say(f"{format_number(best.samples_per_second)} samples/s{tokens}; {rate}.")
    page.lines("\n".join(layout_lines(best.candidate.layout(planning.cluster.topology), page.width)))
    _print_memory(best, page)
    _print_traffic(planning, page)
    _print_timeline(planning, page)


def _print_memory(plan: Plan, page: Page) -> None:
    memory, limit = plan.memory, plan.memory_limit
    page.heading(f"Memory of a rank: {format_bytes(memory.total)} of {format_bytes(limit)}, {memory.total / limit:.0%}")
    parts = {name.replace("_", " "): size for name, size in memory.parts().items() if size}
    room = max(10, page.width - 32)
    mark = "#" if page.console.options.ascii_only else "█"
    for name, size in parts.items():
        page.lines(f"  {name:<14}{format_bytes(size):>10}  {mark * round(room * size / max(parts.values()))}")
    page.lines(f"  {'free':<14}{format_bytes(limit - memory.total):>10}")


def _print_traffic(planning: Planning, page: Page) -> None:
    page.heading("What a node sends in an optimizer step")
    rows = [
        [hop.value, f"{traffic.calls:,}", format_bytes(traffic.intra_bytes), format_bytes(traffic.inter_bytes)]
        for hop, traffic in planning.best.traffic.items()
        if traffic.calls
    ]
    page.table(["collective", "calls", "inside", "out of the node"], rows)
    page.say(_savings(planning))


def _savings(planning: Planning) -> str:
    if planning.cluster.num_nodes == 1:
        return "There is one node: nothing leaves it."
    ours = planning.best.inter_bytes
    theirs = sum(plan.inter_bytes for plan in planning.contenders if plan.candidate.scheme == "full-sharding")
    if not ours or not theirs:
        return f"{format_bytes(ours)} leave a node; with full sharding {format_bytes(theirs)}."
    times = theirs / ours
    how = f"{times:.1f} times less than" if times > 1.05 else "about as much as" if times > 0.95 else "more than"
    return f"{format_bytes(ours)} leave a node: {how} with full sharding ({format_bytes(theirs)})."


def _print_timeline(planning: Planning, page: Page) -> None:
    plan = planning.best
    time, microsteps = plan.time, plan.candidate.accumulation
    window = last_microstep(time)
    which = "the step" if microsteps == 1 else f"the last of {microsteps} microsteps"
    seconds = window[-1].end - window[0].start if window else 0.0
    page.heading(
        f"Timeline of {which}, with the optimizer: {format_duration(seconds)} of {format_duration(time.seconds)}"
    )
    for line in timeline_lines(window, page.width - 12):
        page.lines(f"  {line}")
    page.say(
        "F forward, B backward, O optimizer, G gather, R reduce-scatter, A all-reduce between replicas; small: for a "
        "part of the time; dots: compute waits."
    )
    waits = ", ".join(f"{hop} {seconds / time.seconds:.1%}" for hop, seconds in time.exposed.items())
    page.say(f"Compute waits for {time.waiting:.1%} of the step: {waits}.")
    if words := explain_host(plan, planning.cluster.node.host):
        page.say(words)


# Compared with others.


def _print_contenders(planning: Planning, page: Page) -> None:
    best = planning.best
    page.heading("Compared with other ways to train, with the same batch and settings")
    rows = []
    for plan in (best, *planning.contenders):
        seconds, conditions = plan.time.seconds, _under_conditions(planning, plan)
        speed = [f"{seconds / best.time.seconds:.2f}", format_number(seconds), *conditions]
        memory = _gib(plan.memory.total) + ("" if plan.fits else " does not fit")
        speed = speed if plan.fits else ["-"] * len(speed)
        rows.append([plan.candidate.short_label, format_bytes(plan.inter_bytes), memory, *speed])
    names = ["", "out of\na node", f"GiB of {_gib(best.memory_limit)}\na rank needs", "times\nas\nlong", "step\ns"]
    page.table([*names, *_conditions(planning)], rows, gap=1, bold=0)
    page.say("Full sharding is ZeRO-3, over all ranks. A 2-D mesh all-reduces between replicas in every microstep.")


def _print_scaling(planning: Planning, points: Sequence[ScalingPoint], page: Page) -> None:
    page.heading("Weak scaling: samples/s, and efficiency against the smallest cluster it fits")
    ways = [plan.candidate for plan in (planning.best, *planning.contenders)]
    found = {(point.num_nodes, point.label): point for point in points}
    counts = sorted({point.num_nodes for point in points})
    here = counts.index(planning.cluster.num_nodes) if planning.cluster.num_nodes in counts else -1
    rows = []
    for place, count in enumerate(counts):
        ranks = count * planning.cluster.node.num_accelerators
        cells = [_scaled(found.get((count, way.label))) for way in ways]
        rows.append([f"{'* ' * (place == here)}{count}", f"{ranks:,}", *cells])
    page.table(["nodes", "ranks", *(way.short_label for way in ways)], rows, words=0, bold=here)
    page.say("* as planned; -: does not fit, or the partition does not divide the cluster.")


def _scaled(point: ScalingPoint | None) -> str:
    if point is None or point.efficiency is None:
        return "-"
    return f"{format_number(point.plan.samples_per_second)} {point.efficiency:>4.0%}"


def _print_next_steps(planning: Planning, page: Page) -> None:
    page.heading("Next")
    loader = f"DataLoader(..., batch_size={planning.best.candidate.micro_batch})"
    parts = {"With the Lightning Trainer": trainer_code, "With Accelerate": accelerate_code}
    for title, code in parts.items():
        page.lines(f"{title}, and {loader}:")
        page.lines(textwrap.indent(code(planning), "  "))  # to be copied: a line that is too long stays one line
    if planning.training.state_dtype is not None:
        page.say(f"Accelerate has no name for this precision: build the model in {planning.training.state_dtype}.")
    page.say("As a file for accelerate launch: --write mics.yaml; for LightningCLI: add --format lightning.")
