"""Where a unit leaves its results: a backward pass is to find the unit gathered, and to end, wherever that is.

FSDP2 puts hooks on tensors that it finds in a unit's output: in lists, tuples, dictionaries and dataclasses. What it
does not find begins no backward pass: no gradient is ever reduced, and autograd meets parameters that were freed. So
results are looked for in objects, closures, arguments that were added to, and attributes of the unit's modules; where
there may be more, the unit's gathered parameters stay in memory, and their gradients tell of the pass.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mics.core._torch import (
    FSDPState,
    UnitParamGroup,
    current_backward_id,
    in_function_transform,
    is_newer,
    pre_backward_hook,
    sequence_number,
    watch_base,
)
from lightning_mics.errors import MiCSError

_VALUES = (type(None), str, bytes, int, float, complex, type, torch.dtype, torch.device)
_LEAVES = (*_VALUES, types.ModuleType, nn.Module, FSDPState)
_LATE = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, map, filter)
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
_MOST_OBJECTS = 10_000
# Forward passes in which all attributes of a unit's modules are looked at; later ones look where there was something.
_LEARNING = 3


class Findings(NamedTuple):
    """What is in an output.

    Attributes:
        seen: Tensors where FSDP2 finds them.
        hidden: Others.
        is_whole: Whether there is nothing that cannot be looked into.
    """

    seen: list[Tensor]
    hidden: list[Tensor]
    is_whole: bool


def look_into(output: Any, *, refuse_late: bool = False) -> Findings:
    """Finds the tensors in an object.

    Raises:
        MiCSError: If there is a generator in it, with ``refuse_late``: its body would run outside of the pass.
    """
    if isinstance(output, Tensor):
        return Findings([output], [], True)
    found = Findings([], [], True)
    is_whole, known = output is not None, set()
    waiting: deque[tuple[Any, list[Tensor]]] = deque([(output, found.seen)])
    while waiting:
        item, tensors = waiting.popleft()
        if isinstance(item, Tensor):
            tensors.append(item)
        elif not isinstance(item, _LEAVES) and id(item) not in known:
            if refuse_late and isinstance(item, _LATE):
                raise MiCSError(
                    f"A forward pass returned a {type(item).__name__}, whose body would run after the pass, when "
                    "parameters are shards. Return its items, for example as a list."
                )
            known.add(id(item))
            parts = _parts(item)
            is_whole = is_whole and parts is not None and len(known) < _MOST_OBJECTS
            if parts and len(known) < _MOST_OBJECTS:
                target = tensors if isinstance(item, dict | list | tuple) else found.hidden
                waiting.extend((part, target) for part in parts)
    return Findings(found.seen, found.hidden, is_whole)


def _parts(item: Any) -> Iterable[Any] | None:
    """Returns what an object consists of, as a new list; ``None`` if that cannot be told."""
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, list | tuple | AbstractSet | deque):
        return list(item)
    if isinstance(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
        return [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    values = [*getattr(item, "__dict__", {}).values(), *_slots(item)]
    return values if values or hasattr(item, "__dict__") else None


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _slots(item: Any) -> Iterator[Any]:
    for cls in type(item).__mro__:
        for value in vars(cls).values():
            if isinstance(value, types.MemberDescriptorType):
                try:
                    yield value.__get__(item)
                except AttributeError:  # not set
                    continue


class UnitOutputs:
    """Watches the forward passes of one unit for results that FSDP2 does not find.

    Args:
        unit: Its modules.
        modules: These and those inside of them, without those of other units.
        group: The unit's parameters.
        told: Called before a gradient of a gathered parameter gets more; it must not refer to the model.
        is_root: Whether the unit is the root, which stays gathered after its forward pass.
    """

    def __init__(
        self,
        unit: Sequence[nn.Module],
        modules: Sequence[nn.Module],
        group: UnitParamGroup,
        told: Callable[[], None],
        *,
        is_root: bool,
    ) -> None:
        self._inside, self._group, self._told, self._is_root = modules, group, told, is_root
        self._gather, self._is_group = pre_backward_hook(unit[0]), len(unit) > 1
        self._since: int | None = None
        self._arguments: list[Any] = []
        self._num_passes = 0
        self._places: dict[tuple[int, str], dict[str, Any]] = {}
        group.wrap_forward(self._before, self._after)

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_first = self._since is None or not self._is_group
        if is_first and torch.is_grad_enabled() and current_backward_id() == -1:
            self._since = sequence_number()
            self._arguments = [item for item in (*args, *kwargs.values()) if not isinstance(item, (Tensor, *_LEAVES))]

    def _after(self, output: Any) -> None:
        since, arguments = self._since, self._arguments
        self._since, self._arguments = None, []
        found = look_into(output, refuse_late=True)
        if since is None or not torch.is_grad_enabled() or in_function_transform():
            return
        self._watch_views(found.seen)
        hidden = [*found.hidden, *self._attributes()]
        if arguments:
            hidden += _all_in(arguments)
        hidden = [tensor for tensor in hidden if is_newer(tensor, since)]
        for tensor in hidden:
            tensor.register_hook(self._gather)
        self._watch_views(hidden)
        is_found = bool(hidden) or any(tensor.requires_grad for tensor in found.seen)
        if not is_found and not found.is_whole:
            self._group.keep_memory()
        if self._is_root or self._group.is_kept:
            self._group.watch_gradients(self._told)

    def _watch_views(self, tensors: Iterable[Tensor]) -> None:
        """Hears of gradients of views also after these were changed in place, which takes them out of the graph."""
        for tensor in tensors:
            watch_base(tensor, self._gather)

    def _attributes(self) -> Iterator[Tensor]:
        """Yields tensors that modules of the unit keep. The root is gathered when they are used, as it is not freed."""
        if self._is_root:
            return
        if self._num_passes < _LEARNING:
            self._num_passes += 1
            self._places.update(
                ((id(module), name), vars(module))
                for module in self._inside
                for name, value in vars(module).items()
                if name not in _OWN_ATTRIBUTES and not isinstance(value, _LEAVES) and _all_in(value)
            )
        for (_, name), attributes in self._places.items():
            yield from _all_in(attributes.get(name))


def _all_in(item: Any) -> list[Tensor]:
    found = look_into(item)
    return [*found.seen, *found.hidden]
