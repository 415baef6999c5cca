"""Stand-ins: optimizers that step on other tensors than DTensors, where a step on these would fail or be wrong.

PyTorch lets a hook before ``step`` replace its arguments, the optimizer among them. A stand-in shares the settings and
the memory of states with the optimizer, and holds other parameters over the same memory; the optimizer itself is never
changed while the step runs, so one that raises leaves nothing behind.

- Optimizers that work element by element step on this rank's shards, or slices of them, as plain tensors.
- Those that look at a whole matrix (its factors, norms, orthogonalisation) step on whole parameters (``owners``).
- Of others nothing is known: they step on DTensors, among which plain parameters are replicated ones.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_mics.core._torch import dtensor_over, local_tensor
from lightning_mics.core.masters import changed, master_of
from lightning_mics.core.slices import is_slice, slices_of
from lightning_mics.errors import MiCSError

_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
# By name: transformers may not be installed, and older versions of PyTorch have no Muon.
_WHOLE = {
    ("torch.optim._adafactor", "Adafactor.step"),
    ("torch.optim._muon", "Muon.step"),
    ("transformers.optimization", "Adafactor.step"),
}
# What a step on whole matrices calls, and what one that shares them out among ranks by itself calls.
_OF_MATRICES = re.compile(
    "newton_?schulz|zero_?power|zeroth_?power|orthogonali[sz]e|^(eigh|svd|matrix_power|inv_root)$"
).search
_EXCHANGES = {"all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "broadcast", "reduce_scatter_tensor"}
_MARK = "_mics_stands_in_for"
_OWN = ("param_groups", "state", _MARK)

Step = Callable[..., Any]


class View:
    """How a stand-in sees the parameters, gradients and states of an optimizer."""

    def of(self, param: Tensor, tensor: Tensor) -> Tensor:
        """Returns what stands for a tensor that belongs to a parameter: itself, its gradient or one of its states."""
        raise NotImplementedError

    def back(self, param: Tensor, seen: Tensor) -> Tensor:
        """Returns what the optimizer is to keep of a state that a step has made."""
        raise NotImplementedError


class LocalView(View):
    """Shards as plain tensors; their slices where states are divided further than parameters."""

    def of(self, param: Tensor, tensor: Tensor) -> Tensor:
        """Returns the local shard, or this rank's rows of it."""
        slices = slices_of(param)
        return local_tensor(tensor) if slices is None else slices.local(tensor)

    def back(self, param: Tensor, seen: Tensor) -> Tensor:
        """Makes a DTensor of what has the shape of what the parameter was seen as."""
        if not isinstance(param, DTensor) or isinstance(seen, DTensor) or seen.shape != self.of(param, param).shape:
            return seen
        slices = slices_of(param)
        return _like(param, seen) if slices is None else slices.like(param, seen)


class DTensorView(View):
    """DTensors, of slices where states are divided further than parameters, and plain tensors as replicated ones."""

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh

    def of(self, param: Tensor, tensor: Tensor) -> Tensor:
        """Returns a DTensor over the same memory."""
        if isinstance(param, DTensor):
            slices = slices_of(param)
            is_shard = isinstance(tensor, DTensor) and not is_slice(tensor) and tensor.shape == param.shape
            return slices.like(param, slices.local(tensor)) if slices is not None and is_shard else tensor
        if isinstance(tensor, DTensor) or tensor.shape != param.shape:
            return tensor
        return DTensor.from_local(tensor, self._mesh, [Replicate()] * self._mesh.ndim, run_check=False)

    def back(self, param: Tensor, seen: Tensor) -> Tensor:
        """Makes a plain tensor of a plain parameter's state."""
        return seen if isinstance(param, DTensor) else local_tensor(seen)


class StandIn:
    """An optimizer in the place of another, for one step.

    Args:
        optimizer: The other one.
        view: What it sees.
        groups: Its groups; by default all of the optimizer's.
    """

    def __init__(self, optimizer: Optimizer, view: View, groups: Sequence[dict[str, Any]] | None = None) -> None:
        self._optimizer, self._view = optimizer, view
        self._params: dict[Tensor, nn.Parameter] = {}
        self._given: dict[int, tuple[Tensor, Tensor]] = {}
        groups = optimizer.param_groups if groups is None else groups
        self.optimizer: Any = object.__new__(type(optimizer))
        vars(self.optimizer).update(vars(optimizer))
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        vars(self.optimizer).update({"state": state, "param_groups": list(map(self._seen_group, groups))})
        vars(self.optimizer)[_MARK] = self
        for param, seen in self._params.items():
            if param in optimizer.state:
                state[seen] = {key: self._give(param, value) for key, value in optimizer.state[param].items()}

    @staticmethod
    def of(optimizer: Optimizer) -> StandIn:
        """Returns the stand-in that an optimizer is."""
        stand_in: StandIn = vars(optimizer)[_MARK]
        return stand_in

    def _seen_group(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "params": list(map(self._seen_param, group["params"]))}

    def _seen_param(self, param: Tensor) -> nn.Parameter:
        own = param if slices_of(param) is not None else param.detach()  # rows of others are not looked at
        master = master_of(param)
        own = own if master is None else master
        with torch.no_grad():
            self._params[param] = nn.Parameter(self._view.of(param, own), param.requires_grad)
        return self._params[param]

    def _give(self, param: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        seen = self._view.of(param, value)
        self._given[id(seen)] = (seen, value)
        return seen

    def take_gradients(self) -> None:
        """Takes over the gradients, which a closure may have made; a step follows."""
        changed(self._params)
        for param, seen in self._params.items():
            grad = param.grad
            seen.grad = None if grad is None else self._view.of(param, grad)

    def seen(self, param: Tensor) -> Tensor:
        """Returns what the step has made of a parameter."""
        return self._params[param].detach()

    def hand_back(self, *, settings: bool = True) -> None:
        """Hands states, and with ``settings`` what was set in groups and on the stand-in, back to the optimizer."""
        for param, seen in self._params.items():
            if seen in self.optimizer.state:
                state = self.optimizer.state[seen]
                self._optimizer.state[param] = {key: self._take(param, value) for key, value in state.items()}
        if not settings:
            return
        for group, seen_group in zip(self._optimizer.param_groups, self.optimizer.param_groups, strict=True):
            group.update({key: value for key, value in seen_group.items() if key != "params"})
        vars(self._optimizer).update({key: value for key, value in vars(self.optimizer).items() if key not in _OWN})

    def _take(self, param: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._given:
            kept = self._given[id(value)][1]
            return kept
        return self._view.back(param, value)


def stands_in(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer is a stand-in itself."""
    return _MARK in vars(optimizer)


def stand_in_for(optimizer: Optimizer) -> StandIn | None:
    """Returns what is to step in an optimizer's place on sharded parameters; ``None`` for the optimizer itself."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    sharded = next((param for param in params if isinstance(param, DTensor)), None)
    if sharded is None:
        return None
    is_mixed = not all(isinstance(param, DTensor) for param in params)
    slices = next((found for found in map(slices_of, params) if found is not None), None)
    if is_elementwise(optimizer):
        is_needed = slices is not None or is_mixed or not _works_on_dtensors(optimizer)
        return StandIn(optimizer, LocalView()) if is_needed else None
    mesh = sharded.device_mesh if slices is None else slices.mesh
    return StandIn(optimizer, DTensorView(mesh)) if is_mixed or slices is not None else None


def _works_on_dtensors(optimizer: Optimizer) -> bool:
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    fails_fused = isinstance(optimizer, torch.optim.SGD | torch.optim.Adagrad)
    return not (isinstance(optimizer, torch.optim.Rprop) or (is_fused and fails_fused))


def steps_on_whole(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer looks at whole matrices, and some of its parameters are sharded.

    Raises:
        MiCSError: If it exchanges matrices with other ranks by itself.
    """
    if not any(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"]):
        return False
    cls: Any = type(optimizer)
    if not _looks_at_matrices(cls):
        return False
    exchanges = sorted(_EXCHANGES & set(_names(step_of(optimizer), cls)))
    if exchanges:
        raise MiCSError(
            f"{cls.__name__}.step() shares out its matrices among ranks by itself ({', '.join(exchanges)}), but each "
            "rank has some rows of each. Use the form of it for a single device, or torch.optim.Muon: every matrix "
            "has one rank that steps on it."
        )
    return True


@functools.cache
def _looks_at_matrices(cls: type) -> bool:
    step = _unwrapped(cls)
    if (step.__module__, step.__qualname__) in _WHOLE or getattr(cls, "steps_on_whole_parameters", False):
        return True
    if any(step is _unwrapped(known) for known in _ELEMENTWISE):
        return False
    return any("muon" in base.__name__.lower() for base in cls.__mro__) or any(map(_OF_MATRICES, _names(step, cls)))


@functools.cache
def _names(step: Step, cls: type) -> tuple[str, ...]:
    """Returns the names in the code of a step, and in that of functions and methods which these name."""
    found: dict[str, None] = {}
    functions, seen = [step], set()
    while functions:
        function = inspect.unwrap(functions.pop())
        if not inspect.isfunction(function) or function in seen or _is_of_torch(function):
            continue
        seen.add(function)
        codes: list[Any] = [function.__code__]
        for code in codes:
            codes += filter(inspect.iscode, code.co_consts)
            for name in code.co_names:
                found[name] = None
                functions += filter(callable, (function.__globals__.get(name), getattr(cls, name, None)))
    return tuple(found)


def _is_of_torch(function: Step) -> bool:
    return (function.__module__ or "").startswith("torch.")


def is_elementwise(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer is known to step on elements by themselves, and only where there is a gradient."""
    step = step_of(optimizer)
    return any(step is _unwrapped(cls) for cls in _ELEMENTWISE)


def _like(param: DTensor, local: Tensor) -> DTensor:
    """Returns a DTensor over a local tensor, laid out like a parameter."""
    return dtensor_over(local, param.device_mesh, param.placements, param)


def step_of(optimizer: Optimizer) -> Step:
    """Returns the step of an optimizer's class, without what PyTorch wraps around it."""
    return _unwrapped(type(optimizer))


def _unwrapped(cls: type) -> Step:
    step: Step = inspect.unwrap(cls.step)  # type: ignore[attr-defined]
    return step
