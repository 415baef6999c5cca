"""Which plans fit, which is the fastest, and why the others do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.evaluate import Plan, evaluate
from lightning_mics.plan.hardware import Cluster
from lightning_mics.plan.memory import MemoryBreakdown, predict_memory
from lightning_mics.plan.profile import ModelProfile
from lightning_mics.plan.settings import Candidate, Training
from lightning_mics.text import format_bytes

# Kept free for activations where nothing is known of them.
UNKNOWN_ACTIVATIONS = 0.2
_MOST_NODES = 4096


def usable_memory(limit: float, *, knows_activations: bool) -> float:
    """Returns the bytes that what is predicted may take of those that a rank has."""
    return limit if knows_activations else limit * (1 - UNKNOWN_ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A candidate that needs more memory than a rank has.

    Attributes:
        candidate: The settings.
        memory: What it would need.
        memory_limit: What there is, in bytes.
    """

    candidate: Candidate
    memory: MemoryBreakdown
    memory_limit: float

    @property
    def reason(self) -> str:
        """Why it does not fit, for example ``"p=8 needs 61.2 GiB of 40.0 GiB"``."""
        needed, limit = format_bytes(self.memory.total), format_bytes(self.memory_limit)
        return f"p={self.candidate.shard_size} needs {needed} of {limit}"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the search may vary.

    Attributes:
        batches: Pairs of micro-batch and accumulation.
        shard_sizes: Partition sizes; those that work on the cluster by default.
        hierarchical: Whether to run partition collectives in two stages; both are tried by default.
        activation_checkpointing: The same for recomputing blocks in the backward pass.
        reshard_after_forward: The same for freeing blocks after the forward pass.
        memory_limit: Bytes that a rank has; by default those of the accelerator.
    """

    batches: Sequence[tuple[int, int]]
    shard_sizes: Sequence[int] | None = None
    hierarchical: bool | None = None
    activation_checkpointing: bool | None = None
    reshard_after_forward: bool | None = None
    memory_limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Planning:
    """The answer of the planner.

    Attributes:
        profile: The model.
        cluster: The hardware.
        training: Dtypes and the optimizer.
        choices: What the search could vary.
        plans: What fits, the fastest first.
        misfits: What does not fit, the closest first.
        contenders: Other ways to train with the batch of the best plan, whether they fit or not.
    """

    profile: ModelProfile = field(repr=False)
    cluster: Cluster
    training: Training
    choices: Choices
    plans: Sequence[Plan]
    misfits: Sequence[Misfit] = field(repr=False)
    contenders: Sequence[Plan] = field(default=(), repr=False)

    @property
    def memory_limit(self) -> float:
        """Bytes that a plan may take."""
        given = self.choices.memory_limit
        limit = self.cluster.node.accelerator.memory if given is None else given
        return usable_memory(limit, knows_activations=self.profile.knows_activations)

    @property
    def best(self) -> Plan:
        """The fastest plan.

        Raises:
            MiCSConfigError: If none fits: with the closest one, and what would make it fit.
        """
        self._require()
        return self.plans[0]

    @property
    def smallest(self) -> Plan:
        """The fastest plan among those with the smallest partition.

        Raises:
            MiCSConfigError: If none fits.
        """
        self._require()
        return min(self.plans, key=lambda plan: (plan.candidate.shard_size, plan.time.seconds / plan.global_batch))

    def _require(self) -> None:
        if not self.plans:
            raise MiCSConfigError(explain_misfit(self))


def search(profile: ModelProfile, cluster: Cluster, training: Training, choices: Choices) -> Planning:
    """Tries all candidates.

    Args:
        profile: The model.
        cluster: The hardware.
        training: Dtypes and the optimizer.
        choices: What may vary.

    Raises:
        MiCSConfigError: If a shard size cannot work on the cluster.
    """
    planning = Planning(profile=profile, cluster=cluster, training=training, choices=choices, plans=[], misfits=[])
    limit = planning.memory_limit
    plans, misfits = [], []
    for candidate in _candidates(profile, cluster, choices):
        memory = predict_memory(profile, candidate, training, cluster.node.accelerator)
        if memory.total > limit:
            misfits.append(Misfit(candidate=candidate, memory=memory, memory_limit=limit))
            continue
        plans.append(evaluate(profile, cluster, candidate, training, memory=memory, memory_limit=limit))
    # Among plans of the same speed, small partitions and simple settings come first.
    plans.sort(key=lambda plan: (-float(f"{plan.samples_per_second:.3g}"), _simplicity(plan.candidate)))
    misfits.sort(key=lambda misfit: misfit.memory.total)
    contenders = _contenders(profile, cluster, training, plans[0], limit) if plans else []
    return replace(planning, plans=plans, misfits=misfits, contenders=contenders)


def _simplicity(candidate: Candidate) -> tuple[int, bool, bool, bool, int]:
    return (
        candidate.shard_size,
        candidate.activation_checkpointing,
        not candidate.reshard_after_forward,
        candidate.hierarchical,
        -candidate.micro_batch,
    )


def _candidates(profile: ModelProfile, cluster: Cluster, choices: Choices) -> Iterator[Candidate]:
    topology = cluster.topology
    sizes = choices.shard_sizes or topology.valid_shard_sizes()
    # What makes no difference to a model is not tried.
    recomputes = _both(choices.activation_checkpointing, any(block.can_checkpoint for block in profile.blocks))
    reshards_or_not = _both(choices.reshard_after_forward, bool(profile.blocks), otherwise=True)
    for size, batch, checkpoints, reshards in itertools.product(sizes, choices.batches, recomputes, reshards_or_not):
        layout = topology.layout(size)
        staged = [False]
        if layout.spans_nodes and layout.local_size > 1:
            staged = _both(choices.hierarchical, True)
        for hierarchical in staged:
            yield Candidate(
                shard_size=size,
                hierarchical=hierarchical,
                micro_batch=batch[0],
                accumulation=batch[1],
                activation_checkpointing=checkpoints,
                reshard_after_forward=reshards,
            )


def _both(choice: bool | None, matters: bool, otherwise: bool = False) -> list[bool]:
    if choice is not None:
        return [choice]
    return [False, True] if matters else [otherwise]


def _contenders(profile: ModelProfile, cluster: Cluster, training: Training, best: Plan, limit: float) -> list[Plan]:
    """Other ways to train, with the batch and the settings of the best plan."""
    same = replace(best.candidate, hierarchical=False)
    others = [
        replace(same, scheme="full-sharding", shard_size=cluster.world_size),
        replace(same, scheme="mesh-2d"),
        replace(same, scheme="ddp", shard_size=1),
    ]
    return [evaluate(profile, cluster, other, training, memory_limit=limit) for other in others]


def explain_misfit(planning: Planning) -> str:
    """Says that nothing fits: how close the closest candidate comes, and what would make it fit."""
    if not planning.misfits:
        return "There is nothing to plan: no candidate is left. Give fewer settings."
    closest = planning.misfits[0]
    parts = sorted(closest.memory.parts().items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts[:3])
    advice = "; ".join(_remedies(planning, closest))
    return (
        f"{planning.profile.name} does not fit into {format_bytes(closest.memory_limit)} a rank on "
        f"{planning.cluster.num_nodes} node(s) x {planning.cluster.node.num_accelerators}. The closest plan, "
        f"{describe(closest.candidate)}, needs {format_bytes(closest.memory.total)} ({largest}). What would make it "
        f"fit: {advice}."
    )


def describe(candidate: Candidate) -> str:
    """Returns a candidate in words, for example ``"p=8 with micro-batches of 2"``."""
    words = f"p={candidate.shard_size} with micro-batches of {candidate.micro_batch}"
    return words + (" and activation checkpointing" if candidate.activation_checkpointing else "")


def _remedies(planning: Planning, closest: Misfit) -> Iterator[str]:
    """Yields changes that make the closest candidate fit, each alone, then more nodes."""
    candidate, cluster = closest.candidate, planning.cluster
    alternatives: list[dict[str, dict[str, Any]]] = [{}, {}, {}]
    if not candidate.activation_checkpointing:
        alternatives[0]["activation_checkpointing=True"] = {"activation_checkpointing": True}
    size, nodes = candidate.micro_batch, cluster.num_nodes
    while size > 1:
        size //= 2
        alternatives[1][f"micro-batches of {size}"] = {"micro_batch": size}
    while nodes < _MOST_NODES:
        nodes *= 2
        ranks = nodes * cluster.node.num_accelerators
        alternatives[2][f"{nodes} nodes, shard_size={ranks}"] = {"shard_size": ranks}
    for changes in alternatives:
        for words, changed in changes.items():
            other = replace(candidate, **changed)
            needed = predict_memory(planning.profile, other, planning.training, cluster.node.accelerator).total
            if needed <= closest.memory_limit:
                yield f"{words} ({format_bytes(needed)})"
                break
    yield f"accelerators with {format_bytes(closest.memory.total)} of memory"
