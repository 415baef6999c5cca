"""Tensors whose values are not read yet: of a shape, a dtype and a device, and read when somebody asks for values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_mics.core._needs import require
from lightning_mics.core._torch.modules import tree_leaves, tree_map_only

require(Tensor, "_make_wrapper_subclass")
require(torch._C, "DisableTorchFunctionSubclass")


class Source(Protocol):
    """Where values come from."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Reads a part, on the CPU; a tensor of its own."""

    def cast(self, dtype: torch.dtype) -> Source:
        """Returns the same in another dtype, rounded as ``Tensor.to`` does."""

    def result(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Returns what a function makes of unread tensors, unread as well; ``NotImplemented`` if it cannot be told."""


class _Values:
    """The values of a tensor and of its aliases, such as ``param.data``."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.real: Tensor | None = None  # once they are read

    def read(self, device: torch.device) -> Tensor:
        if self.real is None:
            shape = self.source.shape
            with torch.inference_mode(False), torch.no_grad():
                self.real = self.source.read([0] * len(shape), shape).to(device)
        return self.real


class Unread(Tensor):
    """A tensor, or a parameter, whose values are not read yet.

    What reads or writes a value makes it an ordinary tensor first, the same object; views of it and aliases see each
    other's changes. Moving, casting and copying all of it leave it unread.

    Attributes:
        values: What it shares with its aliases.
        is_fixed: Whether nobody can write to it, so that what is made of it may be unread as well: a tensor of a file
            that is no model's yet.
    """

    values: _Values
    is_fixed: bool
    _is_param = False  # PyTorch's mark of parameters of other classes

    @staticmethod
    def __new__(
        cls, source: Source, device: torch.device | str = "cpu", *, values: _Values | None = None, is_fixed: bool = False
    ) -> Unread:
        made = Tensor._make_wrapper_subclass(cls, torch.Size(source.shape), dtype=source.dtype, device=device)
        made.values, made.is_fixed = values or _Values(source), is_fixed
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def source(self) -> Source | None:
        """Where its values come from, if they are not read yet."""
        return self.values.source if self.values.real is None else None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_SHAPE:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _UNREAD_TOO and (made := _UNREAD_TOO[func](*args, **kwargs)) is not NotImplemented:
            return made
        unread = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Unread)]
        if all(tensor.is_fixed for tensor in unread):
            made = unread[0].values.source.result(func, args, kwargs)
            if made is not NotImplemented:
                return made
        for tensor in unread:
            realize(tensor)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes where PyTorch has not asked above, with the values."""

        def real(leaf: Unread) -> Tensor:
            return leaf.values.read(leaf.device)

        args, kwargs = tree_map_only(Unread, real, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if self.source is None:
            realize(self)
            return self.__deepcopy__(memo)  # of the class that it has now
        copied = _alike(self, Unread(self.source, self.device, is_fixed=self.is_fixed))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        realize(self)
        return self.__reduce_ex__(protocol)


def is_unread(tensor: object) -> bool:
    """Returns whether the values of a tensor are still to be read."""
    return isinstance(tensor, Unread) and tensor.source is not None


def realize(tensor: Tensor) -> None:
    """Makes an unread tensor an ordinary one; the object stays the same."""
    if isinstance(tensor, Unread):
        with torch._C.DisableTorchFunctionSubclass():
            become(tensor, tensor.values.read(tensor.device))


def become(tensor: Tensor, values: Tensor) -> None:
    """Gives a tensor the values, dtype and device of another, of which it is an alias then.

    Whether it is a parameter, whether that is trained, and what has been noted on it stay.
    """
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if isinstance(values, Unread):
            made: Tensor = Unread(values.values.source, values.device, values=values.values)
        else:
            made = values.detach()
        torch.utils.swap_tensors(tensor, _alike(tensor, made))


def _alike(tensor: Tensor, made: Tensor) -> Tensor:
    """Makes ``made`` a parameter if ``tensor`` is one, with what has been noted on that."""
    is_parameter = isinstance(tensor, nn.Parameter)
    own = vars(made).copy() if isinstance(made, Unread) else {}
    if is_parameter and not isinstance(made, Unread):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    elif is_parameter:
        made._is_param = True
        made.requires_grad_(tensor.requires_grad)
    notes = {name: value for name, value in vars(tensor).items() if name not in ("values", "is_fixed", "_is_param")}
    vars(made).update({**notes, **own})
    return made


# What is answered without values.


def _property(name: str) -> Any:
    return getattr(Tensor, name).__get__


_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "itemsize", "nbytes"),
    *("is_meta", "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_quantized", "is_sparse", "is_sparse_csr", "is_mkldnn"),
    *("is_nested", "_version", "output_nr", "retains_grad", "grad_dtype", "names", "_base", "_backward_hooks"),
)
_METHODS = (
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex"),
    *("is_signed", "is_contiguous", "requires_grad_", "__len__", "__hash__", "get_device", "is_inference", "_is_view"),
)
_OF_SHAPE = {
    *(_property(name) for name in _PROPERTIES if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS),
    *(Tensor.requires_grad.__set__, Tensor.grad.__set__),  # type: ignore[attr-defined]
    *(torch.is_floating_point, torch.is_complex, torch.is_signed, torch.numel),
    torch._has_compatible_shallow_copy_type,
}


def _alias(tensor: Tensor, *rest: Any) -> Any:
    if not is_unread(tensor):
        return NotImplemented
    return Unread(tensor.values.source, tensor.device, values=tensor.values)  # type: ignore[attr-defined]


def _set_data(tensor: Tensor, values: Tensor) -> Any:
    if isinstance(tensor, Unread):
        become(tensor, values)
        return None
    return NotImplemented


def _clone(tensor: Tensor, **options: Any) -> Any:
    # One that is trained would be no leaf.
    if options or not is_unread(tensor) or (tensor.requires_grad and torch.is_grad_enabled()):
        return NotImplemented
    return Unread(tensor.source, tensor.device, is_fixed=tensor.is_fixed)  # type: ignore[attr-defined]


def _contiguous(tensor: Tensor, **options: Any) -> Any:
    return tensor if is_unread(tensor) and not options else NotImplemented


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Casts and moves, as ``Tensor.to``."""
    places = [entry for entry in args if isinstance(entry, torch.device | str | int) and not isinstance(entry, bool)]
    dtypes = [entry for entry in args if isinstance(entry, torch.dtype)]
    others = [entry for entry in args if entry is not None and entry not in (*places, *dtypes, False)]
    if others or kwargs.keys() - {"device", "dtype", "non_blocking"} or not is_unread(tensor):
        return NotImplemented
    place = next(iter(places), kwargs.get("device"))
    device = tensor.device if place is None else torch.device(place)
    dtype = next(iter(dtypes), kwargs.get("dtype")) or tensor.dtype
    if device == tensor.device and dtype == tensor.dtype:
        return tensor
    # The result of casting what is trained would be no leaf.
    if device.type == "meta" or (tensor.requires_grad and torch.is_grad_enabled()):
        return NotImplemented
    source = tensor.source  # type: ignore[attr-defined]
    return Unread(source if dtype == tensor.dtype else source.cast(dtype), device, is_fixed=tensor.is_fixed)  # type: ignore[attr-defined]


def _to_dtype(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: NotImplemented if args or kwargs else _to(tensor, dtype)


def _to_device(kind: str) -> Callable[..., Any]:
    def move(tensor: Tensor, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            index = torch.accelerator.current_device_index() if kind != "cpu" else None
            device = torch.device(kind, index) if index is not None else kind
        return _to(tensor, device if not isinstance(device, int) else torch.device(kind, device), **kwargs)

    return move


_UNREAD_TOO: dict[Any, Callable[..., Any]] = {
    Tensor.detach: _alias,
    Tensor.data.__get__: _alias,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.clone: _clone,
    Tensor.contiguous: _contiguous,
    Tensor.to: _to,
    Tensor.cpu: _to_device("cpu"),
    Tensor.cuda: _to_device("cuda"),
    Tensor.float: _to_dtype(torch.float32),
    Tensor.double: _to_dtype(torch.float64),
    Tensor.half: _to_dtype(torch.float16),
    Tensor.bfloat16: _to_dtype(torch.bfloat16),
}
