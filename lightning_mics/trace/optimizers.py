"""What an optimizer holds, and what it needs for a moment while it steps; measured on tensors without memory."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_mics.core._torch import tree_leaves
from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import did_you_mean
from lightning_mics.trace._torch import count_allocated, fake_tensors

# What an optimizer is taken to hold that cannot step on tensors without values: as much as Adam.
_ESTIMATED_STATES = 2
_Shape = tuple[tuple[int, ...], torch.dtype]


class ParamLike(Protocol):
    """A parameter or what describes one: ``requires_grad`` or ``trainable`` may say that it gets no gradient."""

    @property
    def shape(self) -> Iterable[int]:
        """Its shape."""

    @property
    def dtype(self) -> Any:
        """Its dtype, or the dtype's name."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFootprint:
    """Memory of an optimizer.

    Attributes:
        state_bytes: States, after the first step.
        step_extra_bytes: Most that a later step allocates for a while.
        is_estimate: Whether it is not measured: the optimizer cannot step without values or a closure, and is taken to
            hold two ``float32`` states.
    """

    state_bytes: int
    step_extra_bytes: int
    is_estimate: bool = False


def optimizer_footprint(
    optimizer: str | type[Optimizer] | Optimizer, params: Iterable[ParamLike], *, foreach: bool
) -> OptimizerFootprint:
    """Measures what an optimizer needs for parameters.

    Args:
        optimizer: Name of a class in ``torch.optim`` in any case, or ``"AdamW8bit"``, which torchao and bitsandbytes
            have; a class, or an instance, whose settings are used (of its first parameter group), and which is not
            touched.
        params: Shapes and dtypes, of shards where parameters are sharded. What gets no gradient or has no elements does
            not count.
        foreach: Whether it steps over many parameters at once, as it does on accelerators. That costs memory.

    Raises:
        MiCSConfigError: If the name is unknown.
    """
    kind, options = _resolve(optimizer)
    shapes = tuple(
        (tuple(param.shape), _as_dtype(param.dtype))
        for param in params
        if getattr(param, "trainable", getattr(param, "requires_grad", True)) and math.prod(param.shape)
    )
    measure: Any = _measure  # mypy takes classes of optimizers for unhashable
    result: OptimizerFootprint = measure(kind, options, shapes, foreach)
    return result


class _Ones(TorchFunctionMode):
    """Answers every question for the value of a tensor with one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _VALUES.get(func)
        return kind(1) if kind is not None else func(*args, **(kwargs or {}))


_VALUES: dict[Any, type] = {Tensor.item: float, Tensor.__float__: float, Tensor.__int__: int, Tensor.__bool__: bool}


class AdamW8bit(Optimizer):
    """Holds what the AdamW with 8-bit states of torchao and bitsandbytes holds; computes nothing.

    Two states of a byte an element, with a scale for each block; float32 for small parameters.
    """

    _BLOCK, _SMALL = 256, 4096

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes the states."""
        for param in (param for group in self.param_groups for param in group["params"]):
            self.state[param] = self.state.get(param) or {"first": self._states(param), "second": self._states(param)}

    def _states(self, param: Tensor) -> tuple[Tensor, ...]:
        if param.numel() < self._SMALL:
            return (torch.empty_like(param, dtype=torch.float32),)
        return torch.empty_like(param, dtype=torch.uint8), torch.empty(-(-param.numel() // self._BLOCK))


class Adam8bit(AdamW8bit):
    """The same without decoupled weight decay."""


class _Options(dict[str, Any]):
    """Settings that can be compared by what they print."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items(), key=lambda item: item[0])))


def _resolve(optimizer: str | type[Optimizer] | Optimizer) -> tuple[type[Optimizer], _Options]:
    if isinstance(optimizer, str):
        return _by_name(optimizer), _Options()
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        return optimizer, _Options()
    # Lightning and Accelerate wrap optimizers.
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return _resolve(inner)
    if not isinstance(optimizer, Optimizer):
        raise MiCSConfigError(f"optimizer={optimizer!r} is none. Pass a name such as 'AdamW', a class or an instance.")
    first = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return type(optimizer), _Options(_accepted(type(optimizer), {**optimizer.defaults, **first}))


def _by_name(name: str) -> type[Optimizer]:
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    known |= {kind.__name__.lower(): kind for kind in (AdamW8bit, Adam8bit)}
    found = known.get(name.removeprefix("torch.optim.").lower())
    if found is None:
        hint = did_you_mean(name.lower(), known, show=lambda key: repr(known[key].__name__))
        names = ", ".join(sorted(value.__name__ for value in known.values()))
        raise MiCSConfigError(f"optimizer={name!r} is not known. {hint} Values that work: {names}.".replace("  ", " "))
    return found


def _accepted(kind: type[Optimizer], options: Mapping[str, Any]) -> dict[str, Any]:
    takes = inspect.signature(kind).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values()):
        return dict(options)
    return {key: value for key, value in options.items() if key in takes}


def _as_dtype(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


@functools.lru_cache(maxsize=4096)
def _measure(kind: type[Optimizer], options: _Options, shapes: tuple[_Shape, ...], foreach: bool) -> OptimizerFootprint:
    if not shapes:
        return OptimizerFootprint(state_bytes=0, step_extra_bytes=0)
    takes = inspect.signature(kind).parameters
    at_once = {"foreach": foreach} if "foreach" in takes and not options.get("fused") else {}
    # Step counts are known even here; other values are asked for by a few only.
    for values in (nullcontext(), _Ones()):
        try:
            with fake_tensors(), values:
                return _step(kind, {**options, **at_once}, shapes)
        except Exception:  # whatever an optimizer does with values that are not there
            continue
    states = sum(4 * math.prod(shape) for shape, _ in shapes) * _ESTIMATED_STATES
    return OptimizerFootprint(state_bytes=states, step_extra_bytes=0, is_estimate=True)


def _step(kind: type[Optimizer], options: Mapping[str, Any], shapes: Iterable[_Shape]) -> OptimizerFootprint:
    params = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape, dtype in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    build: Any = kind
    optimizer = build(params, **options)
    optimizer.step()
    leaves = tree_leaves(list(optimizer.state.values()))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)]
    states = list({id(tensor): tensor for tensor in tensors}.values())
    grads = [param.grad for param in params]
    extra = count_allocated(optimizer.step, *params, *grads, *states)
    return OptimizerFootprint(
        state_bytes=sum(state.numel() * state.element_size() for state in states), step_extra_bytes=extra
    )
