"""Models whose frozen linear layers have 4 or 8 bits, as the planner builds them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from adapter_tools import quantized
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from lightning_mics import MiCSConfigError
from lightning_mics.core._torch import shards_integers
from lightning_mics.plan.settings import Variant
from lightning_mics.trace import profile_model, variants
from lightning_mics.trace.variants import Quantized, apply_variant

shards_them = pytest.mark.skipif(not shards_integers(), reason="FSDP2 of this torch shards no integers")
SMALL: dict[str, Any] = {"vocab_size": 100, "use_cache": False}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=16, **SMALL))


def t5() -> nn.Module:
    shape = {"d_model": 64, "d_ff": 96, "d_kv": 32, "num_heads": 2, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **SMALL, **shape))


def quantized_layers(model: nn.Module) -> set[str]:
    return {name.removesuffix(".base") for name, module in model.named_modules() if isinstance(module, Quantized)}


@shards_them
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_gpt2_keep_their_biases(bits: int) -> None:
    """Frozen by name, without adapters; the biases are trained."""
    model = gpt2()
    apply_variant(model, Variant(base_bits=bits, frozen=("wte", "wpe", "*c_*.weight")))
    assert len(quantized_layers(model)) == 2 * 4
    tokens = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
    found, whole = profile_model(model, tokens), profile_model(gpt2(), tokens)
    assert found.numel == whole.numel
    assert found.trainable_numel == whole.numel - 100 * 64 - 16 * 64 - 2 * 12 * 64**2


@shards_them
@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_model_keeps_in_float32_is_not_quantized(bits: int) -> None:
    model = t5()
    apply_variant(model, Variant(base_bits=bits, lora_rank=2))
    names = quantized_layers(model)
    assert len(names) == 2 * (4 + 1) + 2 * (8 + 1) and not any(name.endswith("wo") for name in names)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    found = profile_model(model, {"input_ids": tokens, "labels": tokens}, param_dtype="bfloat16")
    assert all(block.runs_backward for block in found.blocks)


def test_models_that_are_quantized_already_are_refused() -> None:
    tokens = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    with pytest.raises(MiCSConfigError, match=r"has 14 weights of 4 or 8 bits.* Plan it as it is before"):
        profile_model(quantized("own int8"), tokens)


def test_a_torch_that_shards_no_integers_is_told() -> None:
    with mock.patch.object(variants, "shards_integers", lambda: False), pytest.raises(MiCSConfigError) as error:
        apply_variant(gpt2(), Variant(base_bits=4, lora_rank=2))
    assert "Use PyTorch 2.13 or newer, or leave base_bits out" in str(error.value)
