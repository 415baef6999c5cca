"""``hierarchical="auto"``: measures on the cluster at hand which messages gain from two stages.

Two stages send fewer bytes out of a node and take fewer slow hops, but more hops in all: small messages on few nodes
can be faster in one. So the collectives are timed with messages of the units' own sizes, before training, once for
each size. All ranks decide alike, from the slowest rank's times.
"""

from __future__ import annotations

import functools
import socket
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics.core import transport
from lightning_mics.core.log import inform
from lightning_mics.core.mesh import MiCSMesh, StageTiming, communication_device
from lightning_mics.core.timing import across_ranks, timed

_SMALLEST = 2**12
# Above, two stages are taken without measuring: latency matters no more, and they send less over slow links.
_LARGEST = {"cpu": 2**24}
_LARGEST_ON_ACCELERATORS = 2**28
_REPEATS = 5
_BUDGET_SECONDS = 0.5


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
    device = communication_device(mesh.device_mesh.device_type)
    group, size = mesh.partition_group, mesh.layout.shard_size
    carrier = transport.transport_for(group, device.type)
    shard = torch.zeros(max(1, message_bytes // (4 * size)), dtype=torch.float32, device=device)
    whole = torch.zeros(shard.numel() * size, dtype=torch.float32, device=device)

    def run(gather: Any, reduce: Any) -> None:
        gather(whole, shard, group)
        gather(whole, shard, group)
        reduce(shard, whole, group, dist.ReduceOp.AVG)

    ways = [
        functools.partial(run, carrier.all_gather(stages), carrier.reduce_scatter(stages))
        for stages in (mesh.stages(False), mesh.stages(True))
    ]

    def time_both() -> list[float]:
        return [timed(way, device) for way in ways]

    time_both()  # makes connections
    rounds = [time_both()]
    if max(across_ranks(rounds[0], device)) * _REPEATS < _BUDGET_SECONDS:
        rounds += [time_both() for _ in range(_REPEATS - 1)]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return StageTiming(message_bytes, *across_ranks(medians, device))
