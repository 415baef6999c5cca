"""Frozen bases of 4 and 8 bits: predicted against measured states, gathers and memory of real ranks."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from adapter_tools import quantize
from memory_tools import most_allocated
from plan_examples import make_cluster
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mics import Hop, MiCSConfig, MiCSConfigError, communication_ledger, mics_shard
from lightning_mics.core._torch import local_tensor, shards_integers
from lightning_mics.plan import Candidate, ModelProfile, Training, predict_memory
from lightning_mics.plan.evaluate import evaluate, predict_traffic
from lightning_mics.plan.profile import DTYPE_BYTES, quantized_params
from lightning_mics.plan.settings import Variant
from lightning_mics.testing import WorkerPool
from lightning_mics.trace import profile_model
from lightning_mics.trace.variants import apply_variant

TOKENS, SAMPLES, VOCABULARY, RANKS, LAYERS, WIDTH, WIDE = 16, 2, 128, 2, 4, 256, 704
FP32 = Training(param_dtype="float32", reduce_dtype="float32", holds_outputs=False)
CPU = make_cluster(device_type="cpu").node.accelerator
ADAPTED = Variant(lora_rank=4, lora_targets=("q_proj", "up_proj"))
FOUR, EIGHT = replace(ADAPTED, base_bits=4), replace(ADAPTED, base_bits=8)
# What is measured, what is planned, and the bytes that ours lacks or has beside those of bitsandbytes.
KINDS = {
    "own int4": (FOUR, 64 * 7 * LAYERS),  # tables of 16 values
    "own int8": (EIGHT, 0),
    "bitsandbytes 4 single": (FOUR, 0),
    "bitsandbytes 4": (replace(FOUR, double_quantization=True), 0),
    "bitsandbytes 8": (EIGHT, 0),
}
pytestmark = pytest.mark.skipif(not shards_integers(), reason="FSDP2 of this torch shards no integers")


def llama(variant: Variant) -> nn.Module:
    """A Llama of which most is linear layers in blocks."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **shape)).train()  # type: ignore[arg-type]
    apply_variant(model, variant)
    return model


def traced(model: nn.Module, **settings: Any) -> ModelProfile:
    sample = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}
    return profile_model(model, sample, device_type="cpu", **settings)


@cache
def planned(variant: Variant, dtype: str | None = None) -> ModelProfile:
    return traced(llama(variant), param_dtype=dtype)


def measured(kind: str, settings: dict[str, Any]) -> tuple[int, int, int]:
    """Returns the bytes of this rank's parameters, what it gathers in a microstep, and its memory at the peak."""
    model: Any = llama(ADAPTED)
    quantize(model.model, kind)
    model = mics_shard(model, MiCSConfig(shard_size=RANKS, node_size=RANKS, **settings))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    tokens = torch.randint(VOCABULARY, (SAMPLES, TOKENS))

    def step() -> None:
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gathered = communication_ledger(model).total(Hop.PARTITION_GATHER).message_bytes // 2
    gc.collect()
    here = [local_tensor(param) for param in model.parameters()]
    kept = [local_tensor(state) for param in trained for state in optimizer.state[param].values() if state.dim()]
    states = sum(tensor.nbytes for tensor in (*here, *model.buffers()))
    return states, gathered, states + sum(tensor.nbytes for tensor in kept) + most_allocated(step)


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_rank_keeps_gathers_and_needs_is_that_of_real_steps(kind: str, again: bool, pool: WorkerPool) -> None:
    if not kind.startswith("own"):
        pytest.importorskip(kind.partition(" ")[0])
    variant, tables = KINDS[kind]
    found = pool.run(measured, kind, {"activation_checkpointing": again}, world_size=RANKS, timeout=120)
    candidate = Candidate(shard_size=RANKS, micro_batch=SAMPLES, activation_checkpointing=again, accumulation=2)
    memory = predict_memory(planned(variant), candidate, FP32, CPU)
    traffic = predict_traffic(planned(variant), make_cluster(1, RANKS), candidate, FP32)
    assert memory.parameters - tables == max(states for states, *_ in found)
    assert traffic[Hop.PARTITION_GATHER].message_bytes == 2 * found[0][1]
    assert memory.total == pytest.approx(max(need for *_, need in found), rel=0.1)


@pytest.mark.parametrize(
    ("bits", "double", "expected"), [(4, False, 4 + 32 / 64), (4, True, 4 + 8 / 64 + 32 / (64 * 256)), (8, False, 8)]
)
def test_bits_of_a_weight(bits: int, double: bool, expected: float) -> None:
    parts = quantized_params((4096, 14336), bits, double)
    numel = sum(part.weights for part in parts)
    found = 8 * sum(part.numel * DTYPE_BYTES[part.dtype] for part in parts) / numel
    assert numel == 4096 * 14336 and found == pytest.approx(expected + 32 / 14336 * (bits == 8), abs=2e-4)
    odd = quantized_params((3, 43), bits, double)
    assert [part.shape[0] for part in odd][:2] == ([3, 3] if bits == 8 else [65, 3])


def test_only_linear_layers_that_are_frozen_have_few_bits() -> None:
    whole, four = planned(ADAPTED), planned(FOUR)
    assert four.numel == whole.numel and four.trainable_numel == whole.trainable_numel
    assert (four.root.params, four.compute_dtype) == (whole.root.params, "float32")
    parts = [param for param in four.blocks[0].params if param.is_quantized]
    assert sum(param.weights for param in parts) == 4 * WIDTH**2 + 3 * WIDTH * WIDE
    assert {param.dtype for param in four.blocks[0].params if not param.is_quantized} == {"float32"}
    assert four.flops == whole.flops


@pytest.mark.parametrize("scheme", ["mics", "ddp"])
def test_no_precision_casts_the_base(scheme: Any) -> None:
    """Its bytes are the same in all dtypes, on the wire and in memory; nobody has masters of it."""
    found, cluster = planned(FOUR, "bfloat16"), make_cluster()
    base = [param for unit in found.units for param in unit.params if param.is_quantized]
    rest = sum(param.numel for unit in found.units for param in unit.params if not param.is_quantized)
    stored, size = sum(param.numel * DTYPE_BYTES[param.dtype] for param in base), 1 if scheme == "ddp" else 2
    for training, width in ((Training(), 4), (Training(state_dtype="bfloat16"), 2)):
        plain = Candidate(scheme=scheme, shard_size=size)
        memory = predict_memory(found, plain, training, CPU)
        assert memory.parameters == (stored + width * rest) / size + found.buffer_bytes
        if scheme == "mics":
            gathered = predict_traffic(found, cluster, replace(plain, reshard_after_forward=False), training)
            assert gathered[Hop.PARTITION_GATHER].message_bytes == stored + 2 * rest
        elif width == 4:  # autocast keeps 16 bits of what is not quantized
            assert memory.gathered == 2 * rest
    if scheme == "mics":
        owners = replace(plain, optimizer_shard_size=8, master_weights="owners")
        memory = predict_memory(found, owners, Training(), CPU)
        assert memory.parameters == (stored + 2 * rest) / 2 + found.buffer_bytes
        assert memory.masters == pytest.approx(4 * rest / 8, rel=0.1)  # adapters of 4 rows have 8 owners


def test_a_weight_is_unpacked_in_both_passes_one_at_a_time() -> None:
    whole, four, eight = (planned(variant).blocks[1] for variant in (ADAPTED, FOUR, EIGHT))
    largest, unpacked = 4 * WIDTH * WIDE, four.unpacked_bytes("float32") + 64 * 7  # tables of values are no parameters
    for name in ("forward_extra", "backward_extra"):
        more = getattr(four, name).at(SAMPLES) - getattr(whole, name).at(SAMPLES)
        assert 0.5 * largest < more <= largest
    for name in ("forward_traffic", "backward_traffic"):
        assert getattr(four, name).fixed - getattr(whole, name).fixed == pytest.approx(unpacked, rel=0.01)
    assert four.forward_launches - whole.forward_launches == 7
    assert four.saved == whole.saved  # bitsandbytes keeps the rows beside weights of 8 bits, adapters or none
    assert eight.saved.at(1) > whole.saved.at(1) and eight.checkpoint.at(1) > whole.checkpoint.at(1)


def test_a_rate_of_operations_leaves_unpacking_to_the_memory() -> None:
    """As on devices that were calibrated."""
    candidate, cluster = Candidate(scheme="ddp", shard_size=1), make_cluster(1, 1)
    whole, four = (evaluate(planned(variant), cluster, candidate, FP32).time.compute for variant in (ADAPTED, FOUR))
    unpacked = sum(block.unpacked_bytes("float32") for block in planned(FOUR).blocks)
    assert four - whole == pytest.approx(2 * unpacked / (0.85 * 1e12), rel=0.05)


def test_an_estimate_without_a_sample_unpacks_too() -> None:
    whole, four = (profile_model(llama(variant), None, sequence_length=TOKENS) for variant in (ADAPTED, FOUR))
    assert four.flops == whole.flops
    assert four.blocks[0].backward_extra.fixed - whole.blocks[0].backward_extra.fixed == 4 * WIDTH * WIDE


def test_a_base_that_is_trained_is_refused() -> None:
    with pytest.raises(MiCSConfigError, match=r"base_bits=4 is for weights that are not trained.* Add lora_rank=16"):
        Variant(base_bits=4)
    with pytest.raises(MiCSConfigError, match="all 28 linear layers but the head are"):
        llama(Variant(base_bits=4, frozen=("embed_tokens", "lm_head")))
    with pytest.raises(MiCSConfigError, match="base_bits=3 is not one of None, 4, 8"):
        Variant(lora_rank=4, base_bits=3)
    with pytest.raises(MiCSConfigError, match=r"base_bits=8\. Set base_bits=4, or leave it out"):
        Variant(lora_rank=4, base_bits=8, double_quantization=True)
