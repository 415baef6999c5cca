"""Optimizers that were built before the model was sharded: checking them, and pointing them to the shards."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mics.errors import MiCSConfigError


class ShardedParams:
    """Remembers which shard replaced which parameter, so that optimizers built before can be pointed to the shards."""

    def __init__(self) -> None:
        # Parameters that nobody holds any more are forgotten, and their memory with them.
        self._shards: MutableMapping[Tensor, nn.Parameter] = WeakIdKeyDictionary()

    @contextmanager
    def remember(self, model: nn.Module) -> Iterator[None]:
        """Notes what becomes of the parameters of ``model``, which is sharded inside this context."""
        before = dict(model.named_parameters())
        yield
        for name, shard in model.named_parameters():
            self._shards[before[name]] = shard

    def rebind(self, optimizer: Optimizer) -> None:
        """Points an optimizer to the shards of its parameters.

        Raises:
            MiCSConfigError: If it has taken steps on the parameters as they were.
        """
        for group in optimizer.param_groups:
            if optimizer.state and any(param in self._shards for param in group["params"]):
                _refuse_used(optimizer)
            group["params"] = [self._shards.get(param, param) for param in group["params"]]


def as_optimizers(optimizer: Any) -> list[Any]:
    """Returns what was passed as ``optimizer=``, as a list of optimizers, classes and names.

    Raises:
        MiCSConfigError: If something else is among them.
    """
    entries = list(optimizer) if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]
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
    if optimizer.state and any(param in params for group in optimizer.param_groups for param in group["params"]):
        _refuse_used(optimizer)


def check_rebinding(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Checks that optimizers can be pointed to the shards of a model, and belong to it alone.

    Raises:
        MiCSConfigError: If an optimizer has states already, or parameters that are not the model's.
    """
    params = set(model.parameters())
    for optimizer in optimizers:
        check_unused(optimizer, model)
        if any(param not in params for group in optimizer.param_groups for param in group["params"]):
            raise MiCSConfigError(
                "An optimizer holds parameters that the model does not have. Create it from model.parameters()."
            )


def _refuse_used(optimizer: Optimizer) -> None:
    raise MiCSConfigError(
        f"{type(optimizer).__name__} has taken steps already, and its states belong to the whole model. Shard the "
        "model first, then create the optimizer and load its checkpoint."
    )
