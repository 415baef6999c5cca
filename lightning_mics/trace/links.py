"""Measures the cluster that a process group runs on, for the planner: its links, and what a rank computes.

The collectives are those of training: gathers inside nodes, gathers and all-reduces across them, with all groups of the
cluster at the same time. Each takes ``steps * alpha + bytes / rate`` (see :mod:`lightning_mics.plan.cost`); the two
constants of a link are fitted to messages of many sizes.
"""

from __future__ import annotations

import datetime
import functools
import operator
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.core.mesh import build_mesh, communication_device, detect_topology
from lightning_mics.core.resources import device_memory, free_host_memory
from lightning_mics.core.timing import across_ranks, timed
from lightning_mics.core.transport import transport_for
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import Accelerator, Cluster, Link, Node, find_accelerator, find_host
from lightning_mics.topology import ClusterTopology
from lightning_mics.trace._torch import one_rank_mesh

Progress = Callable[[str], None]

_SMALLEST = 2**12
_LARGEST = {"cpu": 2**22, "cuda": 2**28}
_GROWTH = 4
# Messages that would take longer are left out.
_LONGEST_SECONDS = 0.4
# Rounds of calls back to back: waiting for each other weighs little, and bursts are over.
_ROUND_SECONDS = 0.08
_MOST_CALLS = 50
_ROUNDS = (2, 3)
_LARGE_SHARE, _SMALL_SHARE = 1 / 16, 1 / 128
_FITS = 5
_COMPUTE_SECONDS = 0.5
_COPY_BYTES = 2**26
_LAYERS = 4


@dataclass(frozen=True)
class Point:
    """One measurement of a collective.

    Attributes:
        steps: Steps of its ring.
        sent: Bytes on its busiest link: of a rank inside a node, of a node between nodes.
        seconds: What one takes the slowest rank, among others back to back.
    """

    steps: int
    sent: float
    seconds: float


@dataclass(frozen=True)
class LinkFit:
    """The constants of a link.

    Attributes:
        latency: Seconds of a step.
        rate: Bytes a second.
        error: Median of how far the points are from the fit, as a share.
        points: What it was fitted to.
    """

    latency: float
    rate: float
    error: float
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        cluster: The hardware, for planning.
        intra: The link inside nodes; ``None`` where nodes have one rank.
        inter: The link between nodes; ``None`` with one node.
    """

    cluster: Cluster
    intra: LinkFit | None
    inter: LinkFit | None


def fit_link(points: Sequence[Point]) -> LinkFit:
    """Fits the rate to the large messages and the latency to the small ones, in turn until both hold.

    Least squares over all points are only where it starts: networks let small messages pass in bursts, above their
    rate, and those would pull the line.

    Args:
        points: Measurements of small and of large messages.
    """
    most = max(point.sent for point in points)
    large = [point for point in points if point.sent >= _LARGE_SHARE * most]
    small = [point for point in points if point.sent <= _SMALL_SHARE * most] or list(points)
    latency = _least_squares_latency(points)
    for _ in range(_FITS):
        rate = statistics.median(p.sent / max(p.seconds - latency * p.steps, 0.1 * p.seconds) for p in large)
        latency = statistics.median(max(p.seconds - p.sent / rate, 0.0) / p.steps for p in small)
    errors = [abs(latency * p.steps + p.sent / rate - p.seconds) / p.seconds for p in points]
    return LinkFit(latency, rate, statistics.median(errors), tuple(points))


def _least_squares_latency(points: Sequence[Point]) -> float:
    """Returns the latency of the line with the least relative errors; 0 if there is no such line."""
    steps = [point.steps / point.seconds for point in points]
    sent = [point.sent / point.seconds for point in points]
    squares, mixed, sent_squares = (
        sum(map(operator.mul, left, right)) for left, right in ((steps, steps), (steps, sent), (sent, sent))
    )
    determinant = squares * sent_squares - mixed**2
    if determinant <= 1e-9 * squares * sent_squares:  # messages of one size
        return 0.0
    return max(0.0, (sum(steps) * sent_squares - sum(sent) * mixed) / determinant)


def measure_cluster(
    *,
    layer: tuple[int, int] | None = None,
    dtype: str = "float32",
    assumed: Cluster | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measures links, compute and memory. Collective over the world; the answer is the same on all ranks.

    Args:
        layer: Hidden size and tokens of the transformer layer whose passes tell the rate of compute; by default those
            of a middling model.
        dtype: Dtype of the computation.
        assumed: What holds for links that cannot be measured: between nodes with one node, inside nodes of one rank.
        progress: Told what is measured next.

    Raises:
        MiCSConfigError: If no process group is running.
    """
    _require_ranks()
    tell = progress or (lambda text: None)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = communication_device(device_type)
    topology = detect_topology()
    mesh = build_mesh(MiCSConfig(hierarchical=False), topology.layout("node"), device_type)
    intra = inter = None
    if topology.node_size > 1:
        tell("the links inside nodes")
        intra = fit_link([*_points(mesh.partition_group, topology.node_size, 1, device, between_nodes=False)])
    if topology.num_nodes > 1:
        tell("the links between nodes")
        # Ranks with the same place in their nodes, all places at once.
        groups, lanes = mesh.replication_group, topology.node_size
        inter = fit_link([*_points(groups, topology.num_nodes, lanes, device, between_nodes=True)])
    tell("what a rank computes")
    source = _source(device_type)
    accelerator = _measure_accelerator(topology, device, layer, dtype, source)
    node = Node(
        name="measured",
        accelerator=accelerator,
        num_accelerators=topology.node_size,
        intra=_link(intra, inter, assumed.node.intra if assumed else None, source),
        inter=_link(inter, intra, assumed.node.inter if assumed else None, source),
        source=source,
        host=assumed.node.host if assumed else find_host("ordinary"),
    )
    return Measurement(Cluster(node=node, num_nodes=topology.num_nodes), intra, inter)


def _require_ranks() -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise MiCSConfigError(
            "Measuring needs a process for each accelerator, and torch.distributed is not initialised. Start on each "
            "node: torchrun --nproc-per-node 8 -m lightning_mics plan --measure --model gpt2 (with several nodes also "
            "--nnodes and --rdzv-endpoint), or call torch.distributed.init_process_group() in a script of torchrun."
        )


def _source(device_type: str) -> str:
    today = datetime.date.today().isoformat()
    return f"measured on {today} with torch {torch.__version__}, {dist.get_backend()}, {device_type}"


def _link(fit: LinkFit | None, other: LinkFit | None, assumed: Link | None, source: str) -> Link:
    """Returns a link; one that does not exist here is assumed, or else like the other one."""
    if fit is None and assumed is not None:
        return replace(assumed, source=f"assumed: {assumed.source}")
    known = fit or other
    if known is None:
        return Link(bandwidth=1e9, efficiency=1.0, latency=1e-5, source="assumed: there is one rank")
    words = source if fit is not None else f"{source}; as the only link that there is"
    return Link(bandwidth=known.rate, efficiency=1.0, latency=known.latency, source=words)


# Links.


def _points(
    group: dist.ProcessGroup, ranks: int, lanes: int, device: torch.device, *, between_nodes: bool
) -> Iterator[Point]:
    """Times collectives of groups of ``ranks``, of which ``lanes`` share a link."""
    carrier = transport_for(group, device.type)
    gather, reduce_scatter = carrier.all_gather([group]), carrier.reduce_scatter([group])
    message, slowest = _SMALLEST, 0.0
    while message <= _LARGEST[device.type] and slowest <= _LONGEST_SECONDS:
        shard = torch.zeros(max(1, message // (4 * ranks)), device=device)
        whole = torch.zeros(shard.numel() * ranks, device=device)
        sent = lanes * (ranks - 1) * shard.nbytes
        calls = (
            functools.partial(gather, whole, shard, group),
            functools.partial(reduce_scatter, shard, whole, group, dist.ReduceOp.AVG),
        )
        seconds = [_time(call, device) for call in calls]
        yield from (Point(ranks - 1, sent, taken) for taken in seconds)
        if between_nodes and device.type == "cpu":  # NCCL may take trees, whose steps are others
            yield Point(
                2 * (ranks - 1), 2 * sent, _time(functools.partial(dist.all_reduce, whole, group=group), device)
            )
        message, slowest = message * _GROWTH, _GROWTH * max(seconds)


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call: the median over rounds of what the slowest rank takes."""
    call()  # makes connections
    # All ranks know the slowest one's time, and so go on alike.
    first = across_ranks([timed(call, device)], device)[0]
    count = max(1, min(_MOST_CALLS, round(_ROUND_SECONDS / first)))
    rounds = max(_ROUNDS[0], min(_ROUNDS[1], int(_LONGEST_SECONDS / first)))
    timed(call, device, count)  # takes what a link lets pass above its rate, which comes back while ranks talk
    return statistics.median(across_ranks([timed(call, device, count) for _ in range(rounds)], device))


# Compute and memory.


def _measure_accelerator(
    topology: ClusterTopology, device: torch.device, layer: tuple[int, int] | None, dtype: str, source: str
) -> Accelerator:
    default = (1024, 512) if device.type == "cpu" else (4096, 4096)
    achieved, overhead = _measure_layer(*(layer or default), dtype, device)
    product = _product_flops(dtype, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    memory = device_memory(device) if device.type == "cuda" else free_host_memory() // topology.node_size
    known = find_accelerator(name, memory)
    peaks = dict(known.peak_flops) if known is not None else {dtype: max(product, achieved)}
    return Accelerator(
        name=name,
        memory=int(across_ranks([memory], device, dist.ReduceOp.MIN)[0]),
        peak_flops=peaks,
        memory_bandwidth=_copy_rate(device),
        compute_efficiency=min(1.0, achieved / peaks.get(dtype, max(product, achieved))),
        device_type=device.type,
        unit_overhead=overhead,
        source=source,
    )


def _measure_layer(width: int, tokens: int, dtype: str, device: torch.device) -> tuple[float, float]:
    """Returns the FLOP/s of a transformer layer's passes, and the seconds that a pass takes longer as an FSDP unit."""
    heads, kind = max(1, width // 64), as_dtype(dtype)
    layers = [
        nn.TransformerEncoderLayer(
            width, heads if width % heads == 0 else 1, 4 * width, dropout=0.0, batch_first=True, dtype=kind
        )
        for _ in range(_LAYERS)
    ]
    model = nn.Sequential(*layers).to(device)
    hidden = torch.randn(1, tokens, width, device=device, dtype=kind, requires_grad=True)

    def passes() -> None:
        model(hidden).sum().backward()

    with FlopCounterMode(display=False) as counter:
        passes()
    seconds = _time_compute(passes, device)
    if device.type != "cpu":
        return counter.get_total_flops() / seconds, 0.0
    with one_rank_mesh() as mesh:
        for module in [*layers, model]:
            fully_shard(module, mesh=mesh)
        overhead = (_time_compute(passes, device) - seconds) / (2 * _LAYERS)
    return counter.get_total_flops() / seconds, max(0.0, overhead)


def _product_flops(dtype: str, device: torch.device) -> float:
    size = 512 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device, dtype=as_dtype(dtype))
    return 2 * size**3 / _time_compute(lambda: left @ left, device)


def _copy_rate(device: torch.device) -> float:
    """Returns the bytes a second that a copy reads and writes."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _time_compute(lambda: target.copy_(source), device)


def _time_compute(call: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call on the slowest rank, with all ranks at it at the same time."""
    call()
    once = across_ranks([timed(call, device)], device)[0]
    return across_ranks([timed(call, device, max(2, round(_COMPUTE_SECONDS / once)))], device)[0]
