"""Frozen weights of 4 or 8 bits: FSDP2 shards the plain tensors that they are made of.

A quantized weight is integers, scales and the like under the name of one parameter: a tensor subclass (``torchao``), or
a parameter with its state beside it (``bitsandbytes``). FSDP2 could neither split nor rebuild most of them. So the
weight becomes a parametrization of PyTorch's: its parts are the module's parameters, plain tensors of integers, which
no mixed precision casts, and the weight is put together from them, without a copy, whenever it is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from lightning_mics.core._torch import shards_integers
from lightning_mics.errors import MiCSConfigError

_BITS = {1: torch.int8, 2: torch.uint8, 4: torch.int32, 8: torch.int64}  # gloo sends no integers of 16 bits
SMALL = 1024  # bytes: tables of values and the like, which every rank keeps
_Make = Callable[[Sequence[Tensor]], Tensor]


def split_quantized(model: nn.Module, *, is_planned: bool = False) -> list[nn.Parameter]:
    """Replaces quantized weights by their parts. Between passes these are shards, of which no weight can be made.

    Args:
        model: The model, not sharded yet.
        is_planned: Whether the planner is to choose a size for it.

    Returns:
        The weights, which are no longer the model's.

    Raises:
        MiCSConfigError: If such a weight is to be trained, is tied to another, or lacks what rebuilds it; if there are
            any, and PyTorch shards none, or the planner is asked, which does not know them.
    """
    found = [
        (module, name, param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if is_quantized(param)
    ]
    if found and not shards_integers():
        raise MiCSConfigError(
            f"{type(model).__name__} has {len(found)} weights of 4 or 8 bits, and FSDP2 of PyTorch {torch.__version__} "
            "shards no integers. Use PyTorch 2.13 or newer, or load the model in bfloat16."
        )
    if found and is_planned:
        raise MiCSConfigError(
            f"shard_size='auto' does not plan weights of 4 or 8 bits, and {type(model).__name__} has {len(found)}. "
            "Give a number, such as shard_size=2; mics plan --base-bits 4 says which.",
            setting="shard_size",
        )
    names = {id(param): name for name, param in model.named_parameters()}
    written = {inner for layer in model.modules() if _has_dora(layer) for inner in layer.modules()}
    for module, _, param in found:
        _check(names[id(param)], module, param, [other for *_, other in found], writes=module in written)
    for module, name, param in found:
        parametrize.register_parametrization(module, name, _Weight(param, module), unsafe=True)
        if hasattr(param, "SCB"):
            _forget(module)
            module.register_state_dict_pre_hook(_forget)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # it would repack the weight in place
    return [param for *_, param in found]


def _forget(module: Any, *_: Any) -> None:
    """Drops what ``bitsandbytes.nn.Linear8bitLt`` keeps of its weight: the whole one, or one that is freed by now."""
    if hasattr(module, "state"):
        module.state.CB = module.state.SCB = None


def holds_quantized(module: nn.Module) -> bool:
    """Returns whether a module has a quantized weight that was split."""
    return parametrize.is_parametrized(module) and any(isinstance(inner, _Weight) for inner in module.modules())


def _has_dora(layer: Any) -> bool:
    chosen = getattr(layer, "use_dora", None)
    return isinstance(chosen, dict) and any(chosen.values())


def is_quantized(param: Tensor) -> bool:
    """Returns whether a parameter is a frozen weight of 4 or 8 bits that is not split yet."""
    if param.requires_grad and hasattr(param, "fsdp_pre_all_gather"):
        return False  # FSDP2 trains those
    return hasattr(type(param), "__tensor_flatten__") or hasattr(param, "quant_state") or hasattr(param, "SCB")


def _check(name: str, module: nn.Module, param: Tensor, others: Sequence[Tensor], *, writes: bool) -> None:
    kind = type(param).__name__
    problem = None
    if param.requires_grad:
        problem = "is to be trained. Freeze it (requires_grad_(False)) and train adapters beside it"
    elif param.is_meta:
        problem = "is on the meta device. Load the model before it is sharded"
    elif sum(other is param for other in others) > 1:
        problem = "is tied to another one. Leave it out of quantization, or untie it"
    elif hasattr(param, "quant_state") and writes and param.device.type == "cpu":
        problem = "is written by DoRA of PEFT on CPUs. Train on GPUs, or set use_dora=False"
    elif hasattr(param, "quant_state") and getattr(param, "quant_state", None) is None:
        problem = "is not quantized yet. Move the model to its device before it is sharded"
    elif hasattr(param, "SCB") and _eight_bits(param, module) is None:
        problem = (
            "is not quantized yet, or keeps 16-bit weights (has_fp16_weights=True). Load the model with "
            "load_in_8bit=True, and move it to its device before it is sharded"
        )
    if problem is not None:
        raise MiCSConfigError(f"Parameter {name}, a {kind} of 4 or 8 bits, {problem}.")


class _Weight(nn.Module):
    """Puts a quantized weight together from its parts."""

    def __init__(self, weight: Tensor, module: nn.Module) -> None:
        super().__init__()
        tensors, self._make = _apart(weight, module)
        self._dtypes = [tensor.dtype for tensor in tensors]
        self._small = [tensor.dim() == 0 or tensor.nbytes <= SMALL for tensor in tensors]
        if all(self._small):
            self._small[0] = False
        for index, (tensor, small) in enumerate(zip(tensors, self._small, strict=True)):
            if small:
                self.register_buffer(f"small{index}", tensor.detach())
        self._parts = [_bits(tensor) for tensor, small in zip(tensors, self._small, strict=True) if not small]

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Returns the parts, once, when they become the module's parameters."""
        parts, self._parts = self._parts, []
        return tuple(parts)

    def forward(self, *parts: Tensor) -> Tensor:
        """Returns the weight; it shares the memory of the parts."""
        left = iter(parts)
        tensors = [
            getattr(self, f"small{index}") if small else next(left).detach().view(dtype)
            for index, (small, dtype) in enumerate(zip(self._small, self._dtypes, strict=True))
        ]
        return self._make(tensors)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_BITS[tensor.itemsize]) if tensor.is_floating_point() else tensor.detach()


def _apart(weight: Tensor, module: nn.Module) -> tuple[list[Tensor], _Make]:
    """Returns the plain tensors of a quantized weight, and what puts others like them together."""
    if hasattr(type(weight), "__tensor_flatten__"):
        return _subclass(weight)
    return _four_bits(weight) if hasattr(weight, "quant_state") else _eight_bits(weight, module)  # type: ignore


def _subclass(weight: Any) -> tuple[list[Tensor], _Make]:
    names, context = weight.__tensor_flatten__()
    kind, size, stride = type(weight), weight.size(), weight.stride()
    inner = [
        _subclass(tensor) if hasattr(type(tensor), "__tensor_flatten__") else ([tensor], None)
        for tensor in (getattr(weight, name) for name in names)
    ]

    def make(tensors: Sequence[Tensor]) -> Tensor:
        left, parts = list(tensors), {}
        for name, (own, make_inner) in zip(names, inner_kinds, strict=True):
            some, left = left[:own], left[own:]
            parts[name] = some[0] if make_inner is None else make_inner(some)
        made: Tensor = kind.__tensor_unflatten__(parts, context, size, stride)
        return made

    inner_kinds = [(len(tensors), make_inner) for tensors, make_inner in inner]
    return [tensor for tensors, _ in inner for tensor in tensors], make


_OF_WEIGHT = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
_OF_STATE = ("absmax", "code", "offset")


def _four_bits(weight: Any) -> tuple[list[Tensor], _Make]:
    """Of ``bitsandbytes.nn.Params4bit``."""
    kind, states = type(weight), [weight.quant_state, weight.quant_state.state2]
    options = {name: getattr(weight, name) for name in _OF_WEIGHT}
    held = [
        (index, name)
        for index, state in enumerate(states)
        for name in _OF_STATE
        if isinstance(getattr(state, name, None), Tensor)
    ]
    tensors = [weight.data, *(getattr(states[index], name) for index, name in held)]
    states = [copy.copy(state) for state in states]
    for index, name in held:
        setattr(states[index], name, None)

    def make(tensors: Sequence[Tensor]) -> Tensor:
        if isinstance(tensors[0], DTensor):
            return tensors[0]
        made = [copy.copy(state) for state in states]
        for (index, name), tensor in zip(held, tensors[1:], strict=True):
            setattr(made[index], name, tensor)
        made[0].state2 = made[1]
        whole: Tensor = kind(tensors[0], requires_grad=False, quant_state=made[0], bnb_quantized=True, **options)
        return whole

    return tensors, make


def _eight_bits(weight: Any, module: Any) -> tuple[list[Tensor], _Make] | None:
    """Of ``bitsandbytes.nn.Int8Params``, whose values its module takes over in the first forward pass."""
    holder: Any = weight if weight.CB is not None else getattr(module, "state", None)
    if weight.has_fp16_weights or getattr(holder, "CB", None) is None:
        return None
    kind, tensors = type(weight), [holder.CB, holder.SCB]

    def make(tensors: Sequence[Tensor]) -> Tensor:
        values, scales = tensors
        if isinstance(values, DTensor):
            return values
        whole: Tensor = kind(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
        return whole

    return tensors, make
