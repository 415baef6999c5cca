"""Text that every machine has: the sources of Python's standard library. Shared by the examples."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

PACKAGES = ("asyncio", "email", "unittest", "xml")
VOCABULARY = 256  # the examples read bytes, so they need no tokenizer


def sources(package: str) -> list[str]:
    """Returns the source files of a package of the standard library."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    return [path.read_text(errors="ignore") for path in sorted(folder.rglob("*.py"))]


class ByteWindows(Dataset[dict[str, Tensor]]):
    """Windows of the standard library's bytes, for language models.

    Args:
        length: Bytes in a window.
        limit: Use about so many bytes.
    """

    def __init__(self, length: int = 64, limit: int = 500_000) -> None:
        text = "".join(text for package in PACKAGES for text in sources(package))
        self.tokens = torch.tensor(list(text.encode()[:limit]))
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index * self.length : (index + 1) * self.length]}


def byte_loader(batch_size: int = 8) -> DataLoader:
    """Returns batches of windows; Lightning gives each rank its own part."""
    return DataLoader(ByteWindows(), batch_size, shuffle=True, drop_last=True)


Snippets = list[tuple[str, int]]


def labelled_snippets(num_lines: int = 8, per_package: int = 400) -> tuple[Snippets, Snippets]:
    """Returns snippets of code with the number of the package they come from, to train on and held out.

    Whole files are held out, and each package has as many snippets as any other.
    """
    shuffle = random.Random(0)
    parts: tuple[Snippets, Snippets] = ([], [])
    for label, package in enumerate(PACKAGES):
        files = sources(package)
        shuffle.shuffle(files)
        cut = len(files) // 4
        for part, chosen, count in ((parts[0], files[cut:], per_package), (parts[1], files[:cut], per_package // 4)):
            lines = [text.splitlines() for text in chosen]
            snippets = ["\n".join(f[i : i + num_lines]) for f in lines for i in range(0, len(f), num_lines)]
            shuffle.shuffle(snippets)
            part += [(snippet, label) for snippet in snippets[:count]]
    for part in parts:
        shuffle.shuffle(part)
    return parts
