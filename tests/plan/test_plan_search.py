import dataclasses
import itertools

import pytest
from plan_examples import GIB, make_cluster, make_profile

from lightning_mics.errors import MiCSConfigError
from lightning_mics.metrics import CommLedger, Hop
from lightning_mics.plan.evaluate import evaluate, predict_traffic
from lightning_mics.plan.hardware import Link
from lightning_mics.plan.memory import predict_memory
from lightning_mics.plan.search import ERROR, Choices, apart_from, explain_advice, largest_micro_batch, search
from lightning_mics.plan.settings import Candidate, Training

TRAINING = Training(param_dtype="bfloat16", optimizer="AdamW")
PROFILE = make_profile(layers=8, width=2048)
ONE = Choices(batches=[(1, 4)], activation_checkpointing=False, reshard_after_forward=True)


def find(limit=80 * GIB, *, profile=PROFILE, cluster=None, **changes):
    choices = dataclasses.replace(ONE, memory_limit=limit, **changes)
    return search(profile, cluster or make_cluster(2, 4), TRAINING, choices)


def needs(shard_size, **settings):
    candidate = Candidate(shard_size=shard_size, accumulation=4, **settings)
    return evaluate(PROFILE, make_cluster(2, 4), candidate, TRAINING).memory.total


def test_every_partition_that_works_is_tried():
    found = find()
    assert {plan.candidate.shard_size for plan in found.plans} == {1, 2, 4, 8}
    assert not found.misfits


@pytest.mark.parametrize(("fits", "not_yet"), [(2, 1), (4, 2), (8, 4)])
def test_the_smallest_partition_that_fits_is_found(fits, not_yet):
    limit = (needs(fits) + needs(not_yet)) / 2
    found = find(limit, optimizer_shard_size="partition")
    assert found.smallest.candidate.shard_size == fits
    assert {misfit.candidate.shard_size for misfit in found.misfits} == {p for p in (1, 2, 4, 8) if p < fits}
    assert all(plan.fits for plan in found.plans)


def test_misfits_say_what_they_need():
    limit = (needs(4) + needs(2)) / 2
    closest = find(limit, optimizer_shard_size="partition").misfits[0]
    assert closest.candidate.shard_size == 2
    assert closest.reason.startswith("p=2 needs ") and " of " in closest.reason


def test_plans_are_ranked_by_speed():
    found = find(activation_checkpointing=None, hierarchical=None, ranking="throughput")
    speeds = [plan.samples_per_second for plan in found.plans]
    assert all(before >= after * 0.995 for before, after in itertools.pairwise(speeds))
    assert found.best == found.fastest and explain_advice(found) is None
    with pytest.raises(MiCSConfigError, match="ranking='fast' is unknown"):
        find(ranking="fast")


LINKS = [Link(bandwidth=bandwidth, efficiency=0.5, latency=1e-5) for bandwidth in (1e9, 20e9, 400e9)]


@pytest.mark.parametrize("inter", LINKS, ids=["slow", "medium", "fast"])
@pytest.mark.parametrize("batches", [[(1, 8), (2, 4), (8, 1)], [(1, 1)]], ids=["accumulated", "at once"])
@pytest.mark.parametrize("layers", [2, 24])
def test_nothing_is_advised_over_what_is_smaller_sends_less_and_is_as_fast(inter, batches, layers):
    found = find(
        profile=make_profile(layers=layers, width=1024),
        cluster=make_cluster(4, 4, inter=inter),
        batches=batches,
        activation_checkpointing=None,
        hierarchical=None,
        reshard_after_forward=None,
    )
    best, fastest = found.best, found.fastest
    for plan in found.plans:
        as_fast = plan.samples_per_second * (1 + ERROR) >= best.samples_per_second
        sends_less = plan.inter_bytes < best.inter_bytes * 0.99
        assert not (as_fast and sends_less and plan.candidate.shard_size < best.candidate.shard_size), plan
        equal = plan.samples_per_second * (1 + ERROR) >= fastest.samples_per_second
        assert not equal or plan.partition_inter_bytes >= best.partition_inter_bytes * 0.99
    assert sorted(map(repr, found.plans)) == sorted(map(repr, find_by_speed(found).plans))


def find_by_speed(found):
    choices = dataclasses.replace(found.choices, ranking="throughput")
    return search(found.profile, found.cluster, found.training, choices)


def test_the_advice_says_what_it_costs_and_what_it_wins():
    # With fast links, a partition over nodes is a little faster where nothing is accumulated.
    found = find(
        profile=make_profile(layers=24, width=1024),
        cluster=make_cluster(4, 4, inter=LINKS[2]),
        batches=[(4, 1)],
        reshard_after_forward=None,
    )
    best, fastest = found.best.candidate, found.fastest.candidate
    assert best.shard_size <= 4 and best != fastest
    told = explain_advice(found)
    assert "is within 1% of the fastest, " in told or "% of the fastest" in told
    assert f"no better than {ERROR:.0%}; --rank throughput" in told


def test_the_largest_micro_batch_that_fits_is_found():
    profile = make_profile(layers=8, width=2048, saved=100e6)
    found = find(profile=profile, batches=[(16, 1)], shard_sizes=[8], limit=12 * GIB)
    candidate = found.misfits[0].candidate
    size = largest_micro_batch(found, candidate)
    assert 1 < size < 16 and size & (size - 1)  # no power of two

    def needed(micro_batch):
        return predict_memory(
            profile,
            dataclasses.replace(candidate, micro_batch=micro_batch),
            TRAINING,
            found.cluster.node.accelerator,
        ).total

    assert needed(size) <= 12 * GIB < needed(size + 1)
    with pytest.raises(MiCSConfigError, match=rf"micro-batches of {size}\b"):
        _ = found.best


def test_settings_that_change_nothing_are_not_tried():
    blocks = [dataclasses.replace(PROFILE.blocks[0], can_checkpoint=False)] * 2
    both = {"activation_checkpointing": None, "reshard_after_forward": None}

    def tried(profile, **choices):
        plans = [plan.candidate for plan in find(profile=profile, **choices).plans]
        return {(plan.activation_checkpointing, plan.reshard_after_forward) for plan in plans}

    assert len(tried(PROFILE, **both)) == 4
    assert tried(dataclasses.replace(PROFILE, blocks=tuple(blocks)), **both) == {(False, False), (False, True)}
    assert tried(dataclasses.replace(PROFILE, blocks=()), **both) == {(False, True)}
    assert tried(dataclasses.replace(PROFILE, blocks=()), reshard_after_forward=False) == {(False, False)}


def test_memory_is_kept_free_for_activations_that_are_unknown():
    limit = needs(4) * 1.1
    states = {"optimizer_shard_size": "partition"}
    assert find(limit, **states).smallest.candidate.shard_size == 4
    unknown = find(limit, profile=dataclasses.replace(PROFILE, source="shapes only"), **states)
    assert unknown.memory_limit == pytest.approx(0.8 * limit) == unknown.smallest.memory_limit
    assert unknown.smallest.candidate.shard_size == 8


def test_where_nothing_fits_the_error_shows_the_closest_and_what_would_help():
    profile = make_profile(layers=8, width=2048, saved=400e6)
    limit = 4 * GIB
    found = find(limit, profile=profile)
    assert not found.plans
    with pytest.raises(MiCSConfigError) as error:
        _ = found.best
    message = str(error.value)
    assert "p=8" in message and "GiB" in message
    assert "activation_checkpointing=True" in message
    assert "accelerators with" in message


def test_more_nodes_are_suggested_where_they_help():
    found = find(needs(8) * 0.9)
    with pytest.raises(MiCSConfigError, match=r"4 nodes, shard_size=16"):
        _ = found.smallest


def test_smaller_micro_batches_are_suggested_where_they_help():
    profile = make_profile(layers=8, width=2048, saved=100e6)
    wide = find(10 * GIB, profile=profile, batches=[(16, 1)], shard_sizes=[8])
    with pytest.raises(MiCSConfigError, match=r"micro-batches of \d"):
        _ = wide.best


def test_contenders_train_the_same_batch():
    found = find()
    assert [plan.candidate.scheme for plan in found.contenders] == ["full-sharding", "mesh-2d", "ddp"]
    assert {plan.global_batch for plan in found.contenders} == {found.best.global_batch}


def test_traffic_is_what_the_ledger_counts():
    cluster = make_cluster(2, 4)
    candidate = Candidate(shard_size=4, accumulation=3)
    training = Training(param_dtype="float32")
    layout = cluster.topology.layout(4)
    ledger = CommLedger(layout)
    for unit in PROFILE.units:
        times = 1 if unit is PROFILE.root else 2
        for _ in range(3 * times):
            ledger.record(unit.name, Hop.PARTITION_GATHER, unit.numel * 4)
        for _ in range(3):
            ledger.record(unit.name, Hop.PARTITION_REDUCE, unit.numel * 4)
        ledger.record(unit.name, Hop.REPLICATION_REDUCE, unit.numel)
    assert predict_traffic(PROFILE, cluster, candidate, training) == ledger.by_hop()


def test_16_bit_exchanges_between_replicas_take_half_of_the_first_part():
    cluster, wire = make_cluster(4, 2), Training(replication_reduce_dtype="bfloat16")
    for divided, kept in ((None, 0.75), (8, 0.5)):
        candidate = Candidate(shard_size=2, optimizer_shard_size=divided)
        exact, narrow = (
            predict_traffic(PROFILE, cluster, candidate, training)[Hop.REPLICATION_REDUCE]
            for training in (Training(), wire)
        )
        assert narrow.inter_bytes == pytest.approx(kept * exact.inter_bytes)


def test_rows_that_come_in_16_bits_take_half():
    cluster, candidate = make_cluster(4, 2), Candidate(shard_size=2, optimizer_shard_size=8)
    whole, half = (
        predict_traffic(PROFILE, cluster, candidate, training)[Hop.REPLICATION_GATHER].inter_bytes
        for training in (Training(), Training(replication_gather_dtype="bfloat16"))
    )
    assert 2 * half == whole > 0


def test_flops_count_recomputation_apart():
    plain = evaluate(PROFILE, make_cluster(), Candidate(shard_size=4), TRAINING)
    again = evaluate(PROFILE, make_cluster(), Candidate(shard_size=4, activation_checkpointing=True), TRAINING)
    assert plain.model_flops == plain.hardware_flops
    assert again.hardware_flops / again.model_flops == pytest.approx(4 / 3, rel=0.02)
    assert again.time.seconds > plain.time.seconds
    assert again.mfu < plain.mfu <= 0.5


def test_a_wider_world_keeps_mics_and_slows_full_sharding():
    def speed(scheme, nodes):
        cluster = make_cluster(nodes, 4)
        size = 4 if scheme == "mics" else cluster.world_size
        candidate = Candidate(scheme=scheme, shard_size=size, micro_batch=16, accumulation=4)
        return evaluate(PROFILE, cluster, candidate, TRAINING).samples_per_second / nodes

    mics, full = (speed(scheme, 32) / speed(scheme, 2) for scheme in ("mics", "full-sharding"))
    assert mics > full
    assert mics > 0.8


def test_a_shard_size_that_does_not_work_is_refused():
    with pytest.raises(MiCSConfigError, match="shard_size=3"):
        find(shard_sizes=[3])


def test_gathered_messages_are_padded_to_equal_shards():
    odd = make_profile(layers=1, width=3, vocabulary=5)
    cluster = make_cluster(1, 4)
    traffic = predict_traffic(odd, cluster, Candidate(shard_size=4), Training(param_dtype="float32"))
    # 12 x 3, 3 x 12 and 12 x 3 in the block, gathered twice; 5 x 3 in the root, once.
    assert traffic[Hop.PARTITION_GATHER].message_bytes == 4 * (2 * (36 + 48 + 36) + 24)


def test_sixteen_bits_stand_for_each_other_but_not_for_float32():
    accelerator = make_cluster().node.accelerator
    assert accelerator.peak_in("float16") == accelerator.peak_in("bfloat16")
    only = dataclasses.replace(accelerator, peak_flops={"bfloat16": 1e14})
    with pytest.raises(MiCSConfigError, match="float32"):
        only.peak_in("float32")


def test_candidates_are_told_apart_by_what_differs():
    ours = Candidate(shard_size=8, micro_batch=4)
    assert apart_from(ours, dataclasses.replace(ours, shard_size=2)) == "p=2"
    assert apart_from(ours, dataclasses.replace(ours, micro_batch=2)) == "p=8 with micro-batches of 2"
    other = dataclasses.replace(ours, micro_batch=2, activation_checkpointing=True, reshard_after_forward=False)
    words = "p=8 with micro-batches of 2, recomputation and blocks kept after the forward pass"
    assert apart_from(ours, other) == words
    assert apart_from(other, ours).endswith("of 4, nothing recomputed and blocks freed after the forward pass")


def test_masters_with_owners_are_tried_where_the_precision_has_them():
    found = {plan.candidate: plan for plan in find(shard_sizes=[4]).plans}
    whole, divided = found.values()
    if whole.candidate.slices > 1:
        whole, divided = divided, whole
    assert divided.candidate.has_owners and not whole.candidate.has_owners
    assert divided.inter_bytes == pytest.approx(0.75 * whole.inter_bytes)
    assert divided.memory.states < whole.memory.states
    fixed = {plan.candidate.slices for plan in find(shard_sizes=[4], master_weights="partition").plans}
    assert fixed == {1}  # what fits without needs no division
    plain = search(PROFILE, make_cluster(2, 4), Training(param_dtype="float32"), dataclasses.replace(ONE))
    assert {plan.candidate.slices for plan in plain.plans} == {1}
