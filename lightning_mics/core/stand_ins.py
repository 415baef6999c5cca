"""Stand-ins: optimizers that step on other tensors than DTensors, where a step on these would fail or be wrong.

PyTorch lets a hook before ``step`` replace its arguments, the optimizer among them. A stand-in shares the settings and
the memory of states with the optimizer, and holds other parameters over the same memory; the optimizer itself is never
changed while the step runs, so one that raises leaves nothing behind.

- Optimizers that work element by element step on this rank's shards, or slices of them, as plain tensors.
- Those that look at a whole matrix (its factors, norms, orthogonalisation) step on one gathered parameter at a time.
- Of others nothing is known: they step on DTensors, among which plain parameters are replicated ones.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_mics.core._torch import dtensor_over, local_tensor, shard_like
from lightning_mics.core.mesh import communication_device
from lightning_mics.core.slices import is_slice, slices_of, state_like

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

    def written(self, tensor: Tensor, seen: Tensor) -> None:
        """Called when a step may have written into what stands for a state."""


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
        self._groups = list(optimizer.param_groups if groups is None else groups)
        self.optimizer: Any = object.__new__(type(optimizer))
        vars(self.optimizer).update(vars(optimizer))
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        vars(self.optimizer).update({"state": state, "param_groups": list(map(self._seen_group, self._groups))})
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
        with torch.no_grad():
            self._params[param] = nn.Parameter(self._view.of(param, param.detach()), param.requires_grad)
        return self._params[param]

    def _give(self, param: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        seen = self._view.of(param, value)
        self._given[id(seen)] = (seen, value)
        return seen

    def take_gradients(self) -> None:
        """Takes over the gradients, which a closure may have made."""
        for param, seen in self._params.items():
            grad = param.grad
            seen.grad = None if grad is None else self._view.of(param, grad)

    def hand_back(self) -> None:
        """Hands settings and states back to the optimizer."""
        for group, seen_group in zip(self._groups, self.optimizer.param_groups, strict=True):
            group.update({key: value for key, value in seen_group.items() if key != "params"})
        for param, seen in self._params.items():
            if seen in self.optimizer.state:
                state = self.optimizer.state[seen]
                self._optimizer.state[param] = {key: self._take(param, value) for key, value in state.items()}
        vars(self._optimizer).update({key: value for key, value in vars(self.optimizer).items() if key not in _OWN})

    def _take(self, param: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._given:
            kept = self._given[id(value)][1]
            self._view.written(kept, value)
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
    step = _step_of(optimizer)
    slices = next((found for found in map(slices_of, params) if found is not None), None)
    if any(step is _unwrapped(cls) for cls in _ELEMENTWISE):
        is_needed = slices is not None or is_mixed or not _works_on_dtensors(optimizer)
        return StandIn(optimizer, LocalView()) if is_needed else None
    mesh = sharded.device_mesh if slices is None else slices.mesh
    return StandIn(optimizer, DTensorView(mesh)) if is_mixed or slices is not None else None


def _works_on_dtensors(optimizer: Optimizer) -> bool:
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    fails_fused = isinstance(optimizer, torch.optim.SGD | torch.optim.Adagrad)
    return not (isinstance(optimizer, torch.optim.Rprop) or (is_fused and fails_fused))


def steps_on_whole(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer looks at whole matrices, and some of its parameters are sharded."""
    step = _step_of(optimizer)
    is_known = (step.__module__, step.__qualname__) in _WHOLE
    return is_known and any(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])


@torch.no_grad()
def step_on_whole(optimizer: Optimizer) -> StandIn:
    """Steps on one gathered parameter after another. Collective over the partition group.

    Returns:
        A stand-in without parameters, on which nothing is left to do.
    """
    step = _step_of(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                one = StandIn(optimizer, _WholeView(), [{**group, "params": [param]}])
                one.take_gradients()
                step(one.optimizer)
                one.hand_back()
                _WholeView().written(param, one.optimizer.param_groups[0]["params"][0])
                group.update({key: value for key, value in one.optimizer.param_groups[0].items() if key != "params"})
    return StandIn(optimizer, LocalView(), [])


class _WholeView(View):
    """Shards as gathered tensors; what they become is copied back into the shards."""

    def of(self, param: Tensor, tensor: Tensor) -> Tensor:
        """Gathers a shard. Collective over the partition group."""
        return _gathered(tensor) if isinstance(tensor, DTensor) else tensor

    def back(self, param: Tensor, seen: Tensor) -> Tensor:
        """Makes a DTensor of this rank's part of what has the parameter's shape."""
        if not isinstance(param, DTensor) or seen.shape != param.shape:
            return seen
        return state_like(seen, param)

    def written(self, tensor: Tensor, seen: Tensor) -> None:
        """Copies this rank's part of a gathered tensor into its shard."""
        if isinstance(tensor, DTensor):
            local_tensor(tensor).copy_(local_tensor(shard_like(seen, tensor)))


def _gathered(tensor: DTensor) -> Tensor:
    local, device = local_tensor(tensor), communication_device(tensor.device_mesh.device_type)
    whole = (tensor if local.device == device else _like(tensor, local.to(device))).full_tensor()
    return whole.to(local.device)


def _like(param: DTensor, local: Tensor) -> DTensor:
    """Returns a DTensor over a local tensor, laid out like a parameter."""
    return dtensor_over(local, param.device_mesh, param.placements, param)


def _step_of(optimizer: Optimizer) -> Step:
    return _unwrapped(type(optimizer))


def _unwrapped(cls: type) -> Step:
    step: Step = inspect.unwrap(cls.step)  # type: ignore[attr-defined]
    return step
