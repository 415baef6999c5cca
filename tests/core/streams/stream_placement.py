"""Where tensors lie: in the memory of a pretended device, in pinned host memory, or in ordinary host memory.

All of it is memory of the CPU. The storages of the device are known by a list, and tensors on them say that they are on
``cuda:0``, so that FSDP2, this package and the optimizers go the ways of an accelerator by themselves.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
_real_device: Callable[[Tensor], torch.device] = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]


class Kind(Enum):
    """A kind of memory."""

    DEVICE = "device"
    PINNED = "pinned host"
    HOST = "host"


def is_device(device: torch.device | str | int | None) -> bool:
    """Returns whether a ``device=`` asks for the pretended device."""
    return device is not None and torch.device(device).type == DEVICE.type


def is_real(tensor: Tensor) -> bool:
    """Returns whether a tensor has memory that can be looked at."""
    return _real_device(tensor).type == "cpu" and tensor.layout is torch.strided


class Placement:
    """Which storages are the device's, and which are pinned; all others are ordinary host memory.

    Attributes:
        is_moving: Whether a tensor is moved. Autograd's casts name a device, too, but the real one, which is the CPU.
    """

    def __init__(self) -> None:
        self.is_moving = False
        self._kinds: dict[int, tuple[Kind, object]] = {}

    def of(self, tensor: Tensor) -> Kind:
        """Returns where a tensor with memory lies."""
        return self.of_storage(_inner(tensor).untyped_storage())

    def of_storage(self, storage: torch.UntypedStorage) -> Kind:
        """Returns where a storage lies."""
        entry = self._kinds.get(storage._cdata)
        return Kind.HOST if entry is None else entry[0]

    def live_bytes(self) -> Counter[Kind]:
        """Returns the bytes of the device's and of pinned memory that are in use."""
        found: Counter[Kind] = Counter()
        for kind, reference in self._kinds.values():
            storage = reference() if isinstance(reference, weakref.ref) else None
            found[kind] += 0 if storage is None else storage.nbytes()
        return found

    def put(self, tensor: Tensor, kind: Kind) -> None:
        """Notes where a new tensor lies."""
        storage = tensor.untyped_storage()
        key = storage._cdata

        def forget(ended: object) -> None:
            if self._kinds.get(key, (kind, None))[1] is ended:  # another storage may have its place by now
                del self._kinds[key]

        self._kinds[key] = kind, weakref.ref(storage, forget)

    def device_of(self, tensor: Tensor) -> torch.device:
        """Returns the device that a tensor pretends to be on."""
        inner = _inner(tensor)
        if type(inner).device is not Tensor.device or not is_real(inner):  # a fake tensor, or one on the meta device
            return _real_device(tensor) if inner is tensor else inner.device
        return DEVICE if self.of(inner) is Kind.DEVICE else CPU

    def pretend(self, stack: ExitStack) -> None:
        """Makes tensors tell where they pretend to be, and move there."""
        # PyTorch lists what makes tensors when a device first becomes the current one, and keeps the list for good:
        # with the substitutes below in it, ``from_pretrained`` would leave buffers without values ever after.
        with CPU:
            torch.empty(0)

        def device(tensor: Tensor) -> torch.device:
            return self.device_of(tensor)

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self._move(tensor, args, kwargs)

        patches: dict[str, object] = {
            "device": property(device),
            "is_cuda": property(lambda tensor: self.device_of(tensor).type == DEVICE.type),
            "is_cpu": property(lambda tensor: self.device_of(tensor).type == "cpu"),
            "to": to,
            "cpu": lambda tensor, **kwargs: to(tensor, CPU, **kwargs),
            "cuda": lambda tensor, device=None, **kwargs: to(tensor, DEVICE, **kwargs),
            "is_pinned": lambda tensor, device=None: self.of(tensor) is Kind.PINNED,
            "_make_wrapper_subclass": staticmethod(_make_wrapper_subclass),
        }
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(Tensor, name, value))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _on_host_first(getattr(torch, name))))
        begin = torch.autocast.__init__

        def autocast(context: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            begin(context, "cpu" if is_device(device_type) else device_type, *args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autocast, "__init__", autocast))
        by_device = torch._C._group_tensors_by_device_and_dtype

        def by_pretended_device(lists: Any, with_indices: bool = False) -> Any:
            groups = by_device(lists, with_indices)
            return {(self.device_of(found[0][0][0]), dtype): found for (_, dtype), found in groups.items()}

        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", by_pretended_device))

    def _move(self, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Stands for ``Tensor.to``, which would not copy between two kinds of memory that are both the CPU's."""
        if args and isinstance(args[0], Tensor):
            args, kwargs = args[1:], {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
        given = dict(kwargs)
        copy = given.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **given)
        if device is None or device.type not in ("cpu", DEVICE.type) or tensor.device.type == "meta":
            return _original_to(tensor, *args, **kwargs)
        if tensor.device.type == device.type:
            return _original_to(tensor, dtype=dtype or tensor.dtype, copy=copy)
        with mock.patch.object(self, "is_moving", True):
            return torch.ops.aten._to_copy.default(
                tensor,
                dtype=dtype or tensor.dtype,
                device=device,
                non_blocking=non_blocking,
                memory_format=memory_format if copy else None,
            )


_original_to = Tensor.to
_original_subclass = Tensor._make_wrapper_subclass


def _make_wrapper_subclass(*args: Any, **kwargs: Any) -> Tensor:
    """Makes a DTensor that is, to autograd, where its memory really is."""
    if is_device(kwargs.get("device")):
        kwargs["device"] = CPU
    return _original_subclass(*args, **kwargs)


def _on_host_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes tensors of Python's values as PyTorch does: in host memory, from where they are copied."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        requires_grad = kwargs.pop("requires_grad", False)
        tensor = make(data, *args, **kwargs)
        tensor = tensor if device is None else tensor.to(device)
        return tensor.requires_grad_() if requires_grad else tensor

    return made


def _inner(tensor: Tensor) -> Tensor:
    """Returns what has a tensor's memory."""
    if isinstance(tensor, DTensor):
        return _inner(tensor._local_tensor)
    return _inner(tensor.elem) if isinstance(tensor, AsyncCollectiveTensor) else tensor
