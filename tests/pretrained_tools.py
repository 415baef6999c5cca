"""Small models of transformers that tests save and load again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from lightning_mics.pretrained.files import WeightsFile

VOCABULARY = 61
_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_LLAMA = {
    **_SMALL,
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}


def saved(folder: Path, kind: str, **options: Any) -> Path:
    """Saves a model of a kind, with weights of its own."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(11)
    model = _SAVED[kind]()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder / kind, **options)
    return folder / kind


def class_of_kind(kind: str) -> Any:
    """Returns the class by which tests load what :func:`saved` has saved."""
    import transformers

    return getattr(transformers, _LOADED[kind])


def inputs(kind: str) -> dict[str, Tensor]:
    """Returns what a model of a kind takes."""
    rows = torch.arange(12).view(2, 6) * 7 % VOCABULARY
    return {"input_ids": rows, **({"decoder_input_ids": rows[:, :4]} if kind == "t5" else {})}


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, **_NO_DROPOUT, **_SMALL))


def _bert() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(**sizes, **_SMALL))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **{**_SMALL, "bos_token_id": None}))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_LLAMA))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(num_local_experts=3, **_LLAMA))


_SAVED = {"gpt2": _gpt2, "bert": _bert, "t5": _t5, "llama": _llama, "mixtral": _mixtral}
_LOADED = {
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


class Reads:
    """Counts, inside this context, the bytes that are read from tensors of files."""

    def __init__(self) -> None:
        self.bytes = 0
        self._read = WeightsFile.read

    def __enter__(self) -> Reads:
        read = self._read

        def counted(file: WeightsFile, start: int, length: int, into: Tensor | None = None) -> Tensor:
            self.bytes += length if hasattr(file, "entries") else 0  # those of headers come before
            return read(file, start, length, into)

        WeightsFile.read = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *args: object) -> None:
        WeightsFile.read = self._read  # type: ignore[method-assign]
