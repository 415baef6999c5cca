"""``hierarchical="auto"``: measures on the cluster at hand which messages gain from two stages.

Two stages send fewer bytes out of a node and take fewer slow hops, but more hops in all: small messages on few nodes
can be faster in one. So the collectives are timed with messages of the units' own sizes, before training, once for
each size. All ranks decide alike, from the slowest rank's times.
"""

from __future__ import annotations

import functools
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics.core.collectives import (
    FlatAllGather,
    FlatReduceScatter,
    HierarchicalAllGather,
    HierarchicalReduceScatter,
)
from lightning_mics.core.log import inform
from lightning_mics.core.mesh import MiCSMesh, communication_device
from lightning_mics.metrics import format_bytes

_SMALLEST = 2**12
# Above, two stages are taken without measuring: latency matters no more, and they send less over slow links.
_LARGEST = {"cpu": 2**24}
_LARGEST_ON_ACCELERATORS = 2**28
_REPEATS = 5
_BUDGET_SECONDS = 0.5
# One stage must win clearly: it sends more out of every node, which other traffic feels.
_CLEARLY = 0.95


@dataclass(frozen=True)
class StageTiming:
    """What a unit's collectives in one microstep (two gathers, one reduce-scatter) take.

    Attributes:
        message_bytes: Size of the message.
        one_stage: Seconds with flat collectives.
        two_stages: Seconds with hierarchical collectives.
    """

    message_bytes: int
    one_stage: float
    two_stages: float

    @property
    def prefers_two_stages(self) -> bool:
        """Whether two stages are to be used."""
        return self.one_stage > _CLEARLY * self.two_stages

    def __str__(self) -> str:
        choice = "two stages" if self.prefers_two_stages else "one stage"
        times = f"one stage {self.one_stage * 1e3:.2f} ms, two stages {self.two_stages * 1e3:.2f} ms"
        return f"{format_bytes(self.message_bytes)}: {times}; using {choice}"


def choose_stages(mesh: MiCSMesh, message_bytes: Sequence[int]) -> list[bool]:
    """Returns for each unit whether its collectives run in two stages. Collective over the world.

    What was measured before in this process is not measured again.

    Args:
        mesh: The groups; with those inside and across nodes.
        message_bytes: Sizes of the units' gathered parameters, the same on all ranks.
    """
    if not _has_links_to_measure(mesh):
        return [True] * len(message_bytes)
    largest = _LARGEST.get(mesh.device_mesh.device_type, _LARGEST_ON_ACCELERATORS)
    classes = [_size_class(count) for count in message_bytes]
    for size in sorted({size for size in classes if size <= largest} - mesh.timings.keys()):
        mesh.timings[size] = _measure(mesh, size)
        inform(f"hierarchical='auto' measured {mesh.timings[size]}")
    return [size > largest or mesh.timings[size].prefers_two_stages for size in classes]


def _has_links_to_measure(mesh: MiCSMesh) -> bool:
    """Returns whether nodes are machines of their own; those of a rehearsal on one machine have no slow links."""
    if dist.get_backend() == "fake":
        return False
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return len(set(hosts)) == mesh.layout.topology.num_nodes


def _size_class(message_bytes: int) -> int:
    """Returns the next power of two."""
    return max(1 << (message_bytes - 1).bit_length(), _SMALLEST)


def _measure(mesh: MiCSMesh, message_bytes: int) -> StageTiming:
    assert mesh.intra_group is not None and mesh.inter_group is not None
    flat = (FlatAllGather(), FlatReduceScatter())
    staged = (
        HierarchicalAllGather(mesh.intra_group, mesh.inter_group),
        HierarchicalReduceScatter(mesh.intra_group, mesh.inter_group),
    )
    device = communication_device(mesh.device_mesh.device_type)
    group, size = mesh.partition_group, mesh.layout.shard_size
    shard = torch.zeros(max(1, message_bytes // (4 * size)), dtype=torch.float32, device=device)
    whole = torch.zeros(shard.numel() * size, dtype=torch.float32, device=device)

    def run(gather: Any, reduce: Any) -> None:
        gather(whole, shard, group)
        gather(whole, shard, group)
        reduce(shard, whole, group, dist.ReduceOp.AVG)

    def time_both() -> list[float]:
        return [_timed(functools.partial(run, *pair), device) for pair in (flat, staged)]

    time_both()  # makes connections
    rounds = [time_both()]
    if max(_slowest(rounds[0], device)) * _REPEATS < _BUDGET_SECONDS:
        rounds += [time_both() for _ in range(_REPEATS - 1)]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return StageTiming(message_bytes, *_slowest(medians, device))


def _timed(call: Callable[[], None], device: torch.device) -> float:
    synchronize: Callable[[], Any] = torch.get_device_module(device.type).synchronize
    dist.barrier()
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def _slowest(seconds: Sequence[float], device: torch.device) -> list[float]:
    tensor = torch.tensor(list(seconds), dtype=torch.float32, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
