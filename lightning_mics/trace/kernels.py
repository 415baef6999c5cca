"""Makes fake tensors, which are on the CPU, keep what the kernels of the real device would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_mics.trace._torch import GROUPED_PRODUCT, FakeAttention


class LikeKernels(TorchFunctionMode):
    """A context in which attention, experts and dropout are those of a kind of device."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._on_cpu = device_type == "cpu"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(self._on_cpu, *args, **kwargs)
        if func is GROUPED_PRODUCT and args[0].dtype != torch.bfloat16:
            # On tensors without values it takes no other dtype. One matrix for all rows costs the same.
            return args[0] @ args[1][0]
        if func is functional.dropout and not self._on_cpu:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    on_cpu: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in one piece where the device has it; what that keeps for dropout are two numbers."""
    is_plain = query.dim() == 4 and query.shape[-1] == value.shape[-1] and query.dtype == key.dtype == value.dtype
    if not is_plain or (on_cpu and dropout_p) or (attn_mask is not None and attn_mask.requires_grad):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p if on_cpu else 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return FakeAttention.apply(query, key, value, attn_mask, is_causal, scale)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0 or inplace:
        return functional.dropout(input, p, training, inplace)
    # Its mask takes a byte an element; the CPU's own is as wide as the input.
    return torch.native_dropout(input, p, training)[0]
