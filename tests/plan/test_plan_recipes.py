"""What people train with: predicted against measured memory of a small Llama on real ranks, and what it changes."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_tools import most_allocated
from plan_examples import make_cluster
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lightning_mics import MiCSConfig, MiCSConfigError, mics_shard
from lightning_mics.core._torch import local_tensor
from lightning_mics.metrics import Hop
from lightning_mics.plan import Candidate, MemoryBreakdown, ModelProfile, Training, predict_memory
from lightning_mics.plan.evaluate import predict_traffic
from lightning_mics.plan.search import Choices, search
from lightning_mics.plan.settings import Variant
from lightning_mics.testing import WorkerPool
from lightning_mics.trace.losses import ChunkedLoss
from lightning_mics.trace.profile import profile_model
from lightning_mics.trace.variants import apply_variant

TOKENS, SAMPLES, VOCABULARY, RANKS = 128, 4, 4096, 2
PLAIN = Variant()
FP32 = Training(param_dtype="float32", reduce_dtype="float32", holds_outputs=False)
CPU = make_cluster(device_type="cpu").node.accelerator


def llama(variant: Variant = PLAIN) -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **shape, **heads)).train()
    apply_variant(model, variant)
    return model


def plain_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


class HeadLoss(torch.autograd.Function):
    """Cross-entropy with the head, eight pieces of rows at a time; its gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        total, grads, weight_grad = torch.zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
        for rows, expected, grad in zip(hidden.chunk(8), tokens.chunk(8), grads.chunk(8), strict=True):
            logits = functional.linear(rows, weight)
            total += functional.cross_entropy(logits, expected, reduction="sum")
            wrong = logits.softmax(-1)
            wrong[torch.arange(len(rows)), expected] -= 1
            wrong /= len(hidden)
            torch.mm(wrong, weight, out=grad)
            if weight.requires_grad:
                weight_grad.addmm_(wrong.T, rows)
        ctx.save_for_backward(grads, weight_grad if weight.requires_grad else None)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(saved if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors), None


def chunked_loss(model: Any, tokens: Tensor) -> Tensor:
    head, losses = model.lm_head, []

    def instead(hidden: Tensor) -> Tensor:
        losses.append(HeadLoss.apply(hidden.flatten(0, 1), head.weight, tokens.flatten()))
        return losses[-1]

    head.forward = instead
    model(input_ids=tokens)
    del head.forward
    return losses.pop()


def peak_of(variant: Variant, how: Any, loss: Callable[[nn.Module, Tensor], Tensor]) -> int:
    """Returns the bytes of this rank's tensors at the peak of a step of two microsteps, states included."""
    model = mics_shard(llama(variant), MiCSConfig(shard_size=RANKS, node_size=RANKS, activation_checkpointing=how))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    tokens = torch.randint(VOCABULARY, (SAMPLES, TOKENS))

    def step() -> None:
        for _ in range(2):
            loss(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    states = [local_tensor(param) for param in model.parameters()]
    states += [local_tensor(state) for param in trained for state in optimizer.state[param].values() if state.dim()]
    return sum(state.nbytes for state in states) + most_allocated(step)


def predicted(variant: Variant, how: Any) -> float:
    loss = None if variant.loss_chunks is None else ChunkedLoss(variant.loss_chunks)
    sample = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}
    found = profile_model(llama(variant), sample, loss=loss, device_type="cpu")
    candidate = Candidate(shard_size=RANKS, micro_batch=SAMPLES, accumulation=2, activation_checkpointing=how)
    return predict_memory(found, candidate, FP32, CPU).total


RECIPES: dict[str, tuple[Variant, Any]] = {
    "selective": (Variant(loss_chunks=8), "selective"),
    "adapters": (Variant(lora_rank=8), False),
    "plain": (PLAIN, False),
    "chunked loss": (Variant(loss_chunks=8), False),
    "every second": (Variant(loss_chunks=8), 2),
    "all of it": (Variant(lora_rank=8, loss_chunks=8), "selective"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.campaign] * (index > 1)) for index, name in enumerate(RECIPES)]
)
def test_memory_is_that_of_real_steps(name: str, pool: WorkerPool) -> None:
    variant, how = RECIPES[name]
    loss = plain_loss if variant.loss_chunks is None else chunked_loss
    measured = max(pool.run(peak_of, variant, how, loss, world_size=RANKS))
    assert predicted(variant, how) == pytest.approx(measured, rel=0.1)


@functools.cache
def small(variant: Variant = PLAIN) -> ModelProfile:
    loss = None if variant.loss_chunks is None else ChunkedLoss(variant.loss_chunks)
    sample = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}
    return profile_model(llama(variant), sample, param_dtype="bfloat16", loss=loss)


def test_a_chunked_loss_computes_what_the_whole_one_does_with_few_logits_at_a_time() -> None:
    whole, chunked = small(), small(Variant(loss_chunks=8))
    assert chunked.flops == whole.flops and chunked.root.backward_flops == 0
    logits = TOKENS * VOCABULARY * 4
    most = [root.saved.at(1) + root.backward_extra.at(1) for root in (whole.root, chunked.root)]
    assert most[0] > 3 * logits and most[1] < logits / 2
    assert (whole.root.outputs.at(1), chunked.root.outputs.at(1)) == (logits / 2, 0)


def test_only_adapters_are_trained_reduced_and_stepped_on() -> None:
    found = small(Variant(lora_rank=8))
    per_block = 8 * (4 * 128 * 2 - 2 * 64 + 3 * (128 + 352))
    assert found.trainable_numel == 4 * per_block
    cluster, candidate = make_cluster(), Candidate(shard_size=4, accumulation=2)
    traffic = predict_traffic(found, cluster, candidate, Training())
    assert traffic[Hop.PARTITION_GATHER].message_bytes == pytest.approx(2 * 2 * 2 * found.numel, rel=0.35)
    assert traffic[Hop.PARTITION_REDUCE].message_bytes == 2 * 4 * found.trainable_numel
    memory = predict_memory(found, candidate, Training(), cluster.node.accelerator)
    assert memory.optimizer == pytest.approx(2 * 4 * found.trainable_numel / 4, rel=0.01)


def test_what_is_frozen_below_everything_trained_has_no_backward_pass() -> None:
    found = small(Variant(frozen=("embed_tokens", "*.layers.[01].*")))
    assert [block.runs_backward for block in found.blocks] == [False, False, True, True]
    calls = predict_traffic(found, make_cluster(), Candidate(shard_size=4), Training())[Hop.PARTITION_GATHER].calls
    assert calls == 5 + 2


def test_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(MiCSConfigError, match=r"lora_targets='query_proj' matches nothing.*Did you mean 'q_proj'"):
        llama(Variant(lora_rank=4, lora_targets=("query_proj",)))
    with pytest.raises(MiCSConfigError, match="frozen='embeddings' matches nothing"):
        llama(Variant(frozen=("embeddings",)))
    with pytest.raises(MiCSConfigError, match="Add lora_rank"):
        Variant(lora_targets=("q_proj",))


def test_blocks_are_recomputed_as_asked() -> None:
    found = small()
    kept = {how: memory_of(found, how).activations for how in (False, 2, "selective", True)}
    block = found.blocks[1]
    saved, inputs, products = (amount.at(SAMPLES) for amount in (block.saved, block.checkpoint, block.products))
    assert kept[False] - kept[True] == pytest.approx(4 * (saved - inputs), rel=0.02)
    assert kept[False] - kept[2] == pytest.approx(2 * (saved - inputs), rel=0.02)
    assert kept["selective"] - kept[True] == pytest.approx(4 * products, rel=0.02)


def test_what_recomputed_blocks_keep_is_in_host_memory_and_travels_twice() -> None:
    found, cluster = small(), make_cluster()
    inputs = sum(block.checkpoint.at(SAMPLES) for block in found.blocks)
    kept = {moved: memory_of(found, True, activation_checkpointing_offload=moved) for moved in (False, True)}
    assert kept[False].activations - kept[True].activations == inputs  # at the peak, when the root's backward begins
    choices = Choices(
        batches=[(SAMPLES, 1)], shard_sizes=[1], activation_checkpointing=True, reshard_after_forward=True
    )
    step = {
        moved: search(
            found, cluster, Training(), dataclasses.replace(choices, activation_checkpointing_offload=moved)
        ).best
        for moved in (False, True)
    }
    assert step[True].candidate.activation_checkpointing_offload
    copied = 2 * inputs / cluster.node.accelerator.host_bandwidth
    longer = step[True].time.compute - step[False].time.compute
    assert 0.999 * copied < longer < 1.25 * copied  # what runs beside collectives takes longer


def memory_of(found: ModelProfile, how: Any, **settings: Any) -> MemoryBreakdown:
    candidate = Candidate(shard_size=2, micro_batch=SAMPLES, activation_checkpointing=how, **settings)
    return predict_memory(found, candidate, FP32, CPU)


def test_experts_count_whole_in_memory_and_by_use_in_operations() -> None:
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(use_cache=False, **shape, **heads, **experts))
    sample = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}
    whole, narrow = (profile_model(model, sample, param_dtype=dtype) for dtype in (None, "bfloat16"))
    used, attention = 2 * 3 * 64 * 128 + 8 * 64, 64 * (64 + 32 + 32 + 64)
    expected = 2 * TOKENS * (used + attention) + 4 * TOKENS**2 * 64
    assert whole.blocks[0].forward_flops == narrow.blocks[0].forward_flops == expected
    assert whole.numel - whole.active_numel == 2 * 6 * 3 * 64 * 128


def test_selective_recomputation_is_among_the_plans_and_costs_time_between_the_others() -> None:
    planning = search(small(), make_cluster(), Training(), Choices(batches=[(SAMPLES, 1)], shard_sizes=[4]))
    seconds = {
        plan.candidate.activation_checkpointing: plan.time.seconds
        for plan in planning.plans
        if plan.candidate.reshard_after_forward
    }
    assert seconds[False] < seconds["selective"] < seconds[True]
