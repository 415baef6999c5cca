"""What is advised for real models on real clusters."""

import pytest

from lightning_mics.plan import find_instance, plan
from lightning_mics.plan.search import ERROR, explain_advice, explain_division, what_helps
from lightning_mics.plan.sensitivity import explain_assumptions


@pytest.fixture(scope="module")
def profile():
    return plan("gpt2-xl", "p4d.24xlarge", micro_batch=1).profile


@pytest.fixture(params=[None, "partition"])
def gpt2_xl(request, profile):
    return plan(profile, "p4d.24xlarge", num_nodes=16, global_batch=1024, master_weights=request.param)


def test_gpt2_xl_stays_inside_of_a_node(gpt2_xl):
    best, fastest = gpt2_xl.best, gpt2_xl.fastest
    assert best.candidate.shard_size == 8 and best.partition_inter_bytes == 0
    assert best.samples_per_second * (1 + ERROR) > fastest.samples_per_second
    if fastest.candidate.shard_size > 8:
        assert "keeps gathers and reduce-scatters inside the node" in explain_advice(gpt2_xl)
    if best.candidate.has_owners:
        assert "76% as much out of a node" in explain_division(gpt2_xl)
    assert "rests on the rate between nodes" in explain_assumptions(gpt2_xl)


def test_no_plan_is_advised_over_one_that_is_smaller_sends_less_and_is_as_fast(gpt2_xl):
    best = gpt2_xl.best
    for other in gpt2_xl.plans:
        smaller = other.candidate.shard_size < best.candidate.shard_size
        sends_less = other.inter_bytes < best.inter_bytes
        assert not (smaller and sends_less and other.samples_per_second * (1 + ERROR) >= best.samples_per_second)


def test_large_worlds_divide_states_over_a_part_of_them(profile):
    planning = plan(profile, "p4d.24xlarge", num_nodes=256, micro_batch=1, accumulation=4, reshard_after_forward=True)
    candidate = planning.best.candidate
    assert (candidate.shard_size, candidate.optimizer_shard_size, candidate.has_owners) == (8, 64, True)
    others = [each for each in planning.plans if each.candidate.optimizer_shard_size in (None, 2048)]
    assert planning.best.samples_per_second > 1.1 * max(each.samples_per_second for each in others)
    assert "divided over 64 ranks" in explain_division(planning)


def test_a_llama_that_misses_by_little_is_told_what_fits():
    cluster = find_instance("8xA100-ethernet-100g", 8)
    batch = {"micro_batch": 8, "accumulation": 1, "sequence_length": 4096}
    best = (planning := plan("llama-3-8b", cluster, **batch)).best
    assert best.candidate.shard_size == 8 and best.candidate.has_owners
    batch.pop("sequence_length")
    undivided = plan(planning.profile, cluster, **batch, optimizer_shard_size="partition")
    closest = next(misfit for misfit in undivided.misfits if misfit.candidate.shard_size == 8)
    smaller, *moved, divided = what_helps(undivided, closest)
    assert smaller == "micro-batches of 7"
    assert [words.partition(" ")[0] for words in moved] == ["activation_checkpointing_offload=True"]
    assert divided.startswith("optimizer_shard_size='world' and master_weights='owners'")
    # With masters in the partition, little is missing.
    masters = plan(planning.profile, cluster, **batch, master_weights="partition")
    closest = next(misfit for misfit in masters.misfits if misfit.candidate.shard_size == 8)
    assert closest.candidate.slices == 8 and 0 < closest.memory.total - closest.memory_limit < 2**30
    smaller, *_, limit = what_helps(masters, closest)
    assert smaller == "micro-batches of 7" and limit.startswith("memory_limit='80.6 GiB'")
