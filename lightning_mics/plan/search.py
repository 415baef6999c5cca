"""Which plans fit, which is the fastest, and why the others do not fit."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lightning_mics.errors import MiCSConfigError
from lightning_mics.metrics import Hop, Traffic
from lightning_mics.plan.evaluate import Plan, evaluate, inter_bytes, partition_inter_bytes, predict_traffic
from lightning_mics.plan.hardware import Cluster
from lightning_mics.plan.memory import MemoryBreakdown, predict_memory
from lightning_mics.plan.profile import Amount, ModelProfile
from lightning_mics.plan.settings import Candidate, MasterWeights, Recomputation, Training
from lightning_mics.text import format_bytes
from lightning_mics.topology import GroupLayout, OptimizerShardSize

# Kept free for activations where nothing is known of them.
UNKNOWN_ACTIVATIONS = 0.2
# The median error of the ratio of two predicted step times (docs/results/planner-step-time.md): plans that differ by
# less are as fast as each other for all that is known.
ERROR = 0.04
RANKINGS = ("advice", "throughput")
_MOST_NODES = 4096
# Partitions that divide optimizer states, where it is not all of more.
_FEW_INSTANCES = 8


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
        optimizer_shard_size: Ranks that divide optimizer states, as :class:`~lightning_mics.MiCSConfig` has it; by
            default those of the partition, and all where that does not fit or sends less.
        master_weights: Where float32 values of parameters are if optimizer states are divided further, as
            :class:`~lightning_mics.MiCSConfig` has it; by default with their owners, where the precision has such.
        hierarchical: Whether to run partition collectives in two stages; both are tried by default.
        activation_checkpointing: Which blocks to compute again in the backward pass, as
            :class:`~lightning_mics.plan.Candidate` has it; none, all, and all but their products are tried by default.
        activation_checkpointing_offload: Whether what blocks that are computed again keep waits in host memory.
        reshard_after_forward: Whether to free blocks after the forward pass; both are tried by default.
        memory_limit: Bytes that a rank has; by default those of the accelerator.
        ranking: Among plans whose step times differ by less than the error of the prediction, ``"advice"`` puts those
            first that send the fewest bytes out of a node (in every microstep, then in the step), then small
            partitions, then free memory. ``"throughput"`` goes by predicted throughput alone.
    """

    batches: Sequence[tuple[int, int]]
    shard_sizes: Sequence[int] | None = None
    optimizer_shard_size: OptimizerShardSize | None = None
    master_weights: MasterWeights | None = None
    hierarchical: bool | None = None
    activation_checkpointing: Recomputation | None = None
    activation_checkpointing_offload: bool = False
    reshard_after_forward: bool | None = None
    memory_limit: float | None = None
    ranking: str = "advice"

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise MiCSConfigError(f"ranking={self.ranking!r} is unknown. Values that work: 'advice', 'throughput'.")


@dataclass(frozen=True, kw_only=True)
class Planning:
    """The answer of the planner.

    Attributes:
        profile: The model.
        cluster: The hardware.
        training: Dtypes and the optimizer.
        choices: What the search could vary.
        plans: What fits, the best first.
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

    @cached_property
    def under(self) -> dict[tuple[Candidate, object], Plan]:
        """Plans under other conditions, as far as :mod:`lightning_mics.plan.sensitivity` has worked them out."""
        return {}

    @property
    def memory_limit(self) -> float:
        """Bytes that a plan may take."""
        given = self.choices.memory_limit
        limit = self.cluster.node.accelerator.memory if given is None else given
        return usable_memory(limit, knows_activations=self.profile.knows_activations)

    @property
    def best(self) -> Plan:
        """The plan to take: the first in the ranking.

        Raises:
            MiCSConfigError: If none fits: with the closest one, and what would make it fit.
        """
        self._require()
        return self.plans[0]

    @property
    def fastest(self) -> Plan:
        """The plan of the highest predicted throughput.

        Raises:
            MiCSConfigError: If none fits.
        """
        self._require()
        return min(self.plans, key=by_throughput)

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
    plans, misfits, fits = [], [], set()
    for candidate in _candidates(profile, cluster, training, choices):
        divides = candidate.slices > 1 and not candidate.has_owners
        if divides and replace(candidate, optimizer_shard_size=None) in fits:
            continue  # it sends as much as without, and what fits without needs no division
        memory = predict_memory(profile, candidate, training, cluster.node.accelerator)
        if memory.total > limit:
            misfits.append(Misfit(candidate=candidate, memory=memory, memory_limit=limit))
            continue
        fits.add(candidate)
        plans.append(evaluate(profile, cluster, candidate, training, memory=memory, memory_limit=limit))
    plans.sort(key=by_throughput)
    plans = plans if choices.ranking == "throughput" else _advised(plans)
    misfits.sort(key=lambda misfit: misfit.memory.total)
    contenders = _contenders(profile, cluster, training, plans[0], limit) if plans else []
    return replace(planning, plans=plans, misfits=misfits, contenders=contenders)


def by_throughput(plan: Plan) -> tuple[float, tuple[int, ...]]:
    """Sorts plans by throughput; among those of the same speed, small partitions and simple settings come first."""
    return -float(f"{plan.samples_per_second:.3g}"), _simplicity(plan.candidate)


def _advised(plans: Sequence[Plan]) -> list[Plan]:
    """Returns plans, sorted by throughput, in the order in which they are advised."""
    left, ranked = list(plans), []
    while left:
        chosen = _advice(left)
        left.remove(chosen)
        ranked.append(chosen)
    return ranked


def _advice(plans: Sequence[Plan]) -> Plan:
    """Returns the plan to take of some that are sorted by throughput."""
    chosen = min(_as_fast_as(plans[0], plans), key=_cost_of_advice)
    # One that is smaller, sends less and is as fast as the chosen one may be a little slower than the fastest.
    while True:
        better = [plan for plan in _as_fast_as(chosen, plans) if _is_modest(plan, chosen)]
        if not better:
            return chosen
        chosen = min(better, key=_cost_of_advice)


def _as_fast_as(plan: Plan, plans: Sequence[Plan]) -> list[Plan]:
    return [other for other in plans if other.samples_per_second * (1 + ERROR) >= plan.samples_per_second]


def _is_modest(plan: Plan, other: Plan) -> bool:
    smaller = plan.candidate.shard_size < other.candidate.shard_size
    return smaller and plan.inter_bytes / plan.global_batch < other.inter_bytes / other.global_batch


def _cost_of_advice(plan: Plan) -> tuple[Any, ...]:
    return by_modesty(plan.candidate, plan.traffic, plan.memory, plan.global_batch)


def by_modesty(
    candidate: Candidate, traffic: Mapping[Hop, Traffic], memory: MemoryBreakdown, samples: int = 1
) -> tuple[Any, ...]:
    """Sorts ways to train that are as fast as each other for all that is known; the one to advise comes first.

    It is the one that sends the fewest bytes a sample out of a node; then the smallest partition, then the one with the
    most memory free.
    """
    # What partition groups send must hide behind each microstep, hop two behind the last one only.
    sent = [float(f"{count / samples:.3g}") for count in (partition_inter_bytes(traffic), inter_bytes(traffic))]
    return *sent, candidate.shard_size, candidate.slices, memory.total, _simplicity(candidate)


def _simplicity(candidate: Candidate) -> tuple[int, ...]:
    return (
        candidate.shard_size,
        candidate.slices,
        0 if not candidate.recomputation else 2 if candidate.activation_checkpointing == 1 else 1,
        not candidate.reshard_after_forward,
        candidate.hierarchical,
        -candidate.micro_batch,
    )


def _candidates(profile: ModelProfile, cluster: Cluster, training: Training, choices: Choices) -> Iterator[Candidate]:
    topology = cluster.topology
    masters = _masters(training, choices)
    sizes = choices.shard_sizes or topology.valid_shard_sizes()
    moves = choices.activation_checkpointing_offload
    # What makes no difference to a model is not tried.
    recomputes = _recomputations(profile, choices)
    reshards_or_not = _both(choices.reshard_after_forward, bool(profile.blocks), otherwise=True)
    for size, batch, checkpoints, reshards in itertools.product(sizes, choices.batches, recomputes, reshards_or_not):
        layout = topology.layout(size)
        staged = [False]
        if layout.spans_nodes and layout.local_size > 1:
            staged = _both(choices.hierarchical, True)
        for hierarchical, slices in itertools.product(staged, _optimizer_shard_sizes(layout, choices, masters)):
            yield Candidate(
                shard_size=size,
                optimizer_shard_size=slices,
                master_weights="partition" if slices is None else masters,
                hierarchical=hierarchical,
                micro_batch=batch[0],
                accumulation=batch[1],
                activation_checkpointing=checkpoints,
                activation_checkpointing_offload=moves and checkpoints not in (False, "selective"),
                reshard_after_forward=reshards,
            )


def _masters(training: Training, choices: Choices) -> MasterWeights:
    """Returns where float32 values of parameters are if optimizer states are divided over more ranks."""
    return choices.master_weights or ("owners" if training.has_masters else "partition")


def _optimizer_shard_sizes(layout: GroupLayout, choices: Choices, masters: MasterWeights) -> list[int | None]:
    """Returns how far optimizer states may be divided; ``None`` where they are as parameters are."""
    asked: list[OptimizerShardSize] = ["partition", "world"]
    has_part = layout.num_replicas > _FEW_INSTANCES and layout.num_replicas % _FEW_INSTANCES == 0
    if masters == "owners" and has_part:
        asked.append(layout.shard_size * _FEW_INSTANCES)  # rings over all replicas take long in large worlds
    if isinstance(choices.optimizer_shard_size, int) and choices.optimizer_shard_size % layout.shard_size:
        asked = [] if choices.shard_sizes is None else [choices.optimizer_shard_size]
    elif choices.optimizer_shard_size is not None:
        asked = [choices.optimizer_shard_size]
    sizes = dict.fromkeys(map(layout.resolve_optimizer_shard_size, asked))
    return [None if size == layout.shard_size else size for size in sizes]


def _recomputations(profile: ModelProfile, choices: Choices) -> list[Recomputation]:
    if choices.activation_checkpointing is not None:
        return [choices.activation_checkpointing]
    blocks = [block for block in profile.blocks if block.can_checkpoint]
    if all(block.products == Amount() for block in blocks):  # nothing is known of what products return
        return [False, True] if blocks else [False]
    return [False, "selective", True]


def _both(choice: bool | None, matters: bool, otherwise: bool = False) -> list[bool]:
    if choice is not None:
        return [choice]
    return [False, True] if matters else [otherwise]


def _contenders(profile: ModelProfile, cluster: Cluster, training: Training, best: Plan, limit: float) -> list[Plan]:
    """Other ways to train, with the batch and the settings of the best plan."""
    same = undivided(best.candidate, hierarchical=False)
    others = [
        replace(same, scheme="full-sharding", shard_size=cluster.world_size),
        replace(same, scheme="mesh-2d"),
        replace(same, scheme="ddp", shard_size=1),
    ]
    return [evaluate(profile, cluster, other, training, memory_limit=limit) for other in others]


def explain_advice(planning: Planning) -> str | None:
    """Says why the plan that is advised is not the fastest; ``None`` if it is."""
    best, fastest = planning.best, planning.fastest
    if best.candidate == fastest.candidate:
        return None
    slower = fastest.samples_per_second / best.samples_per_second - 1
    theirs, size = apart_from(best.candidate, fastest.candidate), best.candidate.shard_size
    return (
        f"p={size} is within {max(1, math.ceil(100 * slower))}% of the fastest, {theirs}{_gains(best, fastest)}. "
        f"Predictions are no better than {ERROR:.0%}; --rank throughput goes by speed alone."
    )


def explain_division(planning: Planning) -> str | None:
    """Says what it won that the best plan divides optimizer states further than parameters; ``None`` if it does not."""
    candidate = planning.best.candidate
    if candidate.slices == 1:
        return None
    accelerator = planning.cluster.node.accelerator
    without = undivided(candidate)
    before = predict_memory(planning.profile, without, planning.training, accelerator)
    saved = f"{format_bytes(planning.best.memory.optimizer)} a rank instead of {format_bytes(before.optimizer)}"
    masters = " and the float32 values of parameters" if candidate.has_owners else ""
    text = f"Optimizer states{masters} are divided over {candidate.optimizer_shard_size} ranks: {saved}"
    sent = inter_bytes(predict_traffic(planning.profile, planning.cluster, without, planning.training))
    if planning.best.inter_bytes < 0.995 * sent:
        text += f", and {planning.best.inter_bytes / sent:.0%} as much out of a node"
    if before.total > planning.memory_limit:
        missing = format_bytes(before.total - planning.memory_limit)
        text += f"; with those of the partition alone p={candidate.shard_size} needs {missing} too much"
    rest = [plan for plan in planning.plans if plan.candidate.slices == 1]
    if not rest:
        return f"{text}, and no other partition size fits."
    other = rest[0]
    faster = planning.best.samples_per_second / other.samples_per_second - 1
    speed = "as fast as"
    if abs(faster) >= 0.005:
        speed = f"{faster:.0%} faster than" if faster > 0 else f"within {math.ceil(-100 * faster)}% of"
    return f"{text}. It is {speed} the best plan without, p={other.candidate.shard_size}."


def _gains(best: Plan, fastest: Plan) -> str:
    gains = []
    ours, theirs = (plan.inter_bytes / plan.global_batch for plan in (best, fastest))
    if ours < 0.995 * theirs:
        gains.append("sends " + ("nothing" if not ours else f"{ours / theirs:.0%} as much") + " out of a node")
    if fastest.partition_inter_bytes and not best.partition_inter_bytes:
        gains.append("keeps gathers and reduce-scatters inside the node")
    if best.memory.total < 0.995 * fastest.memory.total:
        gains.append(f"leaves {format_bytes(fastest.memory.total - best.memory.total)} more memory free")
    if not gains and best.candidate.shard_size < fastest.candidate.shard_size:
        gains.append("needs fewer ranks together")
    return f"; it {' and '.join(gains)}" if gains else ""


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
    own = f" and {_division(candidate)}" if candidate.slices > 1 else ""
    words = f"p={candidate.shard_size}{own} with micro-batches of {candidate.micro_batch}"
    how = candidate.recomputation
    words += (" and activation checkpointing" + (f" ({how})" if how != "all" else "")) if how else ""
    return words + ("" if candidate.reshard_after_forward else " and blocks kept gathered")


def _division(candidate: Candidate) -> str:
    masters = " and masters" if candidate.has_owners else ""
    return f"optimizer states{masters} over {candidate.optimizer_shard_size} ranks"


def undivided(candidate: Candidate, **changes: Any) -> Candidate:
    """Returns a candidate with optimizer states of the partition, and with other changes."""
    return replace(candidate, optimizer_shard_size=None, master_weights="partition", **changes)


def apart_from(other: Candidate, candidate: Candidate) -> str:
    """Returns what tells a candidate from another one, for example ``"p=32 with micro-batches of 2"``."""
    said = []
    if candidate.micro_batch != other.micro_batch:
        said.append(f"micro-batches of {candidate.micro_batch}")
    if candidate.activation_checkpointing != other.activation_checkpointing:
        how = candidate.recomputation
        said.append({"": "nothing recomputed", "all": "recomputation"}.get(how, f"recomputation ({how})"))
    if candidate.reshard_after_forward != other.reshard_after_forward:
        said.append(f"blocks {'freed after' if candidate.reshard_after_forward else 'kept after'} the forward pass")
    if candidate.slices != other.slices and candidate.slices > 1:
        said.append(_division(candidate))
    if candidate.hierarchical != other.hierarchical and candidate.shard_size == other.shard_size:
        said.append("collectives in two stages" if candidate.hierarchical else "collectives in one stage")
    told = " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    return f"p={candidate.shard_size}{' with ' * bool(said)}{told}"


def largest_micro_batch(planning: Planning, candidate: Candidate) -> int:
    """Returns the largest micro-batch, up to a candidate's own, with which it fits; 0 if none does."""
    sizes = range(1, candidate.micro_batch + 1)
    return bisect.bisect_right(
        sizes, planning.memory_limit, key=lambda size: _needed(planning, replace(candidate, micro_batch=size))
    )


def what_helps(planning: Planning, misfit: Misfit) -> list[str]:
    """Returns the settings that make a candidate fit, each of them alone, for example ``["micro-batches of 7"]``."""
    candidate, helps = misfit.candidate, []
    size = largest_micro_batch(planning, candidate)
    if size:
        helps.append(f"micro-batches of {size}")
    changes: dict[str, dict[str, Any]] = {}
    if candidate.recomputation != "all":
        changes["activation_checkpointing=True"] = {"activation_checkpointing": True}
    elif planning.cluster.node.accelerator.device_type != "cpu" and not candidate.activation_checkpointing_offload:
        changes["activation_checkpointing_offload=True"] = {"activation_checkpointing_offload": True}
    if candidate.slices == 1 and candidate.shard_size < planning.cluster.world_size:
        masters = _masters(planning.training, planning.choices)
        words = "optimizer_shard_size='world'" + " and master_weights='owners'" * (masters == "owners")
        changes[words] = {"optimizer_shard_size": planning.cluster.world_size, "master_weights": masters}
    for words, changed in changes.items():
        needed = _needed(planning, replace(candidate, **changed))
        if needed <= misfit.memory_limit:
            helps.append(f"{words} ({format_bytes(needed)})")
    return helps + _of_the_limit(planning, misfit)


def _of_the_limit(planning: Planning, misfit: Misfit) -> list[str]:
    """Says which limit of memory would let a candidate in, where that is worth a try."""
    missing, reserve = misfit.memory.total - misfit.memory_limit, misfit.memory.reserve
    has = planning.cluster.node.accelerator.memory
    limit = f"memory_limit='{math.ceil(10 * misfit.memory.total / 2**30) / 10} GiB'"
    if not planning.profile.knows_activations:
        return []
    if misfit.memory.total <= has:
        return [f"{limit} of the {format_bytes(has)} that there are"]
    return [f"{limit} ({format_bytes(reserve)} of it are an assumed reserve)"] if missing <= reserve / 2 else []


def _needed(planning: Planning, candidate: Candidate) -> float:
    return predict_memory(planning.profile, candidate, planning.training, planning.cluster.node.accelerator).total


def _remedies(planning: Planning, closest: Misfit) -> Iterator[str]:
    """Yields changes that make the closest candidate fit, each alone, then more nodes."""
    yield from what_helps(planning, closest)
    nodes = planning.cluster.num_nodes
    while nodes < _MOST_NODES:
        nodes *= 2
        ranks = nodes * planning.cluster.node.num_accelerators
        needed = _needed(planning, undivided(closest.candidate, shard_size=ranks))
        if needed <= closest.memory_limit:
            yield f"{nodes} nodes, shard_size={ranks} ({format_bytes(needed)})"
            break
    yield f"accelerators with {format_bytes(closest.memory.total)} of memory"
