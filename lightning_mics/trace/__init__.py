"""From a model to its profile: a pass on fake tensors that counts memory and operations and needs neither.

The model is copied without its values, sharded over one rank, and run forward and backward under PyTorch's own
trackers. Of layers that repeat, only three run; the others get the figures of the second.
"""

from __future__ import annotations

import gc
import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from types import CellType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_mics.config import Wrap, as_dtype
from lightning_mics.core._torch import tree_leaves, tree_map_only
from lightning_mics.core.checks import check_model
from lightning_mics.core.units import Unit as UnitModules
from lightning_mics.core.units import backward_order, is_batch_norm, plan_units, separate_batch_norms
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.profile import DEFAULT_LENGTH, Amount, ModelProfile, Param, Unit
from lightning_mics.trace._torch import (
    Event,
    FakeAttention,
    Storage,
    attention_flops,
    copy_as_fake,
    fake_tensors,
    is_fake,
    one_rank_mesh,
    plain_sequences,
    track_activations,
)

Sample = Mapping[str, Any] | Sequence[Any] | Tensor
Loss = Callable[[nn.Module, Any], Tensor]

# Numbers by which layers tell themselves apart, without behaving differently.
_POSITION = re.compile(r"(idx|index|id|number)$|^layer$")
# What Lightning hangs on a module; a copy must not log to it.
_TRAINERS = {"_trainer", "_fabric"}
# Losses and the like are no part of what grows with samples; they would hide that layers are equal.
_SCALAR_BYTES = 16


def profile_model(
    model: nn.Module,
    sample: Sample | None,
    *,
    wrap: Wrap = "auto",
    param_dtype: str | None = None,
    loss: Loss | None = None,
    name: str | None = None,
    sequence_length: int | None = None,
    device_type: Literal["cuda", "cpu"] = "cuda",
) -> ModelProfile:
    """Measures what a model's units would need, without memory and without a device.

    The model is left as it is. Attention that is computed in one piece counts without scores in memory, also where
    dropout or grouped queries would make a CPU store them; causal attention counts whole in operations.

    Args:
        model: The model, not sharded; its parameters may be on any device, also meta.
        sample: A batch as ``model`` takes it (a mapping is passed as keywords, a list or tuple as arguments). Tensors
            begin with the samples; how many is of no concern. ``None`` estimates from shapes and published formulas.
        wrap: What becomes a unit; see :class:`~lightning_mics.MiCSConfig`.
        param_dtype: Dtype in which parameters are gathered and computed with; ``None`` keeps their own.
        loss: Takes the model and a batch, returns the loss. By default ``training_step(batch, 0)`` where the model has
            one, else the ``loss`` in the model's output (given labels where it takes them beside ``input_ids``), else
            the mean of its outputs.
        name: What to call the model; by default its class.
        sequence_length: Tokens of a sample; by default the sample's own, without one the longest that the model takes.
        device_type: Where it would train. ``"cpu"`` counts what CPU kernels keep, such as dropout masks of full width.

    Returns:
        The profile, with amounts in bytes.

    Raises:
        MiCSConfigError: If the model cannot be sharded, or not run on fake tensors.
    """
    check_model(model)
    dtype = as_dtype(param_dtype, "param_dtype")
    structure = _Structure(model, wrap, dtype)
    if sample is None:
        return _estimate(structure, name or type(model).__name__, sequence_length)
    figures, order = _measure(structure, _without_idle_mask(model, sample), loss, device_type)
    interned: dict[Any, Unit] = {}
    return ModelProfile(
        name=name or type(model).__name__,
        root=structure.unit(None, figures.get(None, _Figures()), interned),
        blocks=tuple(structure.unit(unit, figures.get(unit, _Figures()), interned) for unit in order),
        sequence_length=_sequence_length(sample) or sequence_length,
        buffer_bytes=_buffer_bytes(model),
        compute_dtype=_dtype_name(structure.compute_dtype),
        source="trace",
    )


# --- The model's structure ------------------------------------------------------------------------------------------


class _Structure:
    """A model's units, and which of them are alike."""

    def __init__(self, model: nn.Module, wrap: Wrap, dtype: torch.dtype | None) -> None:
        self.model, self.dtype = model, dtype
        self.units = plan_units(model, wrap)
        if dtype is not None and any(is_batch_norm(module) for module in model.modules()):
            self.units = separate_batch_norms(model, self.units)
        self.names = {module: name for name, module in model.named_modules()}
        sizes: Counter[torch.dtype] = Counter()
        for param in model.parameters():
            sizes[param.dtype] += param.numel()
        self.compute_dtype = dtype or sizes.most_common(1)[0][0]
        self._params = self._params_by_unit()
        # Members of stacks that run for others; and by dropped member, the one that stands for it.
        self.stand_ins: list[tuple[nn.Module, ...]] = []
        self.twins = self._find_twins()

    def _params_by_unit(self) -> dict[UnitModules | None, tuple[Param, ...]]:
        """Divides the parameters as ``fully_shard`` does: innermost units first, each parameter once."""
        taken: set[nn.Parameter] = set()
        result: dict[UnitModules | None, tuple[Param, ...]] = {}
        for unit in [*self.units, None]:
            modules = (self.model,) if unit is None else unit
            own = [param for module in modules for param in module.parameters() if param not in taken]
            own = list(dict.fromkeys(own))
            taken.update(own)
            result[unit] = tuple(
                Param(shape=tuple(param.shape), dtype=_dtype_name(param.dtype), trainable=param.requires_grad)
                for param in own
            )
        return result

    def unit(self, unit: UnitModules | None, figures: _Figures, interned: dict[Any, Unit]) -> Unit:
        """Returns the profile of a unit; the same object for equal ones."""
        can_checkpoint = unit is not None and can_checkpoint_unit(unit)
        params = self._params[unit]
        key = (unit is None, params, can_checkpoint, figures)
        if key not in interned:
            interned[key] = Unit(
                name="(root)" if unit is None else " + ".join(self.names[module] for module in unit),
                params=params,
                can_checkpoint=can_checkpoint,
                **{part.name: getattr(figures, part.name) for part in fields(figures)},
            )
        return interned[key]

    def params(self, unit: UnitModules | None) -> tuple[Param, ...]:
        """Returns a unit's parameters, the root's for ``None``."""
        return self._params[unit]

    def root_sizes(self) -> set[int]:
        """Returns the sizes of the root's gradients in bytes."""
        width = self.compute_dtype.itemsize
        return {param.numel * width for param in self._params[None] if param.trainable}

    def _find_twins(self) -> dict[nn.Module, nn.Module]:
        twins: dict[nn.Module, nn.Module] = {}
        uses = Counter(module for _, module in self.model.named_modules(remove_duplicate=False))
        for stack in self.stacks():
            alike: dict[Any, list[nn.Module]] = {}
            if all(uses[member] == 1 for member in stack):
                for member in stack:
                    alike.setdefault(_signature(member), []).append(member)
            # The first may differ, whose input may need no gradient; the last, whose output no other of them keeps.
            for group in alike.values():
                twins.update({member: group[1] for member in group[2:-1]})
                self.stand_ins += [(group[0], group[1], group[-1])] if len(group) > 3 else []
        return twins

    def stacks(self) -> Iterator[list[nn.Module]]:
        """Yields the members of each list or sequence of modules that are plain units."""
        singles = {unit[0] for unit in self.units if len(unit) == 1}
        members = {module for unit in self.units for module in unit}
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList | nn.Sequential):
                children = list(module.children())
                plain = [m for m in children if m in singles and members.isdisjoint(set(m.modules()) - {m})]
                if plain == children:
                    yield children


def can_checkpoint_unit(unit: UnitModules) -> bool:
    """Returns whether activation checkpointing applies to a unit, as :func:`~lightning_mics.mics_shard` decides it."""
    return len(unit) == 1 and any(unit[0].children())


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
            tuple(map(id, [*inner._forward_hooks.values(), *inner._forward_pre_hooks.values()])),
        )
        for name, inner in module.named_modules()
    )


def _is_setting(value: Any) -> bool:
    """Returns whether an attribute can be compared, and may make a module behave differently."""
    if isinstance(value, tuple | list):
        return all(_is_setting(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | Enum)


# --- Running a copy -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Figures:
    """A unit's part of a profile; names are those of :class:`~lightning_mics.plan.profile.Unit`."""

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    saved: Amount = field(default_factory=Amount)
    checkpoint: Amount = field(default_factory=Amount)
    forward_extra: Amount = field(default_factory=Amount)
    backward_extra: Amount = field(default_factory=Amount)


@dataclass
class _Counts:
    """What one pass counted of a unit, in operations and bytes."""

    forward_flops: int = 0
    backward_flops: int = 0
    saved: int = 0
    forward_extra: int = 0
    backward_extra: int = 0


_Key = UnitModules | None
_Trace = dict[_Key, _Counts]


def _measure(
    structure: _Structure, sample: Sample, loss: Loss | None, device_type: str
) -> tuple[dict[_Key, _Figures], list[UnitModules]]:
    """Returns the figures of all units, and the order of their forward passes."""
    failures: list[Exception] = []
    for reduced in (True, False) if structure.twins else (False,):
        for step in _steps(structure.model, sample, loss):
            try:
                one, two = _run(structure, sample, step, device_type, reduced, checkpoints=False)
                if reduced and not _compute_alike(structure, one):
                    break
                kept = _run(structure, sample, step, device_type, reduced, checkpoints=True)
                return _expand(structure, _fit([one, two], kept), list(one), reduced)
            except MiCSConfigError:
                raise
            except Exception as error:
                failures.append(error)
    reason = f"{type(failures[-1]).__name__}: {str(failures[-1]).strip().partition(chr(10))[0]}"
    raise MiCSConfigError(
        f"{type(structure.model).__name__} cannot be traced ({reason}). "
        "The sample must be what its forward takes, and nothing in it may depend on values. Pass loss= to run it in "
        "another way, or no sample for an estimate from shapes."
    ) from failures[-1]


def _compute_alike(structure: _Structure, counts: _Trace) -> bool:
    """Returns whether those that stand for others see inputs of one size, as equal layers of one stack may not."""
    return all(len({counts[(member,)].forward_flops for member in group}) == 1 for group in structure.stand_ins)


def _steps(model: nn.Module, sample: Sample, loss: Loss | None) -> Iterator[Loss]:
    """Yields ways to a loss, the likeliest first."""
    if loss is not None:
        yield loss
        return
    if callable(getattr(model, "training_step", None)):
        yield _training_step
    if isinstance(sample, Mapping) and "labels" not in sample and "input_ids" in sample and _takes_labels(model):
        yield _with_labels
    yield _forward
    if isinstance(sample, list | tuple) and len(sample) > 1:
        yield _forward_of_first


def _training_step(module: Any, batch: Any) -> Tensor:
    return _scalar(module.training_step(batch, 0))


def _with_labels(module: nn.Module, batch: Any) -> Tensor:
    return _scalar(module(**batch, labels=batch["input_ids"]))


def _forward(module: nn.Module, batch: Any) -> Tensor:
    return _scalar(call_model(module, batch))


def _forward_of_first(module: nn.Module, batch: Any) -> Tensor:
    return _scalar(module(batch[0]))


def _takes_labels(model: nn.Module) -> bool:
    return "labels" in inspect.signature(model.forward).parameters


def call_model(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch: a mapping as keywords, a list or tuple as arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple):
        return model(*batch)
    return model(batch)


def _scalar(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not tensors:
        raise ValueError("its output has nothing that needs a gradient")
    return torch.stack([tensor.float().mean() for tensor in tensors]).sum() if len(tensors) > 1 else _mean(tensors[0])


def _mean(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 0 else tensor.float().mean()


class _Step(nn.Module):
    """A forward pass up to the loss, as a root that FSDP can wrap."""

    def __init__(self, model: nn.Module, step: Loss) -> None:
        super().__init__()
        self.model, self._step = model, step

    def forward(self, batch: Any) -> Tensor:
        return self._step(self.model, batch)


def _run(
    structure: _Structure, sample: Sample, step: Loss, device_type: str, reduced: bool, *, checkpoints: bool
) -> list[_Trace]:
    """Returns what passes with one and with two samples count."""
    traces, modes = [], []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), one_rank_mesh() as mesh:
        warnings.simplefilter("ignore")
        for samples in (1, 2):
            # Each pass has a copy of its own: of units of several modules the tracker leaves hooks behind.
            with fake_tensors() as mode:
                modes.append(mode)
                root, unit_of = _build(structure, step, mode, mesh, reduced, checkpoints)
                with plain_sequences(), _LikeKernels(device_type):
                    batch = _resize(sample, samples)
                    traces.append(_trace(root, unit_of, batch, structure.root_sizes(), backward=not checkpoints))
    _refuse_leaks(structure.model, modes)
    return traces


class LeakedTensorsError(MiCSConfigError):
    """The model keeps tensors outside of itself, and now keeps some without values."""


def _refuse_leaks(model: nn.Module, modes: Collection[Any]) -> None:
    """Looks for tensors of a trace where code keeps tensors for later: they would poison training.

    In globals, classes and caches of functions, of the modules in which the model's classes are written.
    """
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    homes = {kind.__module__ for kind in classes if kind.__module__.partition(".")[0] not in ("torch", "builtins")}
    for home in sorted(homes):
        for name, value in list(vars(sys.modules.get(home, object)).items()):
            if _holds_traced(value, modes, home, depth=3):
                raise LeakedTensorsError(
                    f"{type(model).__name__} cannot be traced: {home}.{name} keeps a tensor of the forward pass, and "
                    "training would go on with one without values. Restart, and give shard_size a number; or keep the "
                    "tensor in a buffer of the module."
                )


def _holds_traced(value: Any, modes: Collection[Any], home: str, depth: int) -> bool:
    if is_fake(value):
        return value.fake_mode in modes
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    elif hasattr(value, "cache_info"):  # functools.cache
        inner = gc.get_referents(value)
    elif isinstance(value, type) and value.__module__ == home:
        inner = vars(value).values()
    elif inspect.isfunction(value) and value.__closure__:
        inner = [cell.cell_contents for cell in value.__closure__ if cell != CellType()]
    return depth > 0 and any(_holds_traced(entry, modes, home, depth - 1) for entry in list(inner))


def _build(
    structure: _Structure, step: Loss, mode: Any, mesh: DeviceMesh, reduced: bool, checkpoints: bool
) -> tuple[nn.Module, dict[nn.Module, UnitModules]]:
    """Returns a sharded fake copy, and which unit its modules belong to."""
    copied, copies = _copy(structure, mode, structure.twins if reduced else {})
    unit_of: dict[nn.Module, UnitModules] = {}
    units = [unit for unit in structure.units if not reduced or unit[0] not in structure.twins]
    for unit in units:
        modules = [copies[module] for module in unit]
        unit_of.update(dict.fromkeys(modules, unit))
        if checkpoints and can_checkpoint_unit(unit):
            checkpoint(modules[0])
        keeps_dtype = all(is_batch_norm(module) for module in unit)
        _shard(modules[0] if len(modules) == 1 else modules, mesh, None if keeps_dtype else structure.dtype, True)
    root = _Step(copied, step)
    _shard(root, mesh, structure.dtype, False)
    return root, unit_of


def _shard(modules: Any, mesh: DeviceMesh, dtype: torch.dtype | None, reshard: bool) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=dtype is not None)
    fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def _copy(
    structure: _Structure, mode: Any, twins: Mapping[nn.Module, nn.Module]
) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Copies a model without its values and without the members of stacks that others stand for."""
    model = structure.model
    memo: dict[int, Any] = {}
    absent = nn.Module()
    for member in twins:
        memo[id(member)] = absent
    for module in model.modules():
        for name in _TRAINERS:
            memo[id(vars(module).get(name))] = vars(module).get(name)
    left_out = {inner for member in twins for inner in member.modules()}
    kept = [module for module in model.modules() if module not in left_out]
    for tensor in {t: None for m in kept for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]}:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        is_param = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_param else fake
    # Fake tensors that stand for real ones are made by the mode itself, which must not see its own.
    copied = copy_as_fake(model, memo, mode)
    for module in copied.modules():
        _leave_out(module, absent)
        if _TRAINERS.intersection(vars(module)):
            vars(module).update(dict.fromkeys(_TRAINERS), log=_nothing, log_dict=_nothing)
    copied.train()
    return copied, {module: memo[id(module)] for module in model.modules() if id(module) in memo}


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _leave_out(stack: nn.Module, absent: nn.Module) -> None:
    if all(child is not absent for child in stack._modules.values()):
        return
    left = [child for child in stack._modules.values() if child is not absent]
    stack._modules.clear()
    for index, child in enumerate(left):
        stack.register_module(str(index), child)


def _resize(sample: Any, samples: int) -> Any:
    """Returns a fake batch like ``sample`` with another number of samples."""

    def resize(tensor: Tensor) -> Tensor:
        shape = (samples, *tensor.shape[1:]) if tensor.dim() else ()
        return torch.empty(shape, dtype=tensor.dtype, device="cpu")

    return tree_map_only(Tensor, resize, dict(sample) if isinstance(sample, Mapping) else sample)


class _LikeKernels(TorchFunctionMode):
    """Makes fake tensors keep what the kernels of the real device would."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._on_cpu = device_type == "cpu"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(self._on_cpu, *args, **kwargs)
        if func is functional.dropout and not self._on_cpu:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    on_cpu: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in one piece where the device has it; what that keeps for dropout are two numbers."""
    is_plain = query.dim() == 4 and query.shape[-1] == value.shape[-1] and query.dtype == key.dtype == value.dtype
    if not is_plain or (on_cpu and dropout_p) or (attn_mask is not None and attn_mask.requires_grad):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p if on_cpu else 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return FakeAttention.apply(query, key, value, attn_mask, is_causal, scale)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0 or inplace:
        return functional.dropout(input, p, training, inplace)
    # Its mask takes a byte an element; the CPU's own is as wide as the input.
    return torch.native_dropout(input, p, training)[0]


# --- Reading a trace ------------------------------------------------------------------------------------------------


@dataclass
class _Mark:
    """An event, with the operations counted before it."""

    event: Event | Literal["loss", "end"]
    flops: int = 0


def _trace(
    root: nn.Module,
    unit_of: Mapping[nn.Module, UnitModules],
    batch: Any,
    gradient_sizes: set[int],
    *,
    backward: bool,
) -> _Trace:
    marks: list[_Mark] = []
    flops = FlopCounterMode(display=False, custom_mapping=attention_flops())

    def record(event: Event | Literal["loss", "end"]) -> None:
        is_memory = isinstance(event, Event) and event.kind == "memory"
        marks.append(_Mark(event, 0 if is_memory else flops.get_total_flops()))

    tracker = track_activations(root, record)
    tracker.track_inputs((batch,))
    with tracker, flops:
        loss = root(batch)
        record("loss")
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise MiCSConfigError("The loss is not a tensor that needs a gradient. Return such a one from loss=.")
        if backward:
            loss.backward()
        record("end")
    tracker.classify()
    return _Replay(unit_of, gradient_sizes).run(marks)


@dataclass
class _Call:
    """A unit's forward pass under way."""

    unit: _Key
    peak: int = 0


class _Replay:
    """Goes through what happened a second time, when it is known which memory is what.

    What the forward pass keeps belongs to the unit that allocated it.
    """

    def __init__(self, unit_of: Mapping[Any, UnitModules], gradient_sizes: set[int]) -> None:
        self._unit_of, self._gradient_sizes = unit_of, gradient_sizes
        self._counts: _Trace = {None: _Counts()}
        self._calls = [_Call(None)]
        self._backward: list[_Key] = [None]
        self._in_backward = False
        self._flops = self._live = 0
        # Bytes that stay until the backward pass, and what of them there is when a unit's backward pass begins.
        self._kept = 0
        self._kept_before: dict[_Key, int] = {}
        self._kept_storages: set[int] = set()

    def run(self, marks: list[_Mark]) -> _Trace:
        """Returns the counts by unit, in the order of the forward pass; the root first."""
        self._leave_out_partial_gradients(marks)
        self._find_kept(marks)
        for mark in marks:
            event = mark.event
            if isinstance(event, Event) and event.storage is not None:
                if event.storage.is_activation and abs(event.change) > _SCALAR_BYTES:
                    self._change(event.storage, event.change)
                continue
            self._charge(mark.flops)
            if event == "loss":
                self._end_call(None)
                self._in_backward = True
                self._kept_before[None] = self._kept
            elif isinstance(event, Event) and (unit := self._unit_of.get(event.module)) is not None:
                self._move(event.kind, unit)
        return self._counts

    def _leave_out_partial_gradients(self, marks: list[_Mark]) -> None:
        """Where a parameter is used at both ends of a model, the gradient of one use waits for that of the other.

        It is no activation: gradients count elsewhere.
        """
        waiting: dict[int, Storage] = {}
        kinds = [mark.event.kind if isinstance(mark.event, Event) else mark.event for mark in marks]
        if "loss" not in kinds or "backward_end" not in kinds:
            return
        for mark in marks[kinds.index("loss") : kinds.index("backward_end")]:
            if isinstance(mark.event, Event) and mark.event.storage is not None:
                key = id(mark.event.storage)
                waiting.pop(key, None)
                if mark.event.change in self._gradient_sizes:
                    waiting[key] = mark.event.storage
        for storage in waiting.values():
            storage.is_activation = False

    def _find_kept(self, marks: list[_Mark]) -> None:
        sizes: Counter[int] = Counter()
        for mark in marks:
            if mark.event == "loss":
                break
            if isinstance(mark.event, Event) and mark.event.storage is not None:
                sizes[id(mark.event.storage)] += mark.event.change
        self._kept_storages = {key for key, size in sizes.items() if size > 0}

    def _charge(self, flops: int) -> None:
        owner = self._counts[self._backward[-1] if self._in_backward else self._calls[-1].unit]
        if self._in_backward:
            owner.backward_flops += flops - self._flops
        else:
            owner.forward_flops += flops - self._flops
        self._flops = flops

    def _change(self, storage: Storage, change: int) -> None:
        self._live += change
        if id(storage) in self._kept_storages:
            self._kept += change
            if not self._in_backward:
                self._counts[self._calls[-1].unit].saved += change
        if self._in_backward:
            unit = self._backward[-1]
            extra = self._live - self._kept_before[unit]
            self._counts[unit].backward_extra = max(self._counts[unit].backward_extra, extra)
        else:
            self._calls[-1].peak = max(self._calls[-1].peak, self._live)

    def _move(self, kind: str, unit: UnitModules) -> None:
        if kind == "forward":
            self._counts.setdefault(unit, _Counts())
            self._calls.append(_Call(unit, peak=self._live))
        elif kind == "forward_end":
            self._end_call(unit)
        elif kind == "backward" and unit not in self._backward:
            self._backward.append(unit)
            self._kept_before[unit] = self._kept
        elif kind == "backward_end" and unit in self._backward:
            self._backward.remove(unit)

    def _end_call(self, unit: _Key) -> None:
        if self._calls[-1].unit == unit:
            call, counts = self._calls.pop(), self._counts[unit]
            counts.forward_extra = max(counts.forward_extra, call.peak - self._kept)


def _fit(traces: list[_Trace], kept: list[_Trace]) -> dict[_Key, _Figures]:
    """Makes lines of the counts for one and for two samples."""

    def line(unit: _Key, name: str, of: list[_Trace]) -> Amount:
        one, two = (getattr(trace.get(unit, _Counts()), name) for trace in of)
        return _line(max(0, one), max(0, two))

    result = {}
    for unit in traces[0]:
        again = unit is not None and can_checkpoint_unit(unit)
        result[unit] = _Figures(
            forward_flops=line(unit, "forward_flops", traces).at(1),
            backward_flops=line(unit, "backward_flops", traces).at(1),
            saved=line(unit, "saved", traces),
            checkpoint=line(unit, "saved", kept if again else traces),
            forward_extra=line(unit, "forward_extra", traces),
            backward_extra=line(unit, "backward_extra", traces),
        )
    return result


def _line(one: int, two: int) -> Amount:
    slope = two - one
    if slope > one or slope < 0:  # not a line: what two samples need counts
        return Amount(per_sample=two / 2)
    return Amount(fixed=one - slope, per_sample=slope)


def _expand(
    structure: _Structure, figures: dict[_Key, _Figures], order: list[_Key], reduced: bool
) -> tuple[dict[_Key, _Figures], list[UnitModules]]:
    """Gives the members of stacks that did not run the figures of those that stand for them."""
    ran = [unit for unit in order if unit is not None]
    if not reduced:
        return figures, [*ran, *(unit for unit in structure.units if unit not in figures)]
    stack_of = {member: index for index, stack in enumerate(structure.stacks()) for member in stack}
    stacks = list(structure.stacks())
    result: list[UnitModules] = []
    for unit in ran:
        stack = stack_of.get(unit[0])
        members = [unit] if stack is None else [(member,) for member in stacks[stack]]
        result += [member for member in members if member not in result]
    for member, twin in structure.twins.items():
        figures[(member,)] = figures[(twin,)]
    return figures, [*result, *(unit for unit in structure.units if unit not in result)]


# --- Samples --------------------------------------------------------------------------------------------------------


def _without_idle_mask(model: nn.Module, sample: Sample) -> Sample:
    """Leaves out a mask that masks nothing.

    Models of Hugging Face look into it and pass none on, which fake tensors cannot tell them.
    """
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) and hasattr(model, "config") else None
    if isinstance(sample, Mapping) and isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_meta and mask.all():
        return {key: value for key, value in sample.items() if key != "attention_mask"}
    return sample


def _sequence_length(sample: Any) -> int | None:
    """Returns the tokens of a sample: the width of its first matrix of whole numbers."""
    for leaf in tree_leaves(dict(sample) if isinstance(sample, Mapping) else sample):
        if isinstance(leaf, Tensor) and leaf.dim() == 2 and not leaf.is_floating_point():
            return leaf.shape[1]
    return None


def _buffer_bytes(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- Estimates without a sample -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """The shape of a transformer."""

    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int | None
    is_gated: bool
    is_flash: bool

    @classmethod
    def of(cls, model: nn.Module) -> _Shape | None:
        """Reads it from the configuration of a Hugging Face model; ``None`` if there is none."""
        config = getattr(model, "config", None)
        read = getattr(config, "get_text_config", lambda: config)
        config = read()

        def get(*names: str) -> Any:
            return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

        hidden, heads = get("hidden_size", "n_embd", "d_model"), get("num_attention_heads", "n_head")
        vocabulary = get("vocab_size")
        if not all(isinstance(value, int) for value in (hidden, heads, vocabulary)):
            return None
        attention = getattr(config, "_attn_implementation", None)
        return cls(
            hidden=hidden,
            heads=heads,
            intermediate=get("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
            vocabulary=vocabulary,
            positions=get("max_position_embeddings", "n_positions"),
            is_gated=get("hidden_act", "activation_function") in ("silu", "swish"),
            is_flash=attention is not None and attention != "eager",
        )


def _estimate(structure: _Structure, name: str, sequence_length: int | None) -> ModelProfile:
    """Estimates a profile from shapes.

    Without the shape of a transformer, only the products with weights count, as in ``6 N D`` of Kaplan et al., "Scaling
    Laws for Neural Language Models", 2020. Activations of transformer blocks are those of Korthikanti et al., "Reducing
    Activation Recomputation in Large Transformer Models", 2022: ``s h (34 + 5 a s / h)`` bytes a sample at 16 bits,
    without the second term where attention is computed in one piece.
    """
    shape = _Shape.of(structure.model)
    figures: dict[_Key, _Figures] = {}
    source = "shapes only"
    if sequence_length is None and shape is not None and shape.positions is not None:
        sequence_length = min(shape.positions, DEFAULT_LENGTH)
    if shape is not None and sequence_length is not None:
        source = "formula"
        width = structure.compute_dtype.itemsize
        for unit in structure.units:
            # Embeddings, which may be units, have fewer matrices than a block.
            if sum(len(param.shape) > 1 for param in structure.params(unit)) >= 4:
                figures[unit] = _block_estimate(shape, structure.params(unit), sequence_length, width)
        figures[None] = _root_estimate(shape, sequence_length, width)
    else:
        for key in (None, *structure.units):
            flops = _matmul_flops(structure.params(key), sequence_length or 1)
            figures[key] = _Figures(forward_flops=flops, backward_flops=2 * flops)
    interned: dict[Any, Unit] = {}
    return ModelProfile(
        name=name,
        root=structure.unit(None, figures.get(None, _Figures()), interned),
        blocks=tuple(
            structure.unit(unit, figures.get(unit, _Figures()), interned)
            for unit in backward_order(structure.model, structure.units)
        ),
        sequence_length=sequence_length,
        buffer_bytes=_buffer_bytes(structure.model),
        compute_dtype=_dtype_name(structure.compute_dtype),
        source=source,
    )


def _matmul_flops(params: Iterable[Param], tokens: int) -> float:
    return 2.0 * sum(param.numel for param in params if len(param.shape) > 1) * tokens


def _block_estimate(shape: _Shape, params: Iterable[Param], tokens: int, width: int) -> _Figures:
    hidden, wide = tokens * shape.hidden * width, tokens * shape.intermediate * width
    masks = 2 * tokens * shape.hidden
    saved = 8 * hidden + (4 if shape.is_gated else 2) * wide + masks
    if not shape.is_flash:
        saved += shape.heads * tokens**2 * (2 * width + 1)
    flops = _matmul_flops(params, tokens) + 4.0 * tokens**2 * shape.hidden
    return _Figures(
        forward_flops=flops,
        backward_flops=2 * flops,
        saved=Amount(per_sample=saved),
        checkpoint=Amount(per_sample=hidden),
        forward_extra=Amount(per_sample=wide),
        backward_extra=Amount(per_sample=hidden + 2 * wide),
    )


def _root_estimate(shape: _Shape, tokens: int, width: int) -> _Figures:
    """Embeddings, a last norm, and a head whose loss is computed in float32."""
    hidden, logits = tokens * shape.hidden, tokens * shape.vocabulary
    flops = 2.0 * hidden * shape.vocabulary
    saved = Amount(per_sample=3 * hidden * width + 4 * logits)
    return _Figures(
        forward_flops=flops,
        backward_flops=2 * flops,
        saved=saved,
        checkpoint=saved,
        forward_extra=Amount(per_sample=(width + 4) * logits),
        backward_extra=Amount(per_sample=(width + 4) * logits),
    )
