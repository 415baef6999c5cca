"""Data and pretrained weights, shared by the examples of this folder; nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for data.py, which all examples share

from data import (
    LENGTH,
    PACKAGES,
    VOCABULARY,
    Snippets,
    TokenWindows,
    bundled_model,
    byte_loader,
    labelled_snippets,
    stdlib_text,
)

__all__ = [
    "LENGTH",
    "MAX_TOKENS",
    "PACKAGES",
    "VOCABULARY",
    "Snippets",
    "TokenWindows",
    "bundled_model",
    "byte_loader",
    "labelled_snippets",
    "snippet_loader",
    "stdlib_text",
]
MAX_TOKENS = 48


def snippet_loader(
    snippets: Snippets, tokenizer: PreTrainedTokenizerBase, batch_size: int, shuffle: bool = False
) -> DataLoader[dict[str, Tensor]]:
    """Returns batches of tokenized pieces of code; Accelerate gives each rank its own part."""

    def collate(rows: Snippets) -> dict[str, Tensor]:
        texts, labels = zip(*rows, strict=True)
        encoded = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor(labels)}

    return DataLoader(snippets, batch_size, shuffle=shuffle, collate_fn=collate)
