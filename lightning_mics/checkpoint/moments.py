"""Saved states of optimizers: whose they are, whether they fit, and how they get into one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mics.checkpoint.state import trained_parameters
from lightning_mics.checkpoint.storage import Place
from lightning_mics.core._torch import gradient_dtype
from lightning_mics.core.log import inform
from lightning_mics.core.slices import state_like
from lightning_mics.errors import CheckpointError

# States with an entry for each of a parameter's, in the optimizers of PyTorch.
_ELEMENTWISE = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_inf", "grad_avg", "square_avg", "acc_delta"),
    *("sum", "ax", "prev", "step_size"),
}
# Settings that say which states there are, or what they mean.
_DECISIVE = ("amsgrad", "centered", "momentum", "nesterov", "maximize", "decoupled_weight_decay")
# Of these, what an optimizer has in every version of PyTorch, or never.
_OF_A_CLASS = ("amsgrad", "centered", "momentum", "nesterov")
# What steps of PyTorch's optimizers look for beside each parameter that has any state.
_NEEDED = {
    "Adadelta": {"square_avg", "acc_delta"},
    "Adagrad": {"sum"},
    "Adam": {"exp_avg", "exp_avg_sq"},
    "AdamW": {"exp_avg", "exp_avg_sq"},
    "Adamax": {"exp_avg", "exp_inf"},
    "ASGD": {"ax", "eta", "mu"},
    "NAdam": {"exp_avg", "exp_avg_sq", "mu_product"},
    "RAdam": {"exp_avg", "exp_avg_sq"},
    "RMSprop": {"square_avg"},
    "Rprop": {"prev", "step_size"},
}
# What schedulers and others leave in a group.
_NO_SETTINGS = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_NAMED = 3


@dataclass(frozen=True)
class Moments:
    """States of an optimizer as they were saved.

    Attributes:
        path: Where they come from.
        members: The parameters that were trained, by the model's names, for each group.
        states: By those names; tensors laid out like the parameters.
        groups: Settings of the groups of parameters, in order.
    """

    path: Place
    members: Sequence[Sequence[str]]
    states: Mapping[str, dict[str, Any]]
    groups: Sequence[dict[str, Any]]

    def put(self, optimizer: Optimizer, params: Mapping[str, Tensor], *, strict: bool) -> None:
        """Puts them into an optimizer.

        Args:
            optimizer: The optimizer.
            params: Its parameters by name, in the order of its groups.
            strict: Whether what does not fit is an error; otherwise a line says what begins anew or is rounded.

        Raises:
            CheckpointError: If they do not fit.
        """
        name = type(optimizer).__name__
        if len(self.groups) != len(optimizer.param_groups):
            raise CheckpointError(
                f"{self.path}: the checkpoint's optimizer has {len(self.groups)} parameter group(s), {name} has "
                f"{len(optimizer.param_groups)}. Create the optimizer with the same groups."
            )
        groups = self._groups_of(optimizer, params, strict)
        if problem := _other_kind(optimizer, groups) or _other_states(optimizer, self.states, params):
            _object(f"{self.path} holds states of another optimizer: {problem}. {name} would begin anew.", strict)
            return
        _check_shapes(self.path, optimizer, self.states, params)
        _tell_difference(self.path, optimizer, params, [name for names in self.members for name in names])
        current = optimizer.state_dict()["param_groups"]
        merged = [
            {**{key: value for key, value in settings.items() if key != "params"}, "params": group["params"]}
            for settings, group in zip(groups, current, strict=True)
        ]
        by_index = {index: self.states[owner] for index, owner in enumerate(params) if owner in self.states}
        rounded = {
            owner: (value.dtype, gradient_dtype(params[owner]))
            for owner in self.states.keys() & params.keys()
            for _, value in _elementwise(self.states[owner])
            if is_lossy(value.dtype, gradient_dtype(params[owner]))
        }
        tell_rounding(self.path, f"{name}'s states", rounded, strict)
        optimizer.load_state_dict({"state": by_index, "param_groups": merged})

    def _groups_of(self, optimizer: Optimizer, params: Mapping[str, Tensor], strict: bool) -> list[Mapping[str, Any]]:
        """Returns for each group of an optimizer the settings with which its parameters were saved."""
        saved = {name: index for index, names in enumerate(self.members) for name in names}
        name_of = {id(param): name for name, param in params.items()}
        found: list[Mapping[str, Any]] = []
        for place, group in enumerate(optimizer.param_groups):
            names = [name_of[id(param)] for param in group["params"] if id(param) in name_of]
            places = sorted({saved[name] for name in names if name in saved}) or [place]
            settings = [{**self.groups[index], "params": None} for index in places]
            if any(one != settings[0] for one in settings):
                _object(
                    f"{self.path}: group {place} of {type(optimizer).__name__} has parameters of the saved groups "
                    f"{', '.join(map(str, places))}, whose settings differ.",
                    strict,
                )
                return list(self.groups)
            found.append(settings[0])
        return found


def _object(problem: str, strict: bool) -> None:
    if strict:
        raise CheckpointError(f"{problem} Create it as it was saved, or load with strict=False to go on.")
    inform(problem)


def first_names(names: Collection[str]) -> str:
    """Returns some names and how many there are, for messages."""
    return f"{', '.join(sorted(names)[:_NAMED])}{' and others' if len(names) > _NAMED else ''} ({len(names)})"


def _other_kind(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Says how saved settings are those of another optimizer; ``None`` if they are not."""
    for index, (saved, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        lacking, unknown = own.keys() - saved.keys() - _NO_SETTINGS, saved.keys() - own.keys() - _NO_SETTINGS
        if lacking and unknown:
            return (
                f"group {index} was saved with {', '.join(sorted(unknown))}, and {type(optimizer).__name__} has "
                f"{', '.join(sorted(lacking))} instead"
            )
        name = type(optimizer).__name__
        for key in _OF_A_CLASS:
            if (key in saved) != (key in own):
                return f"group {index} was saved {'with' if key in saved else 'without'} {key}, unlike {name}"
        for key in _DECISIVE:
            if key in saved and key in own and bool(saved[key]) != bool(own[key]):
                return f"group {index} was saved with {key}={saved[key]}, and {name} has {key}={own[key]}"
    return None


def _other_states(optimizer: Optimizer, states: Mapping[str, Mapping[str, Any]], params: Collection[str]) -> str | None:
    """Says how saved states lack what an optimizer of PyTorch's looks for; ``None`` if they do not."""
    kinds = [kind.__name__ for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim.")]
    needed = next((_NEEDED[kind] for kind in kinds if kind in _NEEDED), set())
    for name in sorted(states.keys() & set(params)):
        if states[name] and (lacking := needed - states[name].keys()):
            return (
                f"{name} was saved with {', '.join(sorted(states[name]))}, and {type(optimizer).__name__} needs "
                f"{', '.join(sorted(lacking))}"
            )
    return None


def _elementwise(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if key in _ELEMENTWISE and isinstance(value, Tensor):
            yield key, value


def _check_shapes(
    path: Place, optimizer: Optimizer, states: Mapping[str, dict[str, Any]], params: Mapping[str, Tensor]
) -> None:
    wrong = {
        name: f"{key} has shape {tuple(value.shape)} there and {name} {tuple(params[name].shape)} here"
        for name in states.keys() & params.keys()
        for key, value in _elementwise(states[name])
        if value.shape != params[name].shape and value.numel() > 0
    }
    if wrong:
        raise CheckpointError(
            f"{path} holds states of {type(optimizer).__name__} for other shapes of {first_names(wrong)}: "
            f"{wrong[min(wrong)]}. Build the model with the sizes it was saved with, or load the weights alone."
        )


def is_lossy(source: torch.dtype, target: torch.dtype) -> bool:
    """Returns whether a dtype cannot hold all values of another one."""
    return source.is_floating_point and torch.promote_types(source, target) != target


def tell_rounding(path: Place, what: str, rounded: Mapping[str, tuple[torch.dtype, torch.dtype]], strict: bool) -> None:
    """Says that what was saved loses digits.

    Raises:
        CheckpointError: If ``strict``.
    """
    if not rounded:
        return
    saved, here = rounded[min(rounded)]
    problem = f"{path}: {what} of {first_names(rounded)} would be rounded from {saved} to {here}."
    if strict:
        raise CheckpointError(f"{problem} Use the precision it was saved with, or load with strict=False to go on.")
    inform(problem)


def _tell_difference(path: Place, optimizer: Optimizer, own: Collection[str], saved: Collection[str]) -> None:
    missing, surplus = set(own) - set(saved), set(saved) - set(own)
    if own and saved and len(surplus) == len(set(saved)):
        raise CheckpointError(
            f"{path} holds states of {type(optimizer).__name__} for {first_names(surplus)}, and none for what it "
            f"trains here: {first_names(missing)}. Build the model as it was saved, or load the weights alone."
        )
    parts = [
        f"{what} {first_names(names)}"
        for what, names in (("begins anew for", missing), ("leaves out the states of", surplus))
        if names
    ]
    if parts:
        inform(f"{path} was saved with other trained parameters: {type(optimizer).__name__} {' and '.join(parts)}.")


# Of whole files.


def fill_optimizer(
    path: Place,
    model: nn.Module,
    optimizer: Optimizer,
    saved: dict[str, Any],
    to_own: Callable[[str], str] = str,
    *,
    strict: bool = True,
) -> None:
    """Puts an optimizer's whole states into one that trains a sharded or plain model; communicates nothing.

    Args:
        path: Where they come from, for messages.
        model: The model.
        optimizer: The optimizer over its parameters.
        saved: What ``optimizer.state_dict()`` returned; with ``names`` of its parameters in order, or keyed by names.
            Without names, positions count where they can mean no other parameters.
        to_own: Turns a name in the checkpoint into the model's.
        strict: Whether what does not fit is an error.

    Raises:
        CheckpointError: If they do not fit.
    """
    params, order = trained_parameters(model, optimizer), _positions(saved)
    if "names" in saved or all(isinstance(index, str) for index in order):
        owners = [to_own(name) for name in saved.get("names", order)]
    else:
        others = {name: param for name, param in model.named_parameters() if param not in set(params.values())}
        owners = _by_position(path, optimizer, saved, params, others if strict else {})
    _moments(path, saved, params, owners).put(optimizer, params, strict=strict)


def fill_by_position(path: Place, optimizer: Optimizer, saved: dict[str, Any], *, strict: bool) -> None:
    """Puts an optimizer's whole states into one, by positions; see :func:`fill_optimizer`."""
    if saved.keys() - {"names"} != {"state", "param_groups"}:
        raise CheckpointError(f"{path} holds no state_dict of an optimizer, only {', '.join(map(str, saved))}.")
    own = [param for group in optimizer.param_groups for param in group["params"]]
    params = {f"parameter {place}": param for place, param in enumerate(own)}
    owners = _by_position(path, optimizer, saved, params, {})
    _moments(path, saved, params, owners).put(optimizer, params, strict=strict)


def _moments(path: Place, saved: dict[str, Any], params: Mapping[str, Tensor], owners: Sequence[str]) -> Moments:
    name_of = dict(zip(_positions(saved), owners, strict=True))
    states = {
        name: sharded_state(state, params[name])
        for index, state in saved["state"].items()
        if (name := name_of[index]) in params
    }
    names = [[name_of[index] for index in group["params"]] for group in saved["param_groups"]]
    return Moments(path, names, states, saved["param_groups"])


def _positions(saved: dict[str, Any]) -> list[Any]:
    return [index for group in saved["param_groups"] for index in group["params"]]


def _by_position(
    path: Place,
    optimizer: Optimizer,
    saved: dict[str, Any],
    params: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
) -> list[str]:
    """Returns whose states are at which position.

    Raises:
        CheckpointError: If that is not certain: as many, of these shapes, might belong to ``others``.
    """
    counts = [len(group["params"]) for group in saved["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if counts != own:
        raise CheckpointError(
            f"{path} has an optimizer's states of {sum(counts)} parameter(s) without their names, "
            f"{type(optimizer).__name__} trains {sum(own)} (by group: {counts} and {own}). Create the optimizer as it "
            "was saved."
        )
    shapes = {tuple(param.shape) for param in params.values()}
    if like := {name for name, param in others.items() if tuple(param.shape) in shapes}:
        raise CheckpointError(
            f"{path} has an optimizer's states of {sum(counts)} parameter(s) without their names, and it cannot be "
            f"told whether they are those that {type(optimizer).__name__} trains: {first_names(like)}, which it does "
            "not train, have the same shapes. If the same were trained, in the same order, load with strict=False."
        )
    return list(params)


def sharded_state(value: Any, param: Tensor) -> Any:
    """Returns whole states as a parameter's shards, which share no memory with them."""
    if isinstance(value, Tensor):
        return state_like(value, param)  # not the value itself: it may lie in a mapped file, which others may overwrite
    if isinstance(value, dict):
        return {key: sharded_state(entry, param) for key, entry in value.items()}
    return value
