"""Measures the cluster that a process group runs on, for the planner: its links, and what a rank computes.

The collectives are those of training: gathers inside nodes, gathers and all-reduces across them, with all groups of the
cluster at the same time. Each takes ``steps * alpha + bytes / rate`` (see :mod:`lightning_mics.plan.cost`); the two
constants of a link are fitted to messages of many sizes.
"""

from __future__ import annotations

import datetime
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mics.collectives import FlatAllGather
from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.mesh import MiCSMesh, build_mesh, communication_device, detect_topology, require_process_group
from lightning_mics.plan.hardware import Accelerator, Cluster, Link, Node, find_accelerator
from lightning_mics.resources import device_memory, free_host_memory
from lightning_mics.topology import ClusterTopology

Progress = Callable[[str], None]

_SMALLEST = 2**12
_LARGEST = {"cpu": 2**22, "cuda": 2**28}
# Larger messages are left out where one of this size takes so long.
_LONGEST_SECONDS = 0.4
_REPEATS = 5
# Back to back, so that waiting for each other weighs little.
_CHAIN = 3
_LARGE_SHARE, _SMALL_SHARE = 1 / 16, 1 / 128
_FITS = 5
_COMPUTE_SECONDS = 0.5
_COPY_BYTES = 2**26


@dataclass(frozen=True)
class Point:
    """One measurement of a collective.

    Attributes:
        steps: Steps of its ring.
        sent: Bytes on its busiest link: of a rank inside a node, of a node between nodes.
        seconds: Median of what the slowest rank took.
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

    Not all points at once by least squares: networks let small messages pass in bursts, above their rate, and those
    would pull the line.

    Args:
        points: Measurements of small and of large messages.
    """
    most = max(point.sent for point in points)
    large = [point for point in points if point.sent >= _LARGE_SHARE * most]
    small = [point for point in points if point.sent <= _SMALL_SHARE * most] or list(points)
    latency = 0.0
    for _ in range(_FITS):
        rate = statistics.median(p.sent / max(p.seconds - latency * p.steps, 0.1 * p.seconds) for p in large)
        latency = statistics.median(max(p.seconds - p.sent / rate, 0.0) / p.steps for p in small)
    errors = [abs(latency * p.steps + p.sent / rate - p.seconds) / p.seconds for p in points]
    return LinkFit(latency, rate, statistics.median(errors), tuple(points))


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
        MiCSError: If no process group is running.
    """
    require_process_group()
    tell = progress or (lambda text: None)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = communication_device(device_type)
    topology = detect_topology()
    mesh = build_mesh(MiCSConfig(hierarchical=False), topology.layout("node"), device_type)
    intra = inter = None
    if topology.node_size > 1:
        tell("the links inside nodes")
        intra = fit_link([*_intra_points(mesh, device)])
    if topology.num_nodes > 1:
        tell("the links between nodes")
        inter = fit_link([*_inter_points(mesh, device)])
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
    )
    return Measurement(Cluster(node=node, num_nodes=topology.num_nodes), intra, inter)


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


def _intra_points(mesh: MiCSMesh, device: torch.device) -> Iterator[Point]:
    size, gather = mesh.layout.shard_size, FlatAllGather()
    for message in _messages(device):
        shard, whole = _buffers(message, size, device)
        call = functools.partial(gather, whole, shard, mesh.partition_group)
        seconds = _time(call, device)
        yield Point(size - 1, (size - 1) * shard.nbytes, seconds)
        if seconds > _LONGEST_SECONDS:
            return


def _inter_points(mesh: MiCSMesh, device: torch.device) -> Iterator[Point]:
    """Gathers and all-reduces of ranks with the same place in their nodes, all places at once."""
    layout, gather = mesh.layout, FlatAllGather()
    nodes, ranks, group = layout.num_replicas, layout.shard_size, mesh.replication_group
    for message in _messages(device):
        shard, whole = _buffers(message, nodes, device)
        gathers = functools.partial(gather, whole, shard, group)
        seconds = _time(gathers, device)
        yield Point(nodes - 1, ranks * (nodes - 1) * shard.nbytes, seconds)
        reduces = functools.partial(dist.all_reduce, whole, group=group)
        sent = ranks * 2 * (nodes - 1) / nodes * whole.nbytes
        yield Point(2 * (nodes - 1), sent, _time(reduces, device))
        if seconds > _LONGEST_SECONDS:
            return


def _messages(device: torch.device) -> Iterator[int]:
    size = _SMALLEST
    while size <= _LARGEST.get(device.type, _LARGEST["cuda"]):
        yield size
        size *= 4


def _buffers(message: int, ranks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    shard = torch.zeros(max(1, message // (4 * ranks)), device=device)
    return shard, torch.zeros(shard.numel() * ranks, device=device)


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call: the median over rounds of what the slowest rank takes."""
    synchronize = torch.get_device_module(device.type).synchronize
    call()  # makes connections
    seconds = []
    for _ in range(_REPEATS):
        dist.barrier()
        synchronize()
        begin = time.perf_counter()
        for _ in range(_CHAIN):
            call()
        synchronize()
        # All ranks know the slowest one's time, and so stop alike.
        seconds.append(_slowest((time.perf_counter() - begin) / _CHAIN, device))
        if seconds[0] > _LONGEST_SECONDS:
            break
    return statistics.median(seconds)


def _slowest(seconds: float, device: torch.device) -> float:
    return max(_everywhere(seconds, device))


# Compute and memory.


def _measure_accelerator(
    topology: ClusterTopology, device: torch.device, layer: tuple[int, int] | None, dtype: str, source: str
) -> Accelerator:
    default = (1024, 512) if device.type == "cpu" else (4096, 4096)
    achieved = _achieved_flops(*(layer or default), dtype, device)
    product = _product_flops(dtype, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    memory = device_memory(device) if device.type == "cuda" else free_host_memory() // topology.node_size
    known = find_accelerator(name, memory)
    peaks = dict(known.peak_flops) if known is not None else {dtype: max(product, achieved)}
    return Accelerator(
        name=name,
        memory=int(min(_everywhere(float(memory), device))),
        peak_flops=peaks,
        memory_bandwidth=_copy_rate(device),
        compute_efficiency=min(1.0, achieved / peaks.get(dtype, max(peaks.values()))),
        device_type=device.type,
        source=source,
    )


def _achieved_flops(width: int, tokens: int, dtype: str, device: torch.device) -> float:
    """Returns the FLOP/s of a transformer layer's passes, with all ranks at it at the same time."""
    heads = max(1, width // 64)
    kind = as_dtype(dtype)
    block = nn.TransformerEncoderLayer(
        width, heads if width % heads == 0 else 1, 4 * width, dropout=0.0, batch_first=True, device=device, dtype=kind
    )
    hidden = torch.randn(1, tokens, width, device=device, dtype=kind, requires_grad=True)

    def passes() -> None:
        block(hidden).sum().backward()

    with FlopCounterMode(display=False) as counter:
        passes()
    return counter.get_total_flops() / _time_compute(passes, device)


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
    """Returns the seconds of one call, with all ranks at it at the same time; the mean over ranks."""
    synchronize = torch.get_device_module(device.type).synchronize
    call()
    synchronize()
    dist.barrier()
    begin, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - begin < _COMPUTE_SECONDS:
        call()
        synchronize()
        count += 1
    return statistics.mean(_everywhere((time.perf_counter() - begin) / count, device))


def _everywhere(value: float, device: torch.device) -> list[float]:
    """Returns the value of each rank."""
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return values.tolist()
