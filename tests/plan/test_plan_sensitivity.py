import dataclasses

import pytest
from plan_examples import make_cluster, make_profile

from lightning_mics.plan.hardware import Link
from lightning_mics.plan.search import ERROR, Choices, search
from lightning_mics.plan.sensitivity import (
    Conditions,
    conditions_of,
    contenders_of,
    explain_assumptions,
    fastest_under,
    sensitivity,
    under,
)
from lightning_mics.plan.settings import Training

TRAINING = Training(param_dtype="bfloat16", optimizer="AdamW")
LINKS = [Link(bandwidth=bandwidth, efficiency=0.5, latency=1e-5) for bandwidth in (1e9, 20e9, 400e9)]


def find(num_nodes=4, *, inter=LINKS[1], layers=8, batches=((1, 8), (2, 4), (8, 1)), **choices):
    cluster = make_cluster(num_nodes, 4, inter=inter)
    return search(make_profile(layers, 1024), cluster, TRAINING, Choices(batches=batches, **choices))


def test_a_step_takes_longer_as_links_give_less_and_longest_where_nothing_overlaps():
    planning = find(layers=2, batches=[(2, 4)])
    for plan in (*planning.plans, *planning.contenders):
        found = sensitivity(planning, plan)
        assert plan.time.seconds <= found.by_rate[0.5] * 1.001 and found.by_rate[0.5] <= found.by_rate[0.25] * 1.001
        assert plan.time.seconds <= found.without_overlap * 1.001
    assert list(sensitivity(find(1), find(1).best).by_rate) == []


def test_links_inside_of_a_node_keep_their_rate():
    planning = find(1)
    slower = under(planning, planning.best, Conditions(rate=0.25))
    assert slower.time.seconds == planning.best.time.seconds


@pytest.mark.parametrize("shard_size", [1, 4, 16])
def test_without_overlap_everything_adds_up(shard_size):
    planning = find(shard_sizes=[shard_size], batches=[(2, 4)], optimizer_shard_size="world")
    for plan in planning.plans:
        time = under(planning, plan, Conditions(overlaps=False)).time
        sent = sum(seconds for stream, seconds in time.busy.items() if stream != "compute")
        assert time.seconds == pytest.approx(time.compute + sent, rel=0.01)


@pytest.mark.parametrize("inter", LINKS, ids=["slow", "medium", "fast"])
def test_the_fastest_under_conditions_is_that_of_all_plans(inter):
    planning = find(inter=inter, layers=4)
    for conditions in conditions_of(planning.cluster):
        speeds = [under(planning, plan, conditions).samples_per_second for plan in planning.plans]
        assert fastest_under(planning, conditions).samples_per_second == pytest.approx(max(speeds), rel=2e-3)


@pytest.mark.parametrize("inter", LINKS, ids=["slow", "medium", "fast"])
@pytest.mark.parametrize("num_nodes", [1, 4])
def test_the_assumption_that_carries_the_advice_is_named(inter, num_nodes):
    planning = find(num_nodes, inter=inter, layers=4)
    told = explain_assumptions(planning)
    conditions = [Conditions(rate=0.5), Conditions(rate=0.25)] * (num_nodes > 1) + [Conditions(overlaps=False)]
    lost = [
        fastest_under(planning, entry).samples_per_second
        > (1 + ERROR) * under(planning, planning.best, entry).samples_per_second
        for entry in conditions
    ]
    assert ("rests on" in told) == any(lost) and ("is sturdy" in told) != any(lost)
    assert ("the rate between nodes and" in told or "rests on the rate" in told) == any(lost[:-1])
    assert ("overlap:" in told) == lost[-1]
    assert "between nodes" not in told or num_nodes > 1
    assert told.count("\n") == 0 and told.endswith(".")


def test_what_wins_when_conditions_get_worse_is_among_the_contenders():
    planning = find(inter=LINKS[2], batches=[(4, 1)])
    shown = [plan.candidate for plan in contenders_of(planning)]
    assert shown[0] == planning.best.candidate and len(set(shown)) == len(shown)
    for conditions in conditions_of(planning.cluster):
        assert fastest_under(planning, conditions).candidate in shown
    none = dataclasses.replace(planning, contenders=[])
    assert {plan.candidate.scheme for plan in contenders_of(none)} == {"mics"}
