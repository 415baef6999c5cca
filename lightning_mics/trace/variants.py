"""Models as people train them: with adapters of low rank, with frozen parts, of few bits perhaps.

Changes models that planning has built.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mics.core._torch import shards_integers
from lightning_mics.core.quantized import SMALL
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.profile import DTYPE_BYTES, quantized_params
from lightning_mics.plan.settings import Variant
from lightning_mics.text import did_you_mean
from lightning_mics.trace.huggingface import kept_in_float32


def apply_variant(model: nn.Module, variant: Variant, *, is_whole: bool = True) -> None:
    """Adds adapters to a model, freezes what is not trained, and gives that few bits.

    Args:
        model: The model; adapters get the device of what they are beside. One with a base of few bits can be traced
            alone.
        variant: What differs.
        is_whole: Whether a pattern of what is frozen must match; not where layers of the model have been left out.

    Raises:
        MiCSConfigError: If a pattern matches nothing, or there is nothing frozen that could have few bits.
    """
    if variant.lora_rank is not None:
        adapted = _targets(model, variant.lora_targets, "lora_rank")
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
    if variant.base_bits is not None:
        _quantize(model, variant)


def _quantize(model: nn.Module, variant: Variant) -> None:
    if not shards_integers():
        raise MiCSConfigError(
            f"base_bits={variant.base_bits}: FSDP2 of PyTorch {torch.__version__} shards no integers, so such a base "
            "is not trained on. Use PyTorch 2.13 or newer, or leave base_bits out."
        )
    linear = {name: model.get_submodule(name) for name in _targets(model, (), "base_bits")}
    frozen = {name: layer for name, layer in linear.items() if not layer.get_parameter("weight").requires_grad}
    if not frozen:
        raise MiCSConfigError(
            f"base_bits={variant.base_bits} is for weights that are not trained, and those of all {len(linear)} linear "
            "layers but the head are. Add lora_rank=16 for adapters beside them, freeze some, or leave base_bits out."
        )
    for name, layer in frozen.items():
        if not any(_matches(name, whole) for whole in kept_in_float32(model)):
            model.set_submodule(name, Quantized(layer, variant))


class Quantized(nn.Module):
    """A frozen linear layer of few bits as ``bitsandbytes`` has it: both passes unpack the weight. Computes nothing."""

    def __init__(self, layer: nn.Module, variant: Variant) -> None:
        super().__init__()
        assert variant.base_bits is not None
        inputs, outputs = _widths(layer)
        self._shape, self._bits = [outputs, inputs], variant.base_bits
        self.bias = layer.bias
        parts = quantized_params((outputs, inputs), self._bits, variant.double_quantization)
        self._names = ["weight", *(f"scales{index}" for index in range(1, len(parts)))]
        device = layer.get_parameter("weight").device
        for name, part in zip(self._names, parts, strict=True):
            tensor: Any = torch.empty(part.shape, dtype=getattr(torch, part.dtype), device=device)
            if part.numel * DTYPE_BYTES[part.dtype] <= SMALL and name != "weight":
                self.register_buffer(name, tensor)  # whole on every rank, as the engine has it
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                getattr(self, name).packed = part.packed  # for whoever counts weights

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies."""
        parts = [getattr(self, name) for name in self._names]
        result: Tensor = _Product.apply(x, self.bias, self._shape, self._bits == 8, *parts)
        return result


class _Product(torch.autograd.Function):
    """Multiplies rows with a weight that comes in parts, and has no gradient; may keep the rows, as with 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: list[int], keeps: bool, *parts: Tensor) -> Tensor:
        ctx.shape, ctx.parts = shape, parts
        ctx.rows = x if keeps else None  # beside what autograd saves, so that recomputation does not let them go
        return functional.linear(x, _unpack(parts, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight = _unpack(ctx.parts, ctx.shape, grad.dtype)
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad @ weight, of_bias, *[None] * (2 + len(ctx.parts))


@torch.library.custom_op("lightning_mics::unpack", mutates_args=())
def _unpack(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Stands for a kernel that reads the parts of a quantized weight, and writes the weight."""
    return torch.empty(shape, dtype=dtype, device=parts[0].device)


_unpack.register_fake(lambda parts, shape, dtype: torch.empty(shape, dtype=dtype, device=parts[0].device))


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


def _targets(model: nn.Module, asked: tuple[str, ...], setting: str) -> list[str]:
    """Returns the names of linear layers, all but the head or those that are asked for."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    ]
    if not linear:
        raise MiCSConfigError(f"{type(model).__name__} has no linear layer, so {setting} has nothing to act on.")
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
