"""A model's units, and which of its layers are alike, so that a few can run for all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.core.apply import units_of
from lightning_mics.core.recompute import recomputes
from lightning_mics.core.units import Unit as Modules
from lightning_mics.core.units import outermost_of
from lightning_mics.plan.profile import ModelProfile, Param, Unit
from lightning_mics.trace._torch import hooks_of
from lightning_mics.trace.huggingface import share_of_experts

# A unit; ``None`` is the root.
Key = Modules | None

# Numbers by which layers tell themselves apart, without behaving differently.
_POSITION = re.compile(r"(idx|index|id|number)$|^layer$")
_NO_FIGURES = Unit(name="", params=(), forward_flops=0.0, backward_flops=0.0)


class Structure:
    """A model's units.

    Attributes:
        units: Units, innermost first, without the root.
        params: Parameters of each unit and of the root.
        stacks: The members of each list or sequence of modules that are plain units.
        stand_ins: First, second and last of those that are alike in a stack; they run for the others.
        around: By unit the outermost block that it is inside of, where that can be recomputed.
        twins: For those that need not run, who stands for them.
    """

    def __init__(self, model: nn.Module, config: MiCSConfig) -> None:
        self.model, self.config = model, config
        self.units = units_of(model, config)
        self.around = self._find_around()
        self.params = self._params_by_unit()
        self.compute_dtype = as_dtype(config.param_dtype) or _commonest_dtype(model)
        self.stacks = list(self._find_stacks())
        alike = list(self._find_alike())
        # The first may differ, whose input may need no gradient; the last, whose output no other of them keeps.
        self.stand_ins = [(group[0], group[1], group[-1]) for group in alike]
        self.twins = {member: group[1] for group in alike for member in group[2:-1]}

    def profile(
        self,
        figures: Mapping[Key, Unit],
        order: Iterable[Modules],
        *,
        name: str | None,
        sequence_length: int | None,
        source: str,
    ) -> ModelProfile:
        """Returns the model's profile, from figures without names and parameters; equal units are one object."""
        names = {module: name for name, module in self.model.named_modules()}
        interned: dict[Unit, Unit] = {}

        def complete(unit: Key, name: str = "") -> Unit:
            return replace(
                figures.get(unit, _NO_FIGURES),
                name=name,
                params=self.params[unit],
                can_checkpoint=unit is not None and recomputes(unit),
                is_inside=unit in self.around,
            )

        def named(unit: Modules) -> Unit:
            return interned.setdefault(complete(unit), complete(unit, " + ".join(names[module] for module in unit)))

        return ModelProfile(
            name=name or type(self.model).__name__,
            root=complete(None, "(root)"),
            blocks=tuple(map(named, _behind_those_around(list(order), self.around))),
            sequence_length=sequence_length,
            buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers()),
            compute_dtype=dtype_name(self.compute_dtype),
            source=source,
            active_numel=self._active_numel(),
        )

    def _active_numel(self) -> int | None:
        """Returns the parameters that a token meets; weights of experts are those of all of them in one tensor."""
        experts, share = share_of_experts(self.model)
        if not experts:
            return None
        params = [param for unit in self.params.values() for param in unit]
        routed = sum(p.numel for p in params if len(p.shape) == 3 and p.shape[0] == experts)
        return round(sum(p.weights for p in params) - (1 - share) * routed)

    def _find_around(self) -> dict[Modules, Modules]:
        units = {unit[0]: unit for unit in self.units if recomputes(unit)}
        holder = {inner: module for module in outermost_of(list(units)) for inner in module.modules()}
        found = {unit: {holder.get(module) for module in unit} for unit in self.units}
        return {
            unit: units[module]
            for unit, modules in found.items()
            if len(modules) == 1 and (module := modules.pop()) is not None and module is not unit[0]
        }

    def root_sizes(self) -> set[int]:
        """Returns the sizes of the root's gradients in bytes."""
        return {param.numel * self.compute_dtype.itemsize for param in self.params[None] if param.trainable}

    def _params_by_unit(self) -> dict[Key, tuple[Param, ...]]:
        """Divides the parameters as ``fully_shard`` does: innermost units first, each parameter once."""
        taken: set[nn.Parameter] = set()
        result: dict[Key, tuple[Param, ...]] = {}
        for unit in [*self.units, None]:
            modules = (self.model,) if unit is None else unit
            own = dict.fromkeys(param for module in modules for param in module.parameters() if param not in taken)
            taken.update(own)
            result[unit] = tuple(
                Param(
                    shape=tuple(param.shape),
                    dtype=dtype_name(param.dtype),
                    trainable=param.requires_grad,
                    packed=getattr(param, "packed", 1),
                )
                for param in own
            )
        return result

    def _find_stacks(self) -> Iterator[list[nn.Module]]:
        singles = {unit[0] for unit in self.units if len(unit) == 1}
        members = {module for unit in self.units for module in unit}
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList | nn.Sequential):
                children = list(module.children())
                if all(m in singles and members.isdisjoint(set(m.modules()) - {m}) for m in children):
                    yield children

    def _find_alike(self) -> Iterator[list[nn.Module]]:
        """Yields those members of a stack that compute the same with other values, where some need not run."""
        uses = Counter(module for _, module in self.model.named_modules(remove_duplicate=False))
        for stack in self.stacks:
            alike: dict[Any, list[nn.Module]] = {}
            if all(uses[member] == 1 for member in stack):
                for member in stack:
                    alike.setdefault(_signature(member), []).append(member)
            yield from (group for group in alike.values() if len(group) > 3)


def _behind_those_around(order: list[Modules], around: Mapping[Modules, Modules]) -> Iterator[Modules]:
    """Yields units in their order, those inside a block that is recomputed behind it."""
    for unit in order:
        if unit not in around:
            yield unit
            yield from (inner for inner in order if around.get(inner) == unit)


def dtype_name(dtype: torch.dtype | str) -> str:
    """Returns a dtype's name, for example ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def _commonest_dtype(model: nn.Module) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for param in model.parameters():
        sizes[param.dtype] += param.numel() * param.is_floating_point()
    return sizes.most_common(1)[0][0]


def _signature(module: nn.Module) -> Any:
    """Returns what two layers have in common if they compute the same with other values."""
    return tuple(
        (
            name,
            type(inner),
            inner.training,
            tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in inner.named_parameters(recurse=False)),
            tuple((n, b.shape, b.dtype) for n, b in inner.named_buffers(recurse=False)),
            tuple(
                (key, repr(value))
                for key, value in vars(inner).items()
                if _is_setting(value) and not (isinstance(value, int) and _POSITION.search(key))
            ),
            tuple(map(id, hooks_of(inner))),
        )
        for name, inner in module.named_modules()
    )


def _is_setting(value: Any) -> bool:
    """Returns whether an attribute can be compared, and may make a module behave differently."""
    if isinstance(value, tuple | list):
        return all(_is_setting(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | Enum)
