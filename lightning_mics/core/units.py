"""Which modules become FSDP units: parameters of a unit are gathered, reduced and freed together.

A pure reading of the model. :func:`plan_units` returns groups of modules, innermost first, in the order in which
``fully_shard`` must be called; what belongs to no unit stays with the root.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_mics.config import Wrap
from lightning_mics.core._torch import BatchNorm, plain_name, uncompiled
from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import did_you_mean

Unit = tuple[nn.Module, ...]

# A unit by size holds at least this share of the model, and at least this many elements.
_SIZE_SHARE = 8
_MIN_UNIT_NUMEL = 2**16
# What makes a setting choose modules by itself.
_OF_ITSELF = {"wrap": "wrap='auto'", "activation_checkpointing": "activation_checkpointing=True"}
_CONTAINERS = (
    nn.ModuleList,
    nn.ModuleDict,
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)


def plan_units(
    model: nn.Module,
    wrap: Wrap = "auto",
    entries: Sequence[nn.Module] = (),
    whole: Collection[nn.Parameter] = (),
) -> list[Unit]:
    """Finds the units of a model, without the root.

    Args:
        model: The model, not sharded yet; its parameters may be on the meta device.
        wrap: See :class:`~lightning_mics.MiCSConfig`.
        entries: Modules that must be units as well, because they are called on their own.
        whole: Parameters that are not sharded, and so no unit's.

    Returns:
        Groups of modules, innermost first. A group has several modules where they share a parameter, or where a unit
        holds parameters of several dtypes.

    Raises:
        MiCSConfigError: If ``wrap`` names a class that the model does not contain, or selects nothing.
    """
    chosen = dict.fromkeys(_readers(model, [*_outside_graphs(model, _choose(model, wrap)), *entries]))
    sharded = [module for module in chosen if any(param not in whole for param in module.parameters())]
    units = _merge_tied(model, [{module} for module in sharded], whole)
    split = _split_dtypes(model, units, whole)
    if len(split) > len(units):  # what was split off may share a parameter
        split = _merge_tied(model, [set(unit) for unit in split], whole)
    return _innermost_first(split)


def separate_batch_norms(model: nn.Module, units: list[Unit]) -> list[Unit]:
    """Gives the batch norms inside each unit, and those of the root, a unit of their own.

    Args:
        model: The model.
        units: Its units, innermost first, without the root.

    Returns:
        The units, innermost first. What holds only batch norms is told by :func:`is_batch_norm`.
    """
    units_of = _units_of(model, {module for unit in units for module in unit})
    result: list[Unit] = []
    for unit in [*units, (model,)]:
        norms = [
            module
            for module in model.modules()
            if is_batch_norm(module) and module not in unit and not units_of[module].isdisjoint(unit)
        ]
        result += [tuple(norms)] if norms else []
        result += [unit] if unit != (model,) else []
    return result


def is_batch_norm(module: nn.Module) -> bool:
    """Returns whether a module is a batch norm with weights."""
    return isinstance(module, BatchNorm) and _has_parameters(module)


def backward_order(model: nn.Module, units: Iterable[Unit]) -> list[Unit]:
    """Returns units in the order in which a backward pass finishes them, if the forward pass runs in model order."""
    position: dict[nn.Module, int] = {}

    def visit(module: nn.Module) -> None:
        for child in reversed(list(module.children())):
            if child not in position:
                visit(child)
        position[module] = len(position)

    visit(model)
    return sorted(units, key=lambda unit: max(position[module] for module in unit))


def unit_names(model: nn.Module, units: Iterable[Unit]) -> list[str]:
    """Returns the names of units, without what ``torch.compile`` adds; the root's is ``"(root)"``."""
    names = {module: plain_name(name) or "(root)" for name, module in model.named_modules()}
    return [" + ".join(names[module] for module in unit) for unit in units]


def _choose(model: nn.Module, wrap: Wrap) -> list[nn.Module]:
    if isinstance(wrap, str) and wrap == "auto":
        return _huggingface_blocks(model) or _repeated_blocks(model) or _by_size(model)
    return [module for module in _named(model, wrap, "wrap") if _has_parameters(module)]


def chosen_modules(model: nn.Module, choice: Wrap, setting: str) -> list[nn.Module]:
    """Returns the modules that classes, names or a function choose, without those inside others of them.

    Args:
        model: The model, not sharded.
        choice: What ``wrap`` takes, except ``"auto"``.
        setting: The setting whose value it is.

    Raises:
        MiCSConfigError: If it names a class that the model does not contain, or selects nothing.
    """
    return _outermost(model, _outside_graphs(model, _named(model, choice, setting)))


def _named(model: nn.Module, choice: Wrap, setting: str) -> list[nn.Module]:
    entries = [choice] if isinstance(choice, str | type) or callable(choice) else list(choice)
    chosen = [module for entry in entries for module in _instances(model, entry, setting)]
    for module in chosen:
        if not _has_forward(module):
            raise MiCSConfigError(
                f"{setting}= selected a {type(module).__name__}, which has no forward of its own. Select the modules "
                "in it.",
                setting=setting,
            )
    return list(dict.fromkeys(chosen))


def _outside_graphs(model: nn.Module, chosen: Sequence[nn.Module]) -> list[nn.Module]:
    """Puts what ``torch.compile(module)`` gave in the place of the modules inside, so that FSDP2's hooks stay outside.

    Except where the model also calls such a module directly.
    """
    modules = list(model.modules())
    uses = Counter(child for module in modules for child in module.children())
    compiled = {uncompiled(module): module for module in modules if uncompiled(module) is not module}
    outside = {inner: outer for inner, outer in compiled.items() if uses[inner] == 1}
    return [module for module in (outside.get(module, module) for module in chosen) if module is not model]


def _instances(model: nn.Module, entry: str | type | Callable[[nn.Module], bool], setting: str) -> list[nn.Module]:
    if callable(entry) and not isinstance(entry, type):
        return _selected(model, entry, setting)
    if isinstance(entry, str):
        found = [m for m in _inner_modules(model) if entry in {cls.__name__ for cls in type(m).__mro__}]
        name = entry
    else:
        found = [m for m in _inner_modules(model) if isinstance(m, entry)]
        name = entry.__name__
    if not found:
        names = sorted({type(module).__name__ for module in _inner_modules(model) if _has_parameters(module)})
        hint = did_you_mean(name, names, f"It contains: {', '.join(names[:12])}.")
        raise MiCSConfigError(
            f"{setting}={name!r}: the model contains no module of that class. {hint} Or use {_OF_ITSELF[setting]}.",
            setting=setting,
        )
    return found


def _selected(model: nn.Module, is_chosen: Callable[[nn.Module], bool], setting: str) -> list[nn.Module]:
    chosen = [module for module in _inner_modules(model) if is_chosen(module)]
    if not chosen:
        raise MiCSConfigError(
            f"{setting}= selected no module: the function returned False for every module. Let it return True for "
            f"some, or use {_OF_ITSELF[setting]}.",
            setting=setting,
        )
    return chosen


def _huggingface_blocks(model: nn.Module) -> list[nn.Module]:
    """Modules that Hugging Face says must not be split: its transformer blocks."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    found = [module for module in _inner_modules(model) if type(module).__name__ in names and _has_parameters(module)]
    return _outermost(model, found)


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Members of each outermost ``ModuleList`` or ``Sequential`` whose class it repeats.

    What may be either blocks or stages of a model, members of a ``ModuleDict`` and a ``Sequential`` beside other
    modules, is a block where it has no blocks in it.
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        children = [child for child in _children(module) if _has_parameters(child)]
        blocks = _repeated(children) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        found.extend(blocks)
        if _is_atomic(module):
            return
        known = len(found)
        for child in children:
            if child not in blocks:
                visit(child)
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and not blocks and len(found) == known:
            found.extend(_repeated(children, have_no_blocks=True))

    visit(uncompiled(model))
    return list(dict.fromkeys(found))


def _repeated(children: Sequence[nn.Module], *, have_no_blocks: bool = False) -> list[nn.Module]:
    """Returns the children of a class of which there are several, unless they are layers without modules in them."""
    counts = Counter(type(child) for child in children)
    # Stages that differ, each a container, rather have blocks of their own.
    are_stages = len(counts) > 1 and not have_no_blocks
    composite = [child for child in children if any(child.children())]
    blocks = [
        child
        for child in composite
        if counts[type(child)] > 1 and _has_forward(child) and not (are_stages and isinstance(child, _CONTAINERS))
    ]
    largest = max((_numel(child) for child in composite if child not in blocks), default=0)
    # Beside heads, say, a larger module would stay whole: only where there are no blocks are modules split by size.
    return blocks if _numel(*blocks) >= largest else []


def _numel(*modules: nn.Module) -> int:
    return sum(param.numel() for module in modules for param in module.parameters())


def _by_size(model: nn.Module) -> list[nn.Module]:
    """Innermost modules that hold a fair share of the model."""
    total = _numel(model)
    least = max(total // _SIZE_SHARE, _MIN_UNIT_NUMEL)
    found: list[nn.Module] = []
    root = uncompiled(model)

    def visit(module: nn.Module) -> int:
        """Returns the elements under ``module`` that no unit holds yet."""
        own = sum(param.numel() for param in module.parameters(recurse=_is_atomic(module)))
        rest = own + (0 if _is_atomic(module) else sum(visit(child) for child in _children(module)))
        # Models without blocks read an embedding's weight, too, where they tie the output layer to it.
        if rest >= least and module is not root and _has_forward(module) and not isinstance(module, nn.Embedding):
            found.append(module)
            return 0
        return rest

    visit(root)
    return list(dict.fromkeys(found))


def _merge_tied(model: nn.Module, units: list[set[nn.Module]], whole: Collection[nn.Parameter]) -> list[Unit]:
    """Makes one unit of modules that share a parameter across the borders of units.

    FSDP2 (torch >= 2.13) refuses a parameter that two units can see; one unit with all modules that own it is right.
    A module that leaves its unit for a common one may take along a parameter that it shares with others, so the search
    starts anew after each.
    """
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    outer = _outermost_readers(model)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if param not in whole:
                owners.setdefault(param, set()).update(outer.get(module, (module,)))
    while (crossing := _find_crossing(model, units, owners.values())) is not None:
        if model in crossing:
            raise MiCSConfigError(
                "A parameter that the root module owns itself is shared with a module inside a unit. Move it into a "
                "module of its own, or leave the units that share it to the root with wrap=."
            )
        merged = crossing.union(*(unit for unit in units if unit & crossing))
        units = [merged, *(unit for unit in units if not unit & crossing)]
    order = {module: index for index, module in enumerate(model.modules())}
    return [tuple(sorted(outermost_of(list(unit)), key=order.__getitem__)) for unit in units]


def _find_crossing(
    model: nn.Module, units: list[set[nn.Module]], owners: Iterable[set[nn.Module]]
) -> set[nn.Module] | None:
    """Returns modules that own one parameter but belong to different units."""
    unit_of_root = {module: index for index, unit in enumerate(units) for module in unit}
    units_of = _units_of(model, unit_of_root)
    for modules in owners:
        if len({unit_of_root.get(root) for module in modules for root in units_of[module]}) > 1:
            return modules
    return None


def is_adapter(module: nn.Module) -> bool:
    """Returns whether a layer is an adapter of PEFT around another one."""
    return hasattr(type(module), "get_base_layer")


def _reads_inside(module: nn.Module) -> bool:
    """Returns whether a layer reads weights of layers inside of it: an adapter, or a layer with parametrizations."""
    return is_adapter(module) or parametrize.is_parametrized(module)


def _outermost_readers(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Maps modules inside of layers that read their weights to the outermost of these; several where one is shared."""
    readers = outermost_of([module for module in model.modules() if _reads_inside(module)])
    result: dict[nn.Module, list[nn.Module]] = {}
    for reader in readers:
        for module in reader.modules():
            result.setdefault(module, []).append(reader)
    return result


def _readers(model: nn.Module, chosen: Sequence[nn.Module]) -> list[nn.Module]:
    """Puts layers that read weights of layers inside of them in the place of these."""
    outer = _outermost_readers(model)
    return [reader for module in chosen for reader in outer.get(module, (module,))]


def _innermost_first(units: list[Unit]) -> list[Unit]:
    """Orders units so that each comes after those inside of it."""
    inside = {unit: {sub for module in unit for sub in module.modules()}.difference(unit) for unit in units}
    waiting, result = list(units), []
    while waiting:
        free = next((unit for unit in waiting if all(inside[unit].isdisjoint(other) for other in waiting)), None)
        if free is None:
            names = sorted({type(module).__name__ for unit in waiting for module in unit})
            raise MiCSConfigError(
                f"Units with shared parameters lie inside each other ({', '.join(names)}). Leave the inner ones out of "
                "wrap=."
            )
        waiting.remove(free)
        result.append(free)
    return result


def _units_of(model: nn.Module, units: Iterable[nn.Module]) -> dict[nn.Module, set[nn.Module]]:
    """Maps each module to the innermost units that hold it, or to the model; several where a module is shared."""
    chosen = set(units)
    result: dict[nn.Module, set[nn.Module]] = {}

    def visit(module: nn.Module, unit: nn.Module) -> None:
        unit = module if module in chosen else unit
        if unit in result.setdefault(module, set()):
            return
        result[module].add(unit)
        for child in module.children():
            visit(child, unit)

    visit(model, model)
    return result


def _split_dtypes(model: nn.Module, units: list[Unit], whole: Collection[nn.Parameter]) -> list[Unit]:
    """Gives trainable parameters of a second dtype units of their own: FSDP2 reduces one dtype a unit."""
    members = {module for unit in units for module in unit}
    units_of = _units_of(model, members)
    held = _held_dtypes(model, whole)
    if len(set().union(*held.values())) < 2:
        return units
    result: list[Unit] = []
    for unit in [*units, (model,)]:
        inside = [module for module in model.modules() if not units_of[module].isdisjoint(unit)]
        result += _minority_units(unit, inside, held, whole)
        if unit != (model,):
            result.append(unit)
    return result


def _held_dtypes(model: nn.Module, whole: Collection[nn.Parameter]) -> dict[nn.Module, set[torch.dtype]]:
    """Returns the dtypes that each module holds; what a layer reads inside of it is its own, if it is of one dtype."""
    held = {module: _own_dtypes((module,), whole) for module in model.modules()}
    for reader in {reader for readers in _outermost_readers(model).values() for reader in readers} - {model}:
        dtypes = _own_dtypes(reader.modules(), whole)
        if len(dtypes) == 1:
            held |= {module: set() for module in reader.modules()} | {reader: dtypes}
    return held


def _minority_units(
    unit: Unit, inside: list[nn.Module], held: dict[nn.Module, set[torch.dtype]], whole: Collection[nn.Parameter]
) -> list[Unit]:
    dtypes = {module: held[module] for module in inside}
    present = {dtype for own in dtypes.values() for dtype in own}
    if len(present) < 2:
        return []
    kept = next((dtype for module in unit for dtype in dtypes[module]), None) or _largest_dtype(inside, whole)
    result: list[Unit] = []
    for dtype in sorted(present - {kept}, key=str):
        owners = [module for module in inside if dtype in dtypes[module]]
        for module in owners:
            others = _own_dtypes(module.modules(), whole) - {dtype}
            if others or module in unit or not _has_forward(module):
                raise MiCSConfigError(
                    f"A {type(module).__name__} holds trainable parameters of several dtypes "
                    f"({', '.join(sorted(map(str, others | {dtype, kept})))}), which cannot be reduced together. "
                    f"Cast the module to one dtype, for example with module.to({kept})."
                )
        result.append(tuple(outermost_of(owners)))
    return result


def _own_dtypes(modules: Iterable[nn.Module], whole: Collection[nn.Parameter]) -> set[torch.dtype]:
    own = [param for module in modules for param in module.parameters(recurse=False)]
    return {param.dtype for param in own if param.requires_grad and param not in whole}


def _largest_dtype(modules: Iterable[nn.Module], whole: Collection[nn.Parameter]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for module in modules:
        for param in module.parameters(recurse=False):
            if param.requires_grad and param not in whole:
                sizes[param.dtype] = sizes.get(param.dtype, 0) + param.numel()
    return max(sizes, key=sizes.__getitem__)


def outermost_of(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the modules that are not inside others of them."""
    inner = {sub for module in modules for sub in module.modules() if sub is not module}
    return [module for module in modules if module not in inner]


def _outermost(model: nn.Module, modules: Sequence[nn.Module]) -> list[nn.Module]:
    chosen = set(outermost_of(modules))
    return [module for module in model.modules() if module in chosen]


def _inner_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if uncompiled(module) is module is not uncompiled(model)]


def _children(module: nn.Module) -> list[nn.Module]:
    return [uncompiled(child) for child in module.children()]


def callable_parts(module: nn.Module) -> list[nn.Module]:
    """Returns the outermost modules inside ``module`` that hold parameters and have a ``forward``."""
    parts: list[nn.Module] = []
    for child in module.children():
        if _has_parameters(child):
            parts += [child] if _has_forward(child) else callable_parts(child)
    return parts


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _has_forward(module: nn.Module) -> bool:
    module = uncompiled(module)
    return type(module).forward is not nn.Module.forward and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _is_atomic(module: nn.Module) -> bool:
    """PyTorch's own composite modules read their children's weights directly; units inside them would not be seen.

    So do adapters. Modules that only stack layers do not.
    """
    if _reads_inside(module):
        return True
    is_container = isinstance(module, _CONTAINERS)
    return type(module).__module__.startswith("torch.nn.modules") and not is_container and any(module.children())
