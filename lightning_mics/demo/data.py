"""Real text that needs no download: the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY = 1024


def standard_library_text(max_bytes: int) -> Iterator[str]:
    """Yields source files of the standard library, in a fixed order.

    Args:
        max_bytes: Stop after about so many bytes.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    total = 0
    for path in sorted([*folder.glob("*.py"), *folder.glob("[a-z]*/*.py")]):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_text(errors="ignore")
        yield text
        total += len(text)
        if total >= max_bytes:
            return


def train_tokenizer(text: list[str], path: Path) -> Tokenizer:
    """Trains a byte-pair tokenizer of ``VOCABULARY`` tokens and saves it.

    Args:
        text: What to learn from.
        path: The file to write.
    """
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, text: list[str]) -> Tensor:
    """Returns the tokens of all files, one behind another; int64, shape ``[tokens]``."""
    return torch.tensor([token for part in tokenizer.encode_batch(text) for token in part.ids])


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of a token stream.

    Args:
        tokens: Shape ``[tokens]``.
        length: Tokens in a window.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns a window under ``"input_ids"``."""
        return {"input_ids": self.tokens[index * self.length : (index + 1) * self.length]}
