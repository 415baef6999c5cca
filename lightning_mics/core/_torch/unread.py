"""Tensors whose values are not read yet: of a shape, a dtype and a device, and read when somebody asks for values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_mics.core._needs import require
from lightning_mics.core._torch.modules import tree_leaves, tree_map_only
from lightning_mics.errors import MiCSError

require(Tensor, "_make_wrapper_subclass")
require(torch._C, "DisableTorchFunctionSubclass")


_CPU = torch.device("cpu")


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
        cell: What it shares with its aliases.
        is_fixed: Whether nobody can write to it, so that what is made of it may be unread as well: a tensor of a file
            that is no model's yet.
    """

    cell: _Values
    is_fixed: bool
    _is_param = False  # PyTorch's mark of parameters of other classes

    @staticmethod
    def __new__(
        cls,
        source: Source,
        device: torch.device = _CPU,
        *,
        cell: _Values | None = None,
        is_fixed: bool = False,
    ) -> Unread:
        made = Tensor._make_wrapper_subclass(cls, torch.Size(source.shape), dtype=source.dtype, device=device)
        made.cell, made.is_fixed = cell or _Values(source), is_fixed
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def source(self) -> Source | None:
        """Where its values come from, if they are not read yet."""
        return self.cell.source if self.cell.real is None else None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_SHAPE:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _UNREAD_TOO and (made := _UNREAD_TOO[func](*args, **kwargs)) is not NotImplemented:
            return made
        unread = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Unread)]
        if all(tensor.is_fixed for tensor in unread):
            made = unread[0].cell.source.result(func, args, kwargs)
            if made is not NotImplemented:
                return made
        for tensor in unread:
            realize(tensor)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Computes where PyTorch has not asked above, with the values."""

        def real(leaf: Unread) -> Tensor:
            return leaf.cell.read(leaf.device)

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


def source_of(tensor: Tensor) -> Any:
    """Returns where an unread tensor's values come from; ``None`` for any other."""
    return tensor.source if isinstance(tensor, Unread) else None


def realize(tensor: Tensor) -> None:
    """Makes an unread tensor an ordinary one; the object stays the same."""
    if isinstance(tensor, Unread):
        with torch._C.DisableTorchFunctionSubclass():
            become(tensor, tensor.cell.read(tensor.device))


def become(tensor: Tensor, values: Tensor) -> None:
    """Gives a tensor the values, dtype and device of another, of which it is an alias then.

    Whether it is a parameter, whether that is trained, and what has been noted on it stay.

    Raises:
        MiCSError: If something else holds the tensor in a way that forbids it.
    """
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if isinstance(values, Unread):
            made: Tensor = Unread(values.cell.source, values.device, cell=values.cell)
        else:
            made = values.detach()
        try:
            torch.utils.swap_tensors(tensor, _alike(tensor, made))
        except RuntimeError as error:
            raise MiCSError(
                f"A pretrained weight of shape {tuple(tensor.shape)} was left unread, and cannot be read now because "
                f"something keeps a weak reference or a node of autograd on it ({error}). Use a value of it before, or "
                "load this model whole: FSDP_CPU_RAM_EFFICIENT_LOADING=false."
            ) from error


def _alike(tensor: Tensor, made: Tensor) -> Tensor:
    """Makes ``made`` a parameter if ``tensor`` is one, with what has been noted on that."""
    is_parameter = isinstance(tensor, nn.Parameter)
    own = vars(made).copy() if isinstance(made, Unread) else {}
    if is_parameter and not isinstance(made, Unread):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    elif is_parameter:
        made._is_param = True
        made.requires_grad_(tensor.requires_grad)
    notes = {name: value for name, value in vars(tensor).items() if name not in ("cell", "is_fixed", "_is_param")}
    vars(made).update({**notes, **own})
    return made


# What is answered without values.


def _property(name: str) -> Any:
    return getattr(Tensor, name).__get__


_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn"),
    *("is_meta", "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_quantized", "is_sparse", "is_sparse_csr", "is_mkldnn"),
    *("is_nested", "_version", "output_nr", "retains_grad", "grad_dtype", "names", "_base", "_backward_hooks"),
    *("itemsize", "nbytes"),
)
_METHODS = (
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex"),
    *("is_signed", "is_contiguous", "requires_grad_", "__len__", "__hash__", "get_device", "is_inference", "_is_view"),
)
_OF_SHAPE = {
    *(_property(name) for name in _PROPERTIES if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS),
    *(Tensor.requires_grad.__set__, Tensor.grad.__set__),  # type: ignore[attr-defined, union-attr]
    *(torch.is_floating_point, torch.is_complex, torch.is_signed, torch.numel),
    torch._has_compatible_shallow_copy_type,
}


def _alias(tensor: Any, *rest: Any) -> Any:
    return Unread(tensor.cell.source, tensor.device, cell=tensor.cell) if is_unread(tensor) else NotImplemented


def _set_data(tensor: Tensor, values: Tensor) -> Any:
    if not isinstance(tensor, Unread):
        return NotImplemented
    become(tensor, values)
    return None


def _clone(tensor: Any, **options: Any) -> Any:
    if options or not is_unread(tensor) or _is_recorded(tensor):
        return NotImplemented
    return Unread(tensor.source, tensor.device, is_fixed=tensor.is_fixed)


def _contiguous(tensor: Tensor, **options: Any) -> Any:
    return tensor if is_unread(tensor) and not options else NotImplemented


def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Casts and moves, as ``Tensor.to``."""
    places = [entry for entry in args if isinstance(entry, torch.device | str | int) and not isinstance(entry, bool)]
    dtypes = [entry for entry in args if isinstance(entry, torch.dtype)]
    others = [entry for entry in args if entry not in (None, False, *places, *dtypes)]
    if others or kwargs.keys() - {"device", "dtype", "non_blocking"} or not is_unread(tensor):
        return NotImplemented
    place = next(iter(places), kwargs.get("device"))
    device = tensor.device if place is None else torch.device(place)
    if device.type != "cpu" and device.index is None and device.type != "meta":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    dtype = next(iter(dtypes), kwargs.get("dtype")) or tensor.dtype
    if device == tensor.device and dtype == tensor.dtype:
        return tensor
    if device.type == "meta" or _is_recorded(tensor):
        return NotImplemented
    source = tensor.source if dtype == tensor.dtype else tensor.source.cast(dtype)
    return Unread(source, device, is_fixed=tensor.is_fixed)


def _is_recorded(tensor: Tensor) -> bool:
    """Returns whether autograd records what is made of a tensor."""
    return tensor.requires_grad and torch.is_grad_enabled()


def _equal(tensor: Any, other: Any) -> Any:
    """Compares values without keeping them: transformers asks it of weights that a model may tie."""
    if not (is_unread(tensor) and is_unread(other)):
        return NotImplemented
    return tensor.source == other.source or torch.equal(*(_Values(each.source).read(_CPU) for each in (tensor, other)))


def _to_dtype(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: NotImplemented if args or kwargs else _to(tensor, dtype)


def _to_device(kind: str) -> Callable[..., Any]:
    return lambda tensor, device=None, **kwargs: _to(tensor, kind if device is None else device, **kwargs)


_UNREAD_TOO: dict[Any, Callable[..., Any]] = {
    Tensor.detach: _alias,
    Tensor.data.__get__: _alias,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.clone: _clone,
    Tensor.contiguous: _contiguous,
    torch.equal: _equal,
    Tensor.equal: _equal,
    Tensor.to: _to,
    Tensor.cpu: _to_device("cpu"),
    Tensor.cuda: _to_device("cuda"),
    Tensor.float: _to_dtype(torch.float32),
    Tensor.double: _to_dtype(torch.float64),
    Tensor.half: _to_dtype(torch.float16),
    Tensor.bfloat16: _to_dtype(torch.bfloat16),
}
