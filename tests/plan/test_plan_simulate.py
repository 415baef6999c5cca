import dataclasses
import itertools

import pytest

from lightning_mics.plan.cost import Cost
from lightning_mics.plan.simulate import BESIDE_COLLECTIVES, Engine, StepWork, UnitTimes, engine_of, simulate

BLOCKING = Engine(gathers_ahead=False, reduces_beside=False, replicates_beside=False)


def inside(seconds):
    return Cost(seconds, 0.0)


def across(seconds):
    return Cost(seconds, seconds)


def block(forward=1.0, backward=2.0, gather=0.0, reduce=0.0, replicate=0.0, cost=inside):
    return UnitTimes(
        name="block",
        forward=forward,
        backward=backward,
        gather=cost(gather),
        reduce=cost(reduce),
        replicate=across(replicate),
    )


ROOT = UnitTimes(name="(root)")


def test_without_communication_a_step_is_its_compute():
    time = simulate(StepWork(root=ROOT, blocks=[block()] * 3, accumulation=2, optimizer=0.5))
    assert time.seconds == pytest.approx(2 * 3 * 3 + 0.5)
    assert time.compute == pytest.approx(time.seconds)
    assert sum(time.exposed.values()) == 0


def test_where_nothing_overlaps_everything_adds_up():
    unit = block(gather=0.3, reduce=0.5, replicate=0.7)
    time = simulate(StepWork(root=ROOT, blocks=[unit] * 4, accumulation=3, engine=BLOCKING))
    assert time.seconds == pytest.approx(3 * 4 * (3 + 2 * 0.3 + 0.5) + 4 * 0.7)
    assert time.exposed == pytest.approx({"gather": 3 * 4 * 0.6, "reduce": 3 * 4 * 0.5, "replicate": 4 * 0.7})


def test_gathers_hide_behind_the_compute_before_except_the_first_of_a_pass():
    time = simulate(StepWork(root=ROOT, blocks=[block(gather=0.4)] * 4))
    # The first gather of the forward pass has nothing to hide behind; that of the backward pass only the head.
    assert time.seconds == pytest.approx(4 * 3 + 2 * 0.4)


def test_a_gather_longer_than_the_compute_sets_the_pace():
    time = simulate(StepWork(root=ROOT, blocks=[block(forward=1, backward=1, gather=3)] * 4))
    assert time.seconds == pytest.approx((4 * 3 + 1) * 2)


def test_the_head_hides_the_first_gather_of_the_backward_pass():
    root = UnitTimes(name="(root)", forward=1.0, backward=1.0)
    time = simulate(StepWork(root=root, blocks=[block(gather=0.4)] * 2))
    assert time.seconds == pytest.approx(2 + 2 * 3 + 0.4)


def test_units_that_stay_are_not_gathered_again():
    time = simulate(StepWork(root=ROOT, blocks=[block(gather=0.4)] * 4, gathers_again=False))
    assert sum(event.stream == "gather" for event in time.events) == 4


def test_reductions_hide_behind_the_backward_of_the_next_unit_except_the_last():
    time = simulate(StepWork(root=ROOT, blocks=[block(reduce=1.5)] * 4))
    assert time.seconds == pytest.approx(4 * 3 + 1.5)
    assert time.exposed["reduce"] == pytest.approx(1.5)


def test_one_reduction_is_in_flight_at_most():
    time = simulate(StepWork(root=ROOT, blocks=[block(backward=1, reduce=3)] * 4))
    assert time.seconds == pytest.approx(4 + 1 + 4 * 3)


def test_replicas_synchronise_once_a_window_or_in_every_microstep():
    unit = block(replicate=1.0)
    once = simulate(StepWork(root=ROOT, blocks=[unit] * 2, accumulation=3))
    always = simulate(StepWork(root=ROOT, blocks=[unit] * 2, accumulation=3, replicates_always=True))
    assert sum(event.stream == "replicate" for event in once.events) == 2
    assert sum(event.stream == "replicate" for event in always.events) == 6
    assert once.seconds == pytest.approx(3 * 6 + 1)
    assert always.seconds == pytest.approx(3 * 7)


def test_the_published_window_of_hsdp_over_ethernet():
    """8 x 2 A100, 10.8 s of compute and 11.4 s of replication a microbatch, no overlap: 54.3 s with deferral, 88.8 s
    without were measured for an accumulation of 4."""
    unit = UnitTimes(name="model", forward=3.6, backward=7.2, replicate=across(11.4))
    work = StepWork(root=ROOT, blocks=[unit], accumulation=4, engine=BLOCKING)
    assert simulate(work).seconds == pytest.approx(54.3, rel=0.02)
    assert simulate(dataclasses.replace(work, replicates_always=True)).seconds == pytest.approx(88.8, rel=0.02)


def test_the_link_between_nodes_carries_one_collective_at_a_time():
    unit = block(forward=0.1, backward=0.1, gather=1, reduce=1, replicate=1, cost=across)
    time = simulate(StepWork(root=ROOT, blocks=[unit] * 3))
    events = sorted((e for e in time.events if e.stream != "compute"), key=lambda event: event.start)
    assert all(before.end <= after.start + 1e-9 for before, after in itertools.pairwise(events))


def test_the_root_is_gathered_first_and_reduced_last():
    root = UnitTimes(name="(root)", gather=inside(0.5), reduce=inside(0.25))
    time = simulate(StepWork(root=root, blocks=[block()] * 2))
    communication = [event for event in time.events if event.stream != "compute"]
    assert [event.unit for event in communication] == ["(root)", "(root)"]
    assert time.seconds == pytest.approx(0.5 + 6 + 0.25)


@pytest.mark.parametrize("accumulation", [4, 5, 16])
@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
def test_long_windows_are_extrapolated_exactly(monkeypatch, accumulation, always):
    unit = block(gather=1.2, reduce=2.1, replicate=0.9, cost=across)
    root = UnitTimes(name="(root)", forward=0.2, backward=0.4, gather=across(0.3), reduce=across(0.3))
    work = StepWork(root=root, blocks=[unit] * 3, accumulation=accumulation, replicates_always=always)
    short = simulate(work)
    monkeypatch.setattr("lightning_mics.plan.simulate._SIMULATED_MICROSTEPS", 100)
    whole = simulate(work)
    assert short.seconds == pytest.approx(whole.seconds)
    assert short.exposed == pytest.approx(whole.exposed)
    assert short.busy == pytest.approx(whole.busy)


def test_time_is_compute_and_what_it_waits_for():
    unit = block(gather=1.2, reduce=2.1, replicate=0.9, cost=across)
    time = simulate(StepWork(root=ROOT, blocks=[unit] * 5, accumulation=2, optimizer=0.1, agreement=0.2))
    assert time.seconds == pytest.approx(time.compute + sum(time.exposed.values()))


def test_streams_do_one_thing_at_a_time():
    unit = block(gather=1.2, reduce=2.1, replicate=0.9)
    time = simulate(StepWork(root=ROOT, blocks=[unit] * 5, accumulation=2))
    for stream in ("compute", "gather", "reduce", "replicate"):
        events = sorted((e for e in time.events if e.stream == stream), key=lambda event: event.start)
        assert all(before.end <= after.start + 1e-9 for before, after in itertools.pairwise(events))


def test_engines_differ_by_device():
    assert engine_of("full-sharding", "cuda", settles=False) == Engine(slowdown=BESIDE_COLLECTIVES)
    stock, ours = (engine_of(scheme, "cpu", settles=True) for scheme in ("full-sharding", "mics"))
    assert stock.reduce_factor == 2 and not stock.gathers_ahead
    assert ours.gathers_ahead and ours.reduce_factor == 1


def hosted(forward_host, backward_host, **times):
    return dataclasses.replace(block(**times), forward_host=forward_host, backward_host=backward_host)


@pytest.mark.parametrize("accumulation", [1, 2, 7])
def test_a_device_waits_for_a_slow_host_and_for_no_fast_one(accumulation):
    fast = StepWork(root=ROOT, blocks=[hosted(0.5, 1.5)] * 4, accumulation=accumulation, optimizer_host=0.1)
    time = simulate(fast)
    assert time.seconds == pytest.approx(accumulation * 4 * 3) and time.idle == 0
    assert time.host == pytest.approx(accumulation * 4 * 2 + 0.1)
    time = simulate(dataclasses.replace(fast, blocks=[hosted(2, 5)] * 4))
    assert time.seconds == time.host == pytest.approx(accumulation * 4 * 7 + 0.1)
    assert time.idle == pytest.approx(time.seconds - time.compute)


def test_where_the_host_is_slow_in_some_units_only_the_device_waits_there():
    units = [hosted(0.1, 0.1), hosted(0.1, 0.1), hosted(6.0, 0.1)]
    time = simulate(StepWork(root=ROOT, blocks=units))
    # Two units are computed while the third one is launched, which took 6 s from the second's launch on.
    assert 0 < time.idle < 4.1 and time.host < time.seconds == pytest.approx(9 + time.idle)
    assert simulate(StepWork(root=ROOT, blocks=[hosted(0.1, 0.1, gather=0.5)] * 3)).idle == 0


def test_collectives_hide_behind_what_the_host_takes():
    time = simulate(StepWork(root=ROOT, blocks=[hosted(3, 3, gather=1, reduce=1)] * 4))
    assert time.seconds == pytest.approx(24, rel=0.1)


def test_compute_takes_longer_beside_collectives_and_as_long_as_it_takes_without():
    units = [block(forward=1.0, backward=2.0, gather=0.5, reduce=1.0)] * 4
    plain, slowed = (
        simulate(StepWork(root=ROOT, blocks=units, engine=Engine(slowdown=slowdown))) for slowdown in (0.0, 0.2)
    )
    beside = slowed.compute - plain.compute
    assert 0 < beside <= 0.2 / 1.2 * (plain.busy["gather"] + plain.busy["reduce"]) + 1e-9
    without = [Engine(slowdown=slowdown).without_overlap() for slowdown in (0.0, 0.2)]
    alone = [simulate(StepWork(root=ROOT, blocks=units, engine=engine)).seconds for engine in without]
    assert alone[0] == pytest.approx(alone[1])
