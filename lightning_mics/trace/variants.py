"""Models as people train them: with adapters of low rank, with frozen parts. Changes models that planning has built."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.settings import Variant
from lightning_mics.text import did_you_mean


def apply_variant(model: nn.Module, variant: Variant, *, is_whole: bool = True) -> None:
    """Adds adapters to a model, and freezes what is not trained.

    Args:
        model: The model; adapters get the device of what they are beside.
        variant: What differs.
        is_whole: Whether a pattern of what is frozen must match; not where layers of the model have been left out.

    Raises:
        MiCSConfigError: If a pattern matches nothing.
    """
    if variant.lora_rank is not None:
        adapted = _targets(model, variant.lora_targets)
        model.requires_grad_(False)
        for name in adapted:
            owner, _, last = name.rpartition(".")
            base = model.get_submodule(name)
            with torch.device(base.get_parameter("weight").device):
                adapter = Adapted(base, variant.lora_rank)
            setattr(model.get_submodule(owner), last, adapter)
    for pattern in variant.frozen:
        found = [param for name, param in model.named_parameters() if _matches(name, pattern)]
        if not found and is_whole:
            raise MiCSConfigError(_unmatched("frozen", pattern, [name for name, _ in model.named_parameters()]))
        for param in found:
            param.requires_grad_(False)


class Adapted(nn.Module):
    """A layer with an adapter of low rank beside it, as PEFT has it: ``base(x) + scale * up(down(x))``."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        inputs, outputs = _widths(base)
        self.base = base
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.to(self.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The layer's own: models look at its dtype."""
        return self.base.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the adapter makes of the input."""
        result: Tensor = self.base(x) + 2.0 * self.up(self.down(x))
        return result


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Returns the inputs and outputs of a linear layer; GPT-2's is transposed."""
    first, second = layer.get_parameter("weight").shape
    return (second, first) if isinstance(layer, nn.Linear) else (first, second)


def _targets(model: nn.Module, asked: tuple[str, ...]) -> list[str]:
    """Returns the names of the layers that get adapters."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    ]
    if not linear:
        raise MiCSConfigError(f"{type(model).__name__} has no linear layer, so lora_rank has nothing to adapt.")
    for pattern in asked:
        if not any(_matches(name, pattern) for name in linear):
            raise MiCSConfigError(_unmatched("lora_targets", pattern, [name.rpartition(".")[2] for name in linear]))
    return [name for name in linear if not asked or any(_matches(name, pattern) for pattern in asked)]


def _matches(name: str, pattern: str) -> bool:
    """Returns whether a name, or a part of it between dots, is what a pattern says."""
    return fnmatchcase(name, pattern) or any(fnmatchcase(part, pattern) for part in name.split("."))


def _unmatched(setting: str, pattern: str, names: list[str]) -> str:
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    hint = did_you_mean(pattern, parts, f"There are: {', '.join(parts[:12])}.")
    return f"{setting}={pattern!r} matches nothing in the model. {hint}"
