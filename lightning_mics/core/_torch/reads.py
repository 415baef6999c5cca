"""Noticing that somebody is about to look into a DTensor, while values of some are still on their way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mics.core._needs import require

require(torch._C, "_disabled_torch_function_impl", "DisableTorchFunctionSubclass")

# What says nothing of values: PyTorch and FSDP2 ask for it all the time.
_PROPERTIES = (
    *("requires_grad", "grad", "is_leaf", "grad_fn", "_version", "_backward_hooks", "_post_accumulate_grad_hooks"),
    *("grad_dtype", "shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_meta", "is_sparse", "is_quantized"),
)
_tensor: Any = Tensor
_HARMLESS = {
    *(getattr(_tensor, name).__get__ for name in _PROPERTIES),
    *(_tensor.grad.__set__, _tensor.requires_grad.__set__),
    *(_tensor.requires_grad_, _tensor.size, _tensor.dim, _tensor.numel, _tensor.stride, _tensor.element_size),
    *(_tensor.is_floating_point, _tensor.is_complex, _tensor.__len__),
}

_about_to_read: Callable[[Iterable[DTensor]], None] | None = None


def before_reads(told: Callable[[Iterable[DTensor]], None] | None) -> None:
    """Calls ``told`` with DTensors, before an operation looks at their values; ``None`` ends that.

    It costs nothing while nobody waits for it.
    """
    global _about_to_read
    if told is _about_to_read:
        return
    _install()
    _about_to_read = told
    trap = torch._C._disabled_torch_function_impl if told is None else _trap
    DTensor.__torch_function__ = trap  # type: ignore[method-assign, assignment]


def _tell(*looked_at: Any) -> None:
    told = _about_to_read
    if told is not None:
        told(_dtensors(looked_at))


def _dtensors(values: Iterable[Any]) -> Iterator[DTensor]:
    for value in values:
        if isinstance(value, DTensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _dtensors(value)


@classmethod  # type: ignore[misc]
def _trap(
    cls: type, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    if func not in _HARMLESS:
        _tell(*args, *(kwargs or {}).values())
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


@functools.cache
def _install() -> None:
    """Watches the methods of DTensor that hand out its memory without an operation."""
    for name in ("to_local", "redistribute"):
        method = getattr(DTensor, name)

        @functools.wraps(method)
        def watched(tensor: DTensor, *args: Any, method: Any = method, **kwargs: Any) -> Any:
            _tell(tensor)
            return method(tensor, *args, **kwargs)

        setattr(DTensor, name, watched)
