"""What plans take where what they rest on is worse: links between nodes that give less, and compute that waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lightning_mics.plan.evaluate import Plan, evaluate
from lightning_mics.plan.hardware import Cluster
from lightning_mics.plan.search import ERROR, Planning, apart_from, by_throughput
from lightning_mics.plan.settings import Candidate
from lightning_mics.plan.simulate import engine_of
from lightning_mics.text import format_number

# Shares of their rate that links between nodes may give.
RATES = (0.5, 0.25)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a step is predicted under.

    Attributes:
        rate: Share of their rate that links between nodes give.
        overlaps: Whether collectives run beside compute, as far as the engine lets them.
    """

    rate: float = 1.0
    overlaps: bool = True


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Seconds of an optimizer step, as conditions get worse.

    Attributes:
        candidate: What is trained with.
        seconds: As predicted.
        by_rate: By the share of their rate that links between nodes give; empty where there is one node.
        without_overlap: If compute waits for each collective.
    """

    candidate: Candidate
    seconds: float
    by_rate: Mapping[float, float]
    without_overlap: float


def sensitivity(planning: Planning, plan: Plan, rates: Iterable[float] = RATES) -> Sensitivity:
    """Returns what a step of a plan would take on slower links, and without overlap."""
    rates = rates if planning.cluster.num_nodes > 1 else ()
    return Sensitivity(
        candidate=plan.candidate,
        seconds=plan.time.seconds,
        by_rate={rate: under(planning, plan, Conditions(rate=rate)).time.seconds for rate in rates},
        without_overlap=under(planning, plan, Conditions(overlaps=False)).time.seconds,
    )


def under(planning: Planning, plan: Plan, conditions: Conditions) -> Plan:
    """Returns a plan as it would be under other conditions."""
    known = planning.under.get((plan.candidate, conditions))
    if known is None:
        known = planning.under[plan.candidate, conditions] = _evaluated(planning, plan, conditions)
    return known


def _evaluated(planning: Planning, plan: Plan, conditions: Conditions) -> Plan:
    cluster, candidate, engine = planning.cluster.with_links_at(conditions.rate), plan.candidate, None
    if not conditions.overlaps:
        engine = engine_of(candidate.scheme, cluster.node.accelerator.device_type, settles=False).without_overlap()
    return evaluate(
        planning.profile,
        cluster,
        candidate,
        planning.training,
        memory=plan.memory,
        memory_limit=plan.memory_limit,
        engine=engine,
    )


def fastest_under(planning: Planning, conditions: Conditions) -> Plan:
    """Returns the plan that is the fastest under conditions, as it is there.

    Raises:
        MiCSConfigError: If no plan fits.
    """
    fastest = under(planning, planning.best, conditions)
    for plan in sorted(planning.plans, key=by_throughput):
        if plan.samples_per_second <= fastest.samples_per_second:
            break  # worse conditions make none faster
        fastest = max(fastest, under(planning, plan, conditions), key=lambda plan: plan.samples_per_second)
    return fastest


def explain_assumptions(planning: Planning) -> str:
    """Says which assumption carries the advice: under which conditions another plan would be faster, and how much.

    Raises:
        MiCSConfigError: If no plan fits.
    """
    ours, slower = f"p={planning.best.candidate.shard_size}", _rates_of(planning.cluster)
    lost = next(((rate, said) for rate in slower if (said := _faster(planning, Conditions(rate=rate)))), None)
    kept = [rate for rate in slower if lost is None or rate > lost[0]]
    without = _faster(planning, Conditions(overlaps=False))
    rests = ["the rate between nodes"] * (lost is not None) + ["overlap"] * (without is not None)
    parts = []
    if kept:
        parts.append(f"{ours} stays within {ERROR:.0%} of the fastest down to {kept[-1]:.0%} of the rate between nodes")
    if lost is not None:
        parts.append(f"at {lost[0]:.0%}{'' if kept else ' of the rate between nodes'} {lost[1]}")
    if without is not None:
        parts.append(f"if nothing overlaps, {without}")
    elif parts:
        same = f"if nothing overlaps, no other is more than {ERROR:.0%} faster"
        parts.append("the same holds if nothing overlaps" if lost is None else same)
    else:
        parts.append(f"{ours} stays within {ERROR:.0%} of the fastest if nothing overlaps")
    begin = f"The advice rests on {' and on '.join(rests)}" if rests else "The advice is sturdy"
    return f"{begin}: {'; '.join(parts)}."


def contenders_of(planning: Planning) -> list[Plan]:
    """Returns the best plan, those that are faster under some conditions, and the other ways to train that fit."""
    plans: dict[Candidate, Plan] = {planning.best.candidate: planning.best}
    for conditions in conditions_of(planning.cluster):
        candidate = fastest_under(planning, conditions).candidate
        plans.setdefault(candidate, next(plan for plan in planning.plans if plan.candidate == candidate))
    return [*plans.values(), *(plan for plan in planning.contenders if plan.fits)]


def conditions_of(cluster: Cluster) -> Iterator[Conditions]:
    """Yields the conditions that matter on a cluster: as predicted, then worse ones."""
    yield Conditions()
    for rate in _rates_of(cluster):
        yield Conditions(rate=rate)
    yield Conditions(overlaps=False)


def _rates_of(cluster: Cluster) -> tuple[float, ...]:
    return RATES if cluster.num_nodes > 1 else ()


def _faster(planning: Planning, conditions: Conditions) -> str | None:
    """Says which plan is faster than the best one under conditions; ``None`` if that is within the error."""
    best, fastest = under(planning, planning.best, conditions), fastest_under(planning, conditions)
    faster = fastest.samples_per_second / best.samples_per_second - 1
    if faster <= ERROR:
        return None
    seconds = [format_number(plan.time.seconds) for plan in (fastest, best)]
    return f"{apart_from(best.candidate, fastest.candidate)} is {faster:.0%} faster ({seconds[0]} s for {seconds[1]} s)"
