"""One page to pass around: a plan as a single HTML file that needs no network, with figures that follow a click."""

from __future__ import annotations

import html
import importlib.resources
import json
import string
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning_mics.cli.plan.drawings import last_microstep
from lightning_mics.cli.plan.page import format_duration, format_rate
from lightning_mics.cli.plan.screen import misfit_rows, question, reasons, settings
from lightning_mics.cli.plan.write import accelerate_code, trainer_code
from lightning_mics.plan.evaluate import Plan, peak_flops
from lightning_mics.plan.hardware import Link
from lightning_mics.plan.host import explain_host
from lightning_mics.plan.scaling import default_nodes, weak_scaling
from lightning_mics.plan.search import ERROR, Planning, explain_misfit
from lightning_mics.plan.sensitivity import RATES, contenders_of, sensitivity
from lightning_mics.plan.settings import Variant
from lightning_mics.plan.simulate import COMPUTE, STREAMS
from lightning_mics.text import format_bytes, format_number

_FOLDER = "web"
# A timeline is drawn on so many ticks.
_TICKS = 10_000
_ABOUT_COLUMNS = (
    "p: ranks of a partition group; q: those that divide optimizer states, if they are more. Waits: exposed "
    "communication. MFU: share of the peak that trains the model. The last columns are the step in s under worse "
    "conditions: links between nodes that give less of their rate, compute that waits for each collective."
)
_SHOWN_RATES = (0.75, 0.5, 0.375, 0.25)


def to_html(planning: Planning, ask: Callable[..., str], *, top: int = 10, assumed: Collection[str] = ()) -> str:
    """Returns the page.

    Args:
        planning: The answer of the planner.
        ask: Returns the command that asks for it, without what says where the answer goes; keywords are options that
            have other values.
        top: How many of the best plans are in it; the best of each partition size come beside them.
        assumed: What was not given, as the screen has it.
    """
    folder = importlib.resources.files(__package__ or "") / _FOLDER
    parts = {kind: (folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    cluster = planning.cluster
    title = f"{planning.profile.name} on {cluster.num_nodes} x {cluster.node.name}"
    content = json.dumps(_content(planning, ask, top, assumed), allow_nan=False, separators=(",", ":"))
    return string.Template(parts["html"]).substitute(
        title=html.escape(title),
        style=parts["css"].strip(),
        script=parts["js"].strip(),
        data=content.replace("<", "\\u003c"),  # nothing in it ends the element
    )


def _content(planning: Planning, ask: Callable[..., str], top: int, assumed: Collection[str]) -> dict[str, Any]:
    cluster, counts = planning.cluster, default_nodes(planning.cluster.num_nodes)
    return {
        "facts": list(question(planning, assumed).items()),
        "reasons": reasons(planning) if planning.plans else [explain_misfit(planning)],
        "rows": [_row(planning, plan, counts, ask) for plan in _shown(planning, top)],
        "ranking": planning.choices.ranking,
        "limit": planning.memory_limit,
        "nodes": cluster.num_nodes,
        "ranks_of_node": cluster.node.num_accelerators,
        "scaled_nodes": counts,
        "rates": [1, *_SHOWN_RATES],
        "shown_rates": RATES,
        "link": cluster.node.inter.rate,
        "ticks": _TICKS,
        "misfits": misfit_rows(planning),
        "assumptions": list(_assumptions(planning)),
        "about_columns": _ABOUT_COLUMNS,
        "footer": f"Predicted by lightning-mics, not measured. Written by: {ask()} --report plan.html",
    }


def _shown(planning: Planning, top: int) -> list[Plan]:
    """Returns the first plans, what is best somewhere, and other ways to train; in the order of the ranking."""
    if not planning.plans:
        return []
    sizes = {plan.candidate.shard_size: plan for plan in reversed(planning.plans)}
    chosen = {plan.candidate for plan in (*planning.plans[:top], *sizes.values(), *contenders_of(planning))}
    return [*(plan for plan in planning.plans if plan.candidate in chosen), *planning.contenders]


def _row(planning: Planning, plan: Plan, counts: Sequence[int], ask: Callable[..., str]) -> dict[str, Any]:
    candidate, found = plan.candidate, sensitivity(planning, plan, _SHOWN_RATES)
    is_ours = candidate.scheme == "mics"
    points = {point.num_nodes: point.plan for point in weak_scaling(planning, counts, [plan])}
    of_a_rank = (points[count] if count in points and points[count].fits else None for count in counts)
    return {
        "rank": planning.plans.index(plan) + 1 if is_ours else None,
        "scheme": candidate.scheme,
        "label": candidate.short_label.removeprefix("MiCS "),
        "settings": settings(candidate, microsteps=True),
        "shard_size": candidate.shard_size,
        "accumulation": candidate.accumulation,
        "fits": plan.fits,
        "total": plan.memory.total,
        "memory": plan.memory.parts(),
        "seconds": plan.time.seconds,
        "waiting": plan.time.waiting,
        "idle": plan.time.idle / plan.time.seconds,
        "host": explain_host(plan, planning.cluster.node.host),
        "samples_per_second": plan.samples_per_second,
        "model_flops": plan.model_flops,
        "mfu": plan.mfu,
        "inter_bytes": plan.inter_bytes,
        "traffic": [
            [hop.value, traffic.calls, traffic.intra_bytes, traffic.inter_bytes]
            for hop, traffic in plan.traffic.items()
            if traffic.calls
        ],
        "by_rate": found.by_rate,
        "without_overlap": found.without_overlap,
        "timeline": _timeline(plan),
        "scaling": [None if point is None else point.samples_per_second / point.world_size for point in of_a_rank],
        "commands": _commands(planning, plan, ask) if is_ours else [],
    }


def _timeline(plan: Plan) -> dict[str, Any]:
    events = last_microstep(plan.time)
    begin = min((event.start for event in events), default=0.0)
    seconds = max((event.end for event in events), default=0.0) - begin
    lanes: dict[str, list[Any]] = {stream: [] for stream in STREAMS}
    for event in events:
        kind = event.phase if event.stream == COMPUTE else event.stream
        start, end = (round((time - begin) / seconds * _TICKS) for time in (event.start, event.end))
        lanes[event.stream].append([kind, start, end])
    return {"seconds": seconds, "lanes": lanes}


def _commands(planning: Planning, plan: Plan, ask: Callable[..., str]) -> list[list[str]]:
    candidate, alone = plan.candidate, replace(planning, plans=[plan])
    loader = f"# DataLoader(..., batch_size={candidate.micro_batch})\n"
    names = ("shard_size", "micro_batch", "accumulation", "activation_checkpointing", "reshard_after_forward")
    fixed = {name: getattr(candidate, name) for name in names}
    if candidate.activation_checkpointing_offload:
        fixed["activation_checkpointing_offload"] = True
    if candidate.slices > 1:
        fixed |= {name: getattr(candidate, name) for name in ("optimizer_shard_size", "master_weights")}
    return [
        ["With the Lightning Trainer", loader + trainer_code(alone)],
        ["With Accelerate", loader + accelerate_code(alone)],
        ["As a file for accelerate launch", f"{ask(**fixed)} --write mics.yaml"],
        ["This page again", f"{ask()} --report plan.html"],
    ]


def _assumptions(planning: Planning) -> Iterator[list[str]]:
    node, profile = planning.cluster.node, planning.profile
    accelerator = node.accelerator
    peak = format_number(peak_flops(planning.cluster, planning.training) / 1e12)
    yield [
        accelerator.name,
        f"{format_bytes(accelerator.memory)}, {peak} TFLOP/s in {planning.training.param_dtype}, of which passes reach "
        f"{accelerator.compute_efficiency:.0%}; {format_rate(accelerator.memory_bandwidth)} of memory",
        accelerator.source,
    ]
    if node.host.launch:
        launch, unit = (format_number(seconds * 1e6) for seconds in (node.host.launch, node.host.unit))
        yield [f"host, {node.host.name}", f"{launch} us for an operation, {unit} us for a gather", node.host.source]
    yield ["inside a node", _describe(node.intra), node.intra.source]
    if planning.cluster.num_nodes > 1:
        yield ["between nodes", _describe(node.inter), node.inter.source]
    if node.source:
        yield [node.name, f"{node.num_accelerators} accelerators", node.source]
    known = {"trace": "traced with PyTorch on tensors without memory", "formula": "a formula for transformers"}
    yield ["the model", f"activations and operations: {known.get(profile.source, profile.source)}", "lightning-mics"]
    if planning.training.variant.base_bits is not None:
        yield list(_base(planning.training.variant))
    if planning.plans:
        reserve = format_bytes(planning.best.memory.reserve)
        yield ["reserve", f"{reserve} for the device's context and what its allocator loses to fragments", "assumption"]
    yield [
        "a step",
        "FSDP2's order of events; one collective at a time on the link between nodes; no data loading, stragglers or "
        f"others' congestion. Steps that differ by less than {ERROR:.0%} count as equal",
        "comparison with measured steps: docs/results/planner-step-time.md",
    ]


def _base(variant: Variant) -> tuple[str, str, str]:
    kept = "8 bits, and a scale of 32 for each row"
    if variant.base_bits == 4:
        scale = "8 bits, of which 256 share one of 32" if variant.double_quantization else "32 bits"
        kept = f"NF4, and for each 64 weights a scale of {scale}"
    return (
        f"base of {variant.base_bits} bits",
        f"frozen linear layers but the head: {kept}; gathered as stored, unpacked for each product in both passes. "
        "torchao needs more: its 8 bits leave unpacked copies",
        "bitsandbytes; Dettmers et al., LLM.int8() (2022), QLoRA (2023)",
    )


def _describe(link: Link) -> str:
    latency = format_duration(link.latency) if link.latency >= 1e-3 else f"{format_number(link.latency * 1e6)} us"
    return f"{format_rate(link.bandwidth)}, of which large collectives reach {link.efficiency:.0%}; {latency} a step"
