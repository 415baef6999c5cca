"""``.data`` of gathered parameters: what is written to it is noticed, though autograd is not told."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_plain_data: Any = torch.Tensor.data

# Where a parameter's ``.data`` is looked up: among which aliases, and which one it is there.
_WATCHED: Any = WeakIdKeyDictionary()


class DataAliases:
    """What ``.data`` of some parameters gives: views of one alias of each, whose version tells of writes.

    PyTorch makes a new alias each time, with a version of its own, which nobody can ask.
    """

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}
        self._seen: dict[int, int] = {}

    def watch(self, params: Sequence[nn.Parameter]) -> None:
        """Gives out ``.data`` of parameters from now on."""
        _install()
        for index, param in enumerate(params):
            _WATCHED[param] = (self, index)

    def written(self) -> set[int]:
        """Returns the indices of parameters that were written by way of ``.data`` since the last call."""
        versions = {index: made._version for index, made in self._made.items()}
        if versions == self._seen:
            return set()
        before, self._seen = self._seen, versions
        return {index for index, version in versions.items() if version != before[index]}

    def give(self, index: int, plain: Tensor) -> Tensor:
        """Returns a view of the alias of what ``.data`` would be."""
        made = self._made.get(index)
        if made is None or not made.is_set_to(plain):
            made = self._made[index] = plain
            self._seen[index] = 0
        return made.detach()


@functools.cache
def _install() -> None:
    nn.Parameter.data = property(_get_data, _plain_data.__set__)  # type: ignore[assignment]


def _get_data(param: nn.Parameter) -> Tensor:
    watched = _WATCHED.get(param)
    if watched is None:
        plain: Tensor = _plain_data.__get__(param)
        return plain
    aliases, index = watched
    with torch.inference_mode(False):  # where tensors have no version
        alias: Tensor = aliases.give(index, _plain_data.__get__(param))
        return alias
