"""Gradients of parameters that every rank holds whole: scalars and the like, and those of layers around a sharded one.

Each rank adds up its own microsteps in ``.grad``, as autograd does. At the end of a window the sums are averaged over
the world in one flat message a dtype, in three steps: a reduce-scatter inside the partition group, hop two on this
rank's part, a gather. Each part is so reduced in one place of each replica, and all ranks get the same bits. Averaging
what is equal already changes nothing, so a second backward pass in a window only averages again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mics.core._torch import (
    ParamHooks,
    adds_gradients,
    all_gather_single,
    divert_hooks,
    reduce_scatter_single,
    registered_hooks,
)
from lightning_mics.core.mesh import MiCSMesh, communication_device
from lightning_mics.errors import MiCSError
from lightning_mics.metrics import CommLedger, Hop

UNIT = "(whole)"


class WholeGradients:
    """The gradients of whole parameters that end their windows together with one sharded model.

    Args:
        mesh: The groups.
        ledger: Where collectives are recorded, under the unit ``"(whole)"``.
        reduce_dtype: The least precise dtype of the averages; ``None`` keeps the gradients' own.

    Attributes:
        params: The parameters by name.
        hooks: Users' hooks on them, by name. Autograd does not call them.
        hooked: Names of those on which users registered hooks at any time.
        on_backward: A method that is called before a backward pass adds to one of these gradients.
        weight: What this rank's gradients count in the mean over all ranks.
    """

    def __init__(
        self,
        mesh: MiCSMesh,
        ledger: CommLedger,
        reduce_dtype: torch.dtype | None,
    ) -> None:
        self.params: dict[str, nn.Parameter] = {}
        self.hooks: dict[str, ParamHooks] = {}
        self.hooked: set[str] = set()
        self._mesh, self._ledger, self._dtype = mesh, ledger, reduce_dtype
        self._sums: dict[str, _ExactSum] = {}
        self._used = b""
        self.weight = 1.0
        self._weightless: set[str] = set()  # parameters with a gradient of this window's that counts nothing
        self.on_backward: weakref.WeakMethod[Callable[[], None]] | None = None

    def add(self, params: Mapping[str, nn.Parameter]) -> None:
        """Takes over parameters that no other model has taken over."""
        known = {id(param) for param in self.params.values()}
        for name, param in params.items():
            if id(param) not in known:
                unique = name if name not in self.params else f"{name} ({len(self.params)})"
                self.params[unique] = param
                _TAKEN[param] = weakref.ref(self)
                self._watch(unique, param)

    def _watch(self, name: str, param: nn.Parameter) -> None:
        exact = None
        if self._dtype is not None and self._dtype.itemsize > param.dtype.itemsize and param.is_floating_point():
            exact = self._sums[name] = _ExactSum(param, self._dtype)
        hooks, earlier = self.hooks.setdefault(name, ParamHooks.none()), registered_hooks(param)
        if earlier is not None:
            hooks.carry(earlier)
            self.hooked.add(name)
        this, leaf = weakref.ref(self), weakref.ref(param)

        def arrives(grad: Tensor) -> Tensor | None:
            owner, param = this(), leaf()
            if owner is None or param is None or not adds_gradients([param]):
                return None
            on_backward = None if owner.on_backward is None else owner.on_backward()
            if on_backward is not None:
                on_backward()
            grad = owner._weighed(name, param, grad)
            return grad if exact is None else exact.add(grad)

        def registered() -> None:
            owner = this()
            if owner is not None:
                owner.hooked.add(name)

        wants = param.requires_grad
        param.requires_grad_(True)  # hooks are refused otherwise, and a frozen parameter may want them later
        divert_hooks(param, hooks, registered, arrives, None if exact is None else exact.remember)
        param.requires_grad_(wants)

    @torch.no_grad()
    def _weighed(self, name: str, param: Tensor, grad: Tensor) -> Tensor:
        if self.weight == 0:
            if param.grad is None:
                self._weightless.add(name)
            return torch.zeros_like(grad)
        self._weightless.discard(name)
        return grad if self.weight == 1 else grad * self.weight

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to average."""
        return bool(self.params) and self._mesh.layout.topology.world_size > 1

    def owns_any(self, ids: set[int]) -> bool:
        """Returns whether the ``id`` of one of the parameters is among some."""
        return not ids.isdisjoint(map(id, self.params.values()))

    def holds_gradient_of(self, ids: set[int]) -> bool:
        """Returns whether one of the parameters with some ``id`` has a gradient that ranks must average."""
        return self.is_needed and any(
            param.grad is not None for param in self.params.values() if id(param) in ids and param.requires_grad
        )

    # The end of a window.

    def used(self) -> bytes:
        """Returns by parameter whether this rank had a gradient of it when they were averaged."""
        return self._used

    def clear_unused(self, used_anywhere: Iterable[int]) -> None:
        """Takes the gradient from parameters that no rank used, as on one process."""
        for param, used in zip(self.params.values(), used_anywhere, strict=False):
            if not used and param.requires_grad:
                param.grad = None

    @torch.no_grad()
    def average(self) -> None:
        """Averages the gradients over all ranks. Collective over the world.

        Raises:
            MiCSError: If a gradient is sparse.
        """
        self._used = b""
        if not self.is_needed:
            return
        self._used = bytes(
            [
                param.requires_grad and param.grad is not None and name not in self._weightless
                for name, param in self.params.items()
            ]
        )
        kinds: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
        for name, param in self.params.items():
            if param.requires_grad:
                kinds.setdefault(self._reduced_in(param), []).append((name, param))
        for dtype, params in kinds.items():
            self._average(params, dtype)

    def _reduced_in(self, param: Tensor) -> torch.dtype:
        own = param.dtype.to_real() if param.is_complex() else param.dtype
        return own if self._dtype is None else torch.promote_types(own, self._dtype)

    def _average(self, params: list[tuple[str, nn.Parameter]], dtype: torch.dtype) -> None:
        device = communication_device(self._mesh.device_mesh.device_type)
        parts = [self._part(name, param).to(device, dtype).reshape(-1) for name, param in params]
        sizes = [part.numel() for part in parts]
        partition, replication = self._mesh.partition_group, self._mesh.replication_group
        padding = -sum(sizes) % partition.size()
        flat = torch.cat([*parts, parts[0].new_zeros(padding)])
        if flat.numel() == 0:
            return
        flat /= self._mesh.layout.topology.world_size
        mine = flat if partition.size() == 1 else flat.new_empty(flat.numel() // partition.size())
        if partition.size() > 1:
            reduce_scatter_single(mine, flat, group=partition)
            self._ledger.record(UNIT, Hop.PARTITION_REDUCE, flat.nbytes)
        if replication.size() > 1:
            dist.all_reduce(mine, group=replication)
            self._ledger.record(UNIT, Hop.REPLICATION_REDUCE, mine.nbytes, hierarchical=True)
        if partition.size() > 1:
            all_gather_single(flat, mine, group=partition)
            self._ledger.record(UNIT, Hop.PARTITION_GATHER, flat.nbytes)
        for (name, param), part in zip(params, flat.split([*sizes, padding]), strict=False):
            self._put(name, param, part)

    def _part(self, name: str, param: nn.Parameter) -> Tensor:
        """Returns what this rank has for a parameter, with zeros where it did not use it."""
        grad = param.grad
        if grad is None:
            return _real(torch.zeros_like(param, memory_format=torch.contiguous_format))
        if grad.layout != torch.strided:
            raise MiCSError(
                f"The gradient of {name} is sparse, and gradients of parameters that every rank holds whole are "
                "averaged as dense ones. Use sparse=False."
            )
        exact = self._sums[name].value if name in self._sums else None
        return _real(grad if exact is None else exact)

    def _put(self, name: str, param: nn.Parameter, part: Tensor) -> None:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        target = _real(param.grad)
        target.copy_(part.view(target.shape))
        if name in self._sums:
            self._sums[name].take(part.view(target.shape).clone())

    def close(self) -> None:
        """Ends the window."""
        self._weightless.clear()
        for total in self._sums.values():
            total.drop()


class _ExactSum:
    """The sum of a window's low-precision gradients in a wider dtype; ``.grad`` is what it rounds to."""

    def __init__(self, param: nn.Parameter, dtype: torch.dtype) -> None:
        self._param, self._dtype = weakref.ref(param), dtype
        self._sum: Tensor | None = None
        self._rounded: Tensor | None = None
        self._version = 0

    @property
    def value(self) -> Tensor | None:
        """The sum; ``None`` if ``.grad`` was cleared, written or replaced since."""
        param = self._param()
        grad = None if param is None else param.grad
        is_known = grad is not None and grad is self._rounded and grad._version == self._version
        return self._sum if is_known else None

    @torch.no_grad()
    def add(self, grad: Tensor) -> Tensor:
        """Adds a gradient on its way to the parameter; returns what is to be its ``.grad``."""
        param = self._param()
        earlier = None if param is None else param.grad
        if param is None or earlier is None or grad.layout != torch.strided:
            self._sum = None if grad.layout != torch.strided else grad.to(self._dtype, copy=True)
            return grad
        self._sum = (earlier.to(self._dtype) if self.value is None else self.value) + grad
        param.grad = None
        return self._sum.to(grad.dtype)

    def take(self, total: Tensor) -> None:
        """Makes another sum the window's."""
        param = self._param()
        self._sum = total
        if param is not None:
            self.remember(param)

    def remember(self, param: Tensor) -> None:
        """Notes that the parameter's ``.grad`` is what the sum rounds to."""
        grad = param.grad
        if self._sum is not None:
            self._rounded, self._version = grad, 0 if grad is None else grad._version

    def drop(self) -> None:
        """Forgets the sum."""
        self._sum = self._rounded = None


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


# Whose the gradients of a parameter are: no two models average them.
_TAKEN: Any = WeakIdKeyDictionary()


def is_taken(param: Tensor) -> bool:
    """Returns whether a whole parameter's gradients are averaged by a sharded model that lives."""
    owner = _TAKEN.get(param)
    return owner is not None and owner() is not None
