"""Optimizers that were built before the model was sharded: checking them, and pointing them to the shards."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mics.core.masters import has_master, master_of
from lightning_mics.core.slices import is_slice
from lightning_mics.errors import MiCSConfigError


class ShardedParams:
    """Remembers which shard replaced which parameter, so that optimizers built before can be pointed to the shards."""

    def __init__(self) -> None:
        # Parameters that nobody holds any more are forgotten, and their memory with them.
        self._shards: MutableMapping[Tensor, nn.Parameter | None] = WeakIdKeyDictionary()

    @contextmanager
    def remember(self, model: nn.Module) -> Iterator[None]:
        """Notes what becomes of the parameters of ``model``, which is sharded inside this context."""
        before = dict(model.named_parameters())
        yield
        after = dict(model.named_parameters())
        for name, param in before.items():
            self._shards[param] = after.get(name)  # frozen weights of 4 or 8 bits are their parts now

    def forget(self, params: Iterable[nn.Parameter]) -> None:
        """Notes parameters of which none are left."""
        for param in params:
            self._shards[param] = None

    def rebind(self, optimizer: Optimizer) -> None:
        """Points an optimizer to the shards of its parameters.

        Raises:
            MiCSConfigError: If it has taken steps on the parameters as they were.
        """
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param in self._shards and param in optimizer.state:
                    states = optimizer.state.pop(param)
                    shard = self._shards[param]
                    if shard is None:
                        continue
                    if not _is_initial(param, states):
                        _refuse_used(optimizer)
                    optimizer.state[shard] = _shard_states(optimizer, param, shard, states)
            shards = [self._shards.get(param, param) for param in group["params"]]
            group["params"] = [shard for shard in shards if shard is not None]


def widen_initial_states(optimizer: Optimizer) -> None:
    """Makes states anew that an optimizer made, when it was made, of shards in 16 bits whose masters it steps on."""
    for param, states in optimizer.state.items():
        if has_master(param) and any(_is_narrow(value, param) for value in states.values()):
            master = master_of(param)
            assert master is not None
            optimizer.state[param] = _states_of_new(optimizer, master)


def _is_narrow(value: Any, param: Tensor) -> bool:
    return (
        isinstance(value, Tensor) and value.dtype == param.dtype and value.shape == param.shape and not is_slice(value)
    )


def as_optimizers(optimizer: Any) -> list[Any]:
    """Returns what was passed as ``optimizer=``, as a list of optimizers, classes and names.

    Raises:
        MiCSConfigError: If something else is among them.
    """
    several = isinstance(optimizer, Collection) and not isinstance(optimizer, str | Mapping)
    entries = list(optimizer) if several else [] if optimizer is None else [optimizer]
    for entry in entries:
        is_class = isinstance(entry, type) and issubclass(entry, Optimizer)
        if not (isinstance(entry, Optimizer | str) or is_class):
            raise MiCSConfigError(
                f"optimizer={entry!r} is none. Values that work: an optimizer of torch.optim's kind or a list of them; "
                "for shard_size='auto' also a class, or a name such as 'AdamW'.",
                setting="optimizer",
            )
    return entries


def check_unused(optimizer: Optimizer, model: nn.Module) -> None:
    """Checks that an optimizer can be pointed to the shards of a model.

    Raises:
        MiCSConfigError: If it has taken steps on the model's parameters.
    """
    params = set(model.parameters())
    for param, states in optimizer.state.items():
        if param in params and not _is_initial(param, states):
            _refuse_used(optimizer)


def check_rebinding(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Checks that optimizers can be pointed to the shards of a model.

    Raises:
        MiCSConfigError: If an optimizer has states already, or no parameter of the model's.
    """
    params = set(model.parameters())
    for optimizer in optimizers:
        check_unused(optimizer, model)
        if not any(param in params for group in optimizer.param_groups for param in group["params"]):
            raise MiCSConfigError("An optimizer holds no parameter of the model. Create it from model.parameters().")


def _refuse_used(optimizer: Optimizer) -> None:
    raise MiCSConfigError(
        f"{type(optimizer).__name__} has taken steps already, and its states belong to the whole model. Shard the "
        "model first, then create the optimizer and load its checkpoint."
    )


_COUNTS = ("step", "steps", "num_steps", "t", "k", "iteration")


def _is_initial(param: Tensor, states: Mapping[str, Any]) -> bool:
    """Returns whether states look as a constructor leaves them: counts of zero, and tensors that no gradient made.

    Adagrad and others fill them when they are made: with one value, or with the parameter's.
    """
    counts = [value for name, value in states.items() if name in _COUNTS]
    rest = [value for name, value in states.items() if name not in _COUNTS and isinstance(value, Tensor)]
    return not any(map(_is_positive, counts)) and all(_is_constant(value) or _copies(value, param) for value in rest)


def _is_positive(count: Any) -> bool:
    return not (isinstance(count, Tensor) and count.is_meta) and bool(count)


def _is_constant(value: Tensor) -> bool:
    return value.is_meta or value.numel() == 0 or bool((value == value.flatten()[0]).all())


def _copies(value: Tensor, param: Tensor) -> bool:
    return value.shape == param.shape and torch.equal(value, param.detach())


def _shard_states(optimizer: Optimizer, param: Tensor, shard: Tensor, states: Mapping[str, Any]) -> dict[str, Any]:
    """Returns initial states of a parameter as states of its shard."""
    if any(isinstance(value, Tensor) and value.is_meta for value in states.values()):
        return _states_of_new(optimizer, shard)
    return {name: _shard_state(shard, value) for name, value in states.items()}


@torch.no_grad()
def _shard_state(shard: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != shard.shape or value.dim() == 0:
        return value
    if _is_constant(value):
        return torch.full_like(shard, value.flatten()[0].item(), dtype=value.dtype) if value.numel() else value
    return shard.detach().clone()  # a copy of the parameter


def _states_of_new(optimizer: Optimizer, shard: Tensor) -> dict[str, Any]:
    """Returns the states that a new optimizer of the kind makes of a shard: on the meta device there were no values."""
    known = inspect.signature(type(optimizer).__init__).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    try:
        return dict(type(optimizer)([shard], **settings).state[shard])
    except Exception as error:
        raise MiCSConfigError(
            f"{type(optimizer).__name__} was created over parameters on the meta device, and its states have no "
            "values. Shard the model first, then create the optimizer."
        ) from error
