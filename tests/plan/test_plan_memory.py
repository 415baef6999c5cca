import dataclasses

import pytest
from plan_examples import make_cluster, make_profile

from lightning_mics.plan.memory import predict_memory
from lightning_mics.plan.settings import Candidate, Training

FP32 = Training(param_dtype="float32", reduce_dtype="float32", optimizer="SGD")
CPU = make_cluster(device_type="cpu").node.accelerator
GPU = make_cluster().node.accelerator
PROFILE = make_profile(layers=4)
BLOCK, ROOT = PROFILE.blocks[0].numel * 4, PROFILE.root.numel * 4


def memory(shard_size=2, *, training=FP32, profile=PROFILE, accelerator=CPU, **settings):
    return predict_memory(profile, Candidate(shard_size=shard_size, **settings), training, accelerator)


@pytest.mark.parametrize("shard_size", [1, 2, 4, 8])
def test_states_shrink_with_the_partition(shard_size):
    found = memory(shard_size)
    assert found.parameters == found.gradients == pytest.approx(PROFILE.numel * 4 / shard_size)
    assert found.optimizer == 0  # SGD without momentum


def test_adam_keeps_two_states_of_each_parameter():
    found = memory(2, training=dataclasses.replace(FP32, optimizer="AdamW"))
    assert found.optimizer == pytest.approx(2 * PROFILE.numel * 4 / 2, rel=1e-4)


def test_first_dimensions_are_rounded_up():
    odd = make_profile(layers=1, width=3, vocabulary=5)  # parameters of 12 x 3, 3 x 12, 12 x 3 and 5 x 3
    assert memory(4, profile=odd).parameters == 4 * (3 * 3 + 1 * 12 + 3 * 3 + 2 * 3)


def test_frozen_parameters_have_neither_gradients_nor_states():
    frozen = tuple(dataclasses.replace(param, trainable=False) for param in PROFILE.blocks[0].params)
    profile = dataclasses.replace(PROFILE, blocks=(dataclasses.replace(PROFILE.blocks[0], params=frozen),) * 4)
    found = memory(2, profile=profile, training=dataclasses.replace(FP32, optimizer="AdamW"))
    assert found.gradients == pytest.approx(ROOT / 2)
    assert found.optimizer == pytest.approx(ROOT, rel=1e-3)


def test_true_low_precision_halves_the_states_and_keeps_wide_partial_sums():
    found = memory(2, training=Training(param_dtype="bfloat16", state_dtype="bfloat16", optimizer="SGD"))
    assert found.parameters == PROFILE.numel * 2 / 2
    assert found.partial_sums == PROFILE.numel * 4 / 2


@pytest.mark.parametrize("slices", [1, 4])
def test_masters_are_with_those_who_step_on_them(slices):
    training = Training(param_dtype="bfloat16", optimizer="AdamW")
    found = memory(2, training=training, optimizer_shard_size=2 * slices, master_weights="owners")
    if slices == 1:  # nobody owns less than a shard
        assert (found.parameters, found.masters) == (PROFILE.numel * 4 / 2, 0)
        return
    assert found.parameters == PROFILE.numel * 2 / 2
    assert found.gradients == PROFILE.numel * 4 / 2
    assert found.masters == PROFILE.numel * 4 / 8
    assert found.optimizer == pytest.approx(PROFILE.numel * 8 / 8, rel=1e-3)


def test_the_peak_is_that_of_the_last_blocks_backward_pass_where_activations_are_large():
    found = memory(2, micro_batch=64)
    block, root = PROFILE.blocks[0], PROFILE.root
    head = 4 * block.saved.at(64) + root.saved.at(64)
    assert found.activations == head  # nothing is freed yet when the head begins
    assert found.gathered == ROOT + BLOCK
    small = memory(2, micro_batch=1)
    assert small.gathered == ROOT + 2 * BLOCK
    assert small.communication == ROOT + 2 * BLOCK  # gradients of the root and of a block, and a message


def test_checkpointing_keeps_inputs_and_one_block():
    plain, checkpointed = memory(micro_batch=16), memory(micro_batch=16, activation_checkpointing=True)
    block, root = PROFILE.blocks[0], PROFILE.root
    assert plain.activations == pytest.approx(4 * block.saved.at(16) + root.saved.at(16), rel=0.35)
    assert checkpointed.activations < plain.activations / 2
    assert checkpointed.total < plain.total


def test_units_that_stay_are_gathered_all_at_once():
    freed, kept = memory(2), memory(2, reshard_after_forward=False)
    assert kept.gathered >= ROOT + 4 * BLOCK
    assert freed.gathered <= ROOT + 2 * BLOCK


def test_ddp_holds_everything_whole_whatever_its_name_says():
    found = memory(1, scheme="ddp")
    assert found.parameters == PROFILE.numel * 4
    assert found.communication == PROFILE.numel * 4  # buckets


def test_accelerators_lose_memory_to_their_context():
    assert memory(accelerator=CPU).reserve == 0
    assert memory(accelerator=GPU).reserve > 2**30


def test_the_whole_is_the_sum_of_its_parts():
    found = memory()
    assert found.total == sum(found.parts().values())
    assert found.states == found.parameters + found.gradients + found.optimizer + found.masters + found.partial_sums


def test_more_samples_need_more_memory():
    sizes = [memory(micro_batch=count).total for count in (1, 2, 4, 8)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
