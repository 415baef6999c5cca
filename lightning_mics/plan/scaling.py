"""Weak scaling: the same work on each rank of a cluster with fewer or more nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from lightning_mics.plan.evaluate import Plan, evaluate
from lightning_mics.plan.search import Planning

# The curves go on to this many times the cluster, to show what a larger one would bring.
_BEYOND = 4


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """One way to train on one number of nodes.

    Attributes:
        label: What to call the way to train, the same for all numbers of nodes.
        num_nodes: Number of nodes.
        plan: What is predicted there.
        efficiency: Throughput of a node, relative to the smallest cluster on which this way to train can run; ``None``
            where it does not fit.
    """

    label: str
    num_nodes: int
    plan: Plan = field(repr=False)
    efficiency: float | None = None


def default_nodes(num_nodes: int) -> list[int]:
    """Returns 1, 2, 4 ... up to the nodes of a cluster, and to four times of them."""
    counts = {num_nodes * times for times in (1, 2, _BEYOND)}
    count = 1
    while count < num_nodes:
        counts.add(count)
        count *= 2
    return sorted(counts)


def weak_scaling(planning: Planning, nodes: Iterable[int], ways: Iterable[Plan] | None = None) -> list[ScalingPoint]:
    """Predicts plans on other numbers of nodes.

    Micro-batch, accumulation and all other settings of a rank stay the same, so that the global batch grows with the
    nodes. Full sharding goes over all ranks that there are.

    Args:
        planning: The answer of the planner.
        nodes: Numbers of nodes.
        ways: Plans to predict there; by default the best one and the ways to compare it with.

    Returns:
        Points, by way to train and nodes. Numbers of nodes that a partition cannot work on are left out.

    Raises:
        MiCSConfigError: If no plan fits.
    """
    counts = sorted(set(nodes))
    ways = [planning.best, *planning.contenders] if ways is None else ways
    return [point for way in ways for point in _with_efficiency(list(_points(planning, way, counts)))]


def _points(planning: Planning, way: Plan, counts: Iterable[int]) -> Iterator[ScalingPoint]:
    profile, training, candidate = planning.profile, planning.training, way.candidate
    for count in counts:
        cluster = planning.cluster.with_nodes(count)
        if candidate.scheme == "full-sharding":
            candidate = replace(candidate, shard_size=cluster.world_size)
        if way.candidate.optimizer_shard_size == way.world_size:
            candidate = replace(candidate, optimizer_shard_size=cluster.world_size)
        divides = cluster.world_size % (candidate.optimizer_shard_size or candidate.shard_size) == 0
        if divides and candidate.shard_size in cluster.topology.valid_shard_sizes():
            plan = evaluate(profile, cluster, candidate, training, memory_limit=way.memory_limit)
            yield ScalingPoint(label=way.candidate.label, num_nodes=count, plan=plan)


def _with_efficiency(points: list[ScalingPoint]) -> Iterator[ScalingPoint]:
    first = next((point for point in points if point.plan.fits), None)
    for point in points:
        if first is None or not point.plan.fits:
            yield point
            continue
        of_a_node = point.plan.samples_per_second / point.num_nodes
        yield replace(point, efficiency=of_a_node * first.num_nodes / first.plan.samples_per_second)
