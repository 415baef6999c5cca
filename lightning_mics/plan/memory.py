"""The memory of one rank, by part, at the moment of a step when it is highest.

States follow from shapes: FSDP2 divides the first dimension of each parameter, rounding up, and the rank with the
largest shards counts. Where optimizer states are divided further, so are the rows of each shard. What comes and goes is
walked through in the order of FSDP2: in the forward pass a unit is there twice, as the gathered message and as its
parameters; in the backward pass its whole gradients and the message of its reduce-scatter are added.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import NamedTuple

from lightning_mics._moved import open_door
from lightning_mics.plan.hardware import Accelerator
from lightning_mics.plan.profile import DTYPE_BYTES, Again, Amount, ModelProfile, Param, Unit
from lightning_mics.plan.settings import Candidate, Training

# What CUDA, its libraries and NCCL's channels take of a device (assumption), and what the caching allocator loses to
# fragments of its blocks (assumption).
_CONTEXT_BYTES = 1.5 * 2**30
_FRAGMENTS = 0.05


@dataclass(frozen=True, kw_only=True)
class MemoryBreakdown:
    """Bytes of one rank at the peak of a step.

    Attributes:
        parameters: Shards of the parameters, and buffers.
        gradients: Sharded gradients.
        optimizer: Optimizer states.
        masters: Float32 values of parameters, where they are with those who step on them.
        partial_sums: Gradients of a window in ``reduce_dtype``, where that is wider than the parameters' own.
        gathered: Units that are gathered, with their messages.
        communication: Whole gradients of a unit, and messages of reductions.
        activations: What the forward pass keeps for the backward pass.
        temporaries: The rest of what a unit allocates while it computes; or the optimizer, while it steps.
        outputs: What the training loop holds of the model's outputs.
        workspaces: Scratch memory of matrix products: of the thread of forward passes and of that of backward passes.
        reserve: The device's context, and fragments.
    """

    parameters: float
    gradients: float
    optimizer: float
    masters: float = 0.0
    partial_sums: float = 0.0
    gathered: float = 0.0
    communication: float = 0.0
    activations: float = 0.0
    temporaries: float = 0.0
    outputs: float = 0.0
    workspaces: float = 0.0
    reserve: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    @property
    def states(self) -> float:
        """What stays between steps: parameters, gradients, optimizer states, masters and partial sums."""
        return self.parameters + self.gradients + self.optimizer + self.masters + self.partial_sums

    def parts(self) -> dict[str, float]:
        """Returns the parts by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


class _Moment(NamedTuple):
    gathered: float = 0.0
    communication: float = 0.0
    activations: float = 0.0
    temporaries: float = 0.0

    @property
    def total(self) -> float:
        return self.gathered + self.communication + self.activations + self.temporaries


def predict_memory(
    profile: ModelProfile, candidate: Candidate, training: Training, accelerator: Accelerator
) -> MemoryBreakdown:
    """Returns the memory that a rank needs.

    Args:
        profile: The model.
        candidate: How it is trained.
        training: Dtypes and the optimizer.
        accelerator: The device; decides what is lost to its context and allocator.
    """
    optimizer_footprint = open_door("plan.memory.optimizer_footprint")  # an optimizer of PyTorch is measured by it
    on_cpu = accelerator.device_type == "cpu"
    shard_size = candidate.shard_size
    parameters = gradients = optimizer = masters = partial_sums = step_extra = 0.0
    for unit, count in Counter(profile.units).items():
        shards = [_shard(param, shard_size, training) for param in unit.params]
        trainable = tuple(shard for shard in shards if shard.trainable)
        stepped = tuple(replace(shard, shape=shard.shard_shape(candidate.slices)) for shard in trainable)
        footprint = optimizer_footprint(training.optimizer, stepped, foreach=not on_cpu)
        if candidate.has_owners:
            cast = [shard for shard in shards if not shard.is_quantized]
            rows = (replace(shard, shape=shard.shard_shape(candidate.slices)) for shard in cast)
            masters += count * _bytes(rows)
            parameters += count * _bytes(replace(shard, dtype=shard.cast(training.param_dtype)) for shard in shards)
        else:
            parameters += count * _bytes(shards)
        gradients += count * _bytes(trainable)
        optimizer += count * footprint.state_bytes
        partial_sums += count * _partial_sums(trainable, candidate, training)
        # One step over all parameters at once has all its temporaries at once.
        here = footprint.step_extra_bytes
        step_extra = max(step_extra, here) if on_cpu else step_extra + count * here
    peak = max([*_moments(profile, candidate, training), _Moment(temporaries=step_extra)], key=lambda m: m.total)
    parameters += profile.buffer_bytes
    outputs = profile.root.outputs.at(candidate.micro_batch) if training.holds_outputs else 0.0
    workspaces = 0.0 if on_cpu else 2.0 * accelerator.workspace
    states = parameters + gradients + optimizer + masters + partial_sums
    used = states + peak.total + outputs + workspaces
    return MemoryBreakdown(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        masters=masters,
        partial_sums=partial_sums,
        gathered=peak.gathered,
        communication=peak.communication,
        activations=peak.activations,
        temporaries=peak.temporaries,
        outputs=outputs,
        workspaces=workspaces,
        reserve=0.0 if on_cpu else _CONTEXT_BYTES + _FRAGMENTS * used,
    )


def gradient_bytes(unit: Unit, training: Training) -> int:
    """Returns the bytes of a unit's whole gradients in the parameters' own dtype, as DDP keeps and reduces them."""
    return _bytes(_shard(param, 1, training) for param in unit.params if param.trainable)


def _shard(param: Param, shard_size: int, training: Training) -> Param:
    dtype = param.cast(training.state_dtype or param.dtype)
    return Param(shape=param.shard_shape(shard_size), dtype=dtype, trainable=param.trainable)


def _bytes(params: Iterable[Param]) -> int:
    return sum(param.numel * DTYPE_BYTES[param.dtype] for param in params)


def _partial_sums(trainable: Iterable[Param], candidate: Candidate, training: Training) -> float:
    width = DTYPE_BYTES[training.reduce_dtype]
    if candidate.scheme != "mics":
        return 0.0
    return sum(param.numel * width for param in trainable if width > DTYPE_BYTES[param.dtype])


def _moments(profile: ModelProfile, candidate: Candidate, training: Training) -> Iterator[_Moment]:
    """Yields what comes and goes at the moments that can be the peak."""
    if candidate.scheme == "ddp":
        return _moments_of_replica(profile, candidate, training)
    return _Walk(profile, candidate, training).moments()


def _moments_of_replica(profile: ModelProfile, candidate: Candidate, training: Training) -> Iterator[_Moment]:
    """DDP: whole parameters, cast by autocast; gradients a second time in its buckets."""
    samples = candidate.micro_batch
    params = [param for unit in profile.units for param in unit.params if not param.is_quantized]
    casts = training.param_dtype not in {training.state_dtype or param.dtype for param in params}
    cast = sum(param.numel for param in params) * DTYPE_BYTES[training.param_dtype] if casts else 0.0
    buckets = sum(gradient_bytes(unit, training) for unit in profile.units)
    units = list(zip(profile.units, [None, *candidate.again(profile.blocks)], strict=True))
    activations = sum(unit.kept(again).at(samples) for unit, again in units)
    for (unit, _), again in zip(units, _computed_again(units, samples), strict=True):
        extra = max(unit.forward_extra.at(samples), unit.backward_extra.at(samples)) + again
        yield _Moment(cast, buckets, activations, extra)


def _computed_again(units: Iterable[tuple[Unit, Again]], samples: int) -> Iterator[float]:
    """Yields the bytes that are there a second time when a unit's backward pass begins.

    A block is computed again at once with what is inside of it, whose backward passes come first.
    """
    there = 0.0
    for unit, again in units:
        there = unit.recomputed(again).at(samples) + (there if unit.is_inside else 0.0)
        yield there


class _Size(NamedTuple):
    """Bytes of a unit in a microstep."""

    gathered: float
    gradient: float
    message: float
    kept: float
    forward: float  # allocated beyond what is kept
    backward: float


class _Walk:
    """Walks through the passes of a microstep of FSDP2."""

    def __init__(self, profile: ModelProfile, candidate: Candidate, training: Training) -> None:
        self.profile, self.candidate = profile, candidate
        self._param_dtype, self._gather_width = training.param_dtype, DTYPE_BYTES[training.param_dtype]
        self._reduce_width = DTYPE_BYTES[training.reduce_dtype]
        size = functools.cache(self._size)  # equal units are one object
        self._root = size(profile.root, None)
        blocks = list(zip(profile.blocks, candidate.again(profile.blocks), strict=True))
        self._blocks = [(size(unit, again), unit.runs_backward) for unit, again in blocks]
        self._again = list(_computed_again(blocks, candidate.micro_batch))

    def _size(self, unit: Unit, again: Again) -> _Size:
        shard_size, samples = self.candidate.shard_size, self.candidate.micro_batch
        extra = unit.checkpoint_extra if again else unit.forward_extra
        extra += unit.checkpoint if again == "offloaded" else Amount()
        return _Size(
            gathered=unit.gathered_bytes(shard_size, self._param_dtype),
            gradient=unit.trainable_numel * self._gather_width,
            message=unit.reduced_numel(shard_size) * self._reduce_width,
            kept=unit.kept(again).at(samples),
            forward=extra.at(samples),
            backward=unit.backward_extra.at(samples),
        )

    @property
    def _early_gradient(self) -> float:
        """What the root has of gradients while those of blocks are made."""
        root = self.profile.root
        return (root.trainable_numel if root.early_numel is None else root.early_numel) * self._gather_width

    def moments(self) -> Iterator[_Moment]:
        """Yields the moments of the forward, then of the backward pass."""
        root, early = self._root, self._early_gradient
        activations, resident = 0.0, root.gathered
        for unit, _ in self._blocks:
            activations += unit.kept
            yield _Moment(resident + 2 * unit.gathered, 0.0, activations, unit.forward)
            if not self.candidate.reshard_after_forward:
                resident += unit.gathered
        activations += root.kept
        yield _Moment(resident, early * self.profile.root.fuses_backward, activations, root.forward)
        yield from self._backward_moments(activations, resident, early)

    def _backward_moments(self, activations: float, resident: float, early: float) -> Iterator[_Moment]:
        root, reshards = self._root, self.candidate.reshard_after_forward
        entries = zip(self._blocks[::-1], self._again[::-1], strict=True)
        blocks = [(unit, again) for (unit, runs_backward), again in entries if runs_backward]
        first = blocks[0][0].gathered if blocks and reshards else 0.0
        yield _Moment(resident + first, early, activations, root.backward)
        activations -= root.kept
        in_flight = 0.0
        for (unit, again), following in zip_longest(blocks, blocks[1:]):
            here, gradients = resident, early + unit.gradient
            if reshards:
                here += unit.gathered + (following[0].gathered if following else 0.0)
            yield _Moment(here, gradients + in_flight, activations, again + unit.backward)
            activations -= unit.kept
            in_flight = unit.message
            yield _Moment(here, gradients + in_flight, activations, 0.0)
            if not reshards:
                resident -= unit.gathered
        yield _Moment(root.gathered, root.gradient + max(in_flight, root.message))
