"""Runs a model's own block on the device at hand, for the planner: rates, the host's time, memory, the optimizer.

Two copies of the model take turns that differ by a few blocks of one stack: what they differ by is the blocks' own,
without embeddings and head. The host is timed with samples so small that nothing else takes time, once plain and once
sharded, in a world of which no other rank is there.
"""

from __future__ import annotations

import copy
import datetime
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.config import MiCSConfig, as_dtype
from lightning_mics.core._torch import tree_map_only
from lightning_mics.core.accumulation import defer_replication_sync
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import Cluster, Host
from lightning_mics.plan.host import BACKWARD, REDUCTION
from lightning_mics.plan.profile import Unit
from lightning_mics.plan.settings import Training, Variant
from lightning_mics.sharding import mics_shard
from lightning_mics.trace import profile_model
from lightning_mics.trace._torch import fake_world
from lightning_mics.trace.models import build_model
from lightning_mics.trace.steps import Loss, steps
from lightning_mics.trace.structure import Structure
from lightning_mics.trace.variants import apply_variant

Progress = Callable[[float], None]

BLOCKS = 3
# The host works faster on few blocks, which its caches hold; so it is timed with more, where they are small.
_HOST_BLOCKS, _HOST_BYTES = 12, 2**31
_WORLD, _SHARD = 16, 8
_TOKENS = 4  # of a sample for which the host takes longer than what it launches
_WARM_UP, _ROUNDS = 4, (5, 60)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a block and its host take here.

    Attributes:
        device: The device's name.
        micro_batch: Samples of a pass.
        forward_rate: FLOP/s of its forward pass.
        backward_rate: FLOP/s of its backward pass.
        host: What the host takes for an operation, and for FSDP2's part of a pass.
        host_seconds: What the host takes for a forward and a backward pass of a sharded block.
        kept: Bytes that it keeps for its backward pass.
        predicted: The same as the planner has it.
        optimizer_rate: Bytes a second that a step of the optimizer moves.
        unit: The block, as the planner has it.
    """

    device: str
    micro_batch: int
    forward_rate: float
    backward_rate: float
    host: Host
    host_seconds: float
    kept: float
    predicted: float
    optimizer_rate: float
    unit: Unit

    @property
    def rate(self) -> float:
        """FLOP/s of both passes."""
        forward, backward = self.unit.forward_flops, self.unit.backward_flops
        return (forward + backward) / (forward / self.forward_rate + backward / self.backward_rate)

    def applied_to(self, cluster: Cluster, dtype: str) -> Cluster:
        """Returns hardware with what was measured in the place of assumptions."""
        node, accelerator = cluster.node, cluster.node.accelerator
        peak = max(accelerator.peak_in(dtype), self.rate)
        accelerator = replace(
            accelerator,
            peak_flops={**accelerator.peak_flops, dtype: peak},
            compute_efficiency=self.rate / peak,
            product_efficiency=0.0,
            optimizer_efficiency=min(1.0, self.optimizer_rate / accelerator.memory_bandwidth),
            source=self.host.source,
        )
        return replace(cluster, node=replace(node, accelerator=accelerator, host=self.host))


def calibrate(
    model: str | os.PathLike[str],
    training: Training,
    *,
    sequence_length: int | None = None,
    variant: Variant | None = None,
    micro_batch: int = 1,
    device_type: str = "cpu",
    seconds: float = 40.0,
    progress: Progress | None = None,
) -> Calibration:
    """Measures a block of a model on this process's device.

    Args:
        model: A name or path, as for :func:`~lightning_mics.trace.models.build_model`.
        training: Dtypes and the optimizer.
        sequence_length: Tokens of a sample.
        variant: What differs in its blocks; a loss in chunks is none of that. Frozen weights have their own bits here:
            kernels that unpack fewer are not those of whoever trains.
        micro_batch: Samples of a pass.
        device_type: ``"cpu"`` or ``"cuda"``.
        seconds: How long it may take, beside building the model.
        progress: Told the share that is done.

    Raises:
        MiCSConfigError: If the model has no stack of equal blocks, cannot be run, or has blocks that are frozen whole.
    """
    variant = replace(variant or Variant(), base_bits=None, double_quantization=False)
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    tell = progress or (lambda share: None)

    def build(layers: int) -> tuple[nn.Module, Any]:
        built, sample, _ = build_model(
            model, sequence_length=sequence_length, attention=variant.attention, device=device_type, layers=layers
        )
        apply_variant(built, variant, is_whole=False)
        return built, sample

    built, sample = build(BLOCKS)
    if sample is None:
        raise MiCSConfigError("The factory returned no sample, so nothing can be run. Return (model, sample).")
    dtype = None if training.param_dtype == "float32" else training.param_dtype
    unit = _typical(built, sample, dtype, device_type)
    if not unit.trainable_numel:
        raise MiCSConfigError(
            f"--freeze {' '.join(variant.frozen)} leaves nothing to train in {unit.name}, which would be measured. "
            "Calibrate without it, and plan with it and the file that this writes."
        )
    stack, step = _stack(built), next(steps(built, sample, None))
    many = min(_HOST_BLOCKS, int(_HOST_BYTES // (4 * unit.numel)))
    if many > BLOCKS:
        built, _ = build(many)
    one = _cut(built, stack, 1)
    few, longer = (_Pair(_cut(built, stack, number), one, stack) for number in (BLOCKS, max(BLOCKS, many)))
    cast = as_dtype(training.param_dtype)
    shares = iter((0.45, 0.65, 1.0))

    def take_turns(contenders: list[_Contender], batch: Any, blocks: int, share: float) -> _Times:
        times = _differences(contenders, batch, blocks, share * seconds)
        tell(next(shares))
        return times

    def plain(pair: _Pair) -> list[_Contender]:
        return [_Contender(copy.deepcopy(found).to(cast), step, device) for found in pair.models]

    large, small = _batch(sample, micro_batch, None, device), _batch(sample, 1, _TOKENS, device)
    contenders = plain(few)
    passes = take_turns(contenders, large, few.blocks, 0.4)
    kept = _kept(contenders, large) / few.blocks
    del contenders
    alone = take_turns(plain(longer), small, longer.blocks, 0.2)
    rate = _optimizer_rate(next(one.get_submodule(stack).children()), training, device)
    with fake_world(_WORLD):
        sharded = [_Contender(_shard(found, dtype, device_type), step, device) for found in longer.models]
        together = take_turns(sharded, small, longer.blocks, 0.3)
        del sharded
    launches = unit.forward_launches + BACKWARD * unit.backward_launches
    return Calibration(
        device=torch.cuda.get_device_name(device) if device_type == "cuda" else "CPU",
        micro_batch=micro_batch,
        forward_rate=micro_batch * unit.forward_flops / passes.forward,
        backward_rate=micro_batch * unit.backward_flops / passes.backward,
        host=Host(
            launch=alone.host / max(1.0, launches),
            unit=max(0.0, together.host - alone.host) / (2 + REDUCTION),
            name="calibrated",
            source=f"calibrated on {datetime.date.today().isoformat()} with {model}, torch {torch.__version__}",
        ),
        host_seconds=together.host,
        kept=kept,
        predicted=unit.saved.at(micro_batch),
        optimizer_rate=rate,
        unit=unit,
    )


# What is run.


def _typical(model: nn.Module, sample: Any, dtype: str | None, device_type: str) -> Unit:
    """Returns the block in the middle, as the planner sees it."""
    profile = profile_model(model, sample, param_dtype=dtype, device_type="cpu" if device_type == "cpu" else "cuda")
    return profile.blocks[len(profile.blocks) // 2]


def _stack(model: nn.Module) -> str:
    """Returns the name of the list of modules that holds the longest stack of units.

    Raises:
        MiCSConfigError: If there is none of two blocks or more.
    """
    members = max(Structure(model, MiCSConfig()).stacks, key=len, default=[])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and list(module.children()) == members and members[1:]:
            return name
    raise MiCSConfigError("The model has no stack of two equal blocks or more, so there is nothing to calibrate with.")


def _cut(model: nn.Module, stack: str, blocks: int) -> nn.Module:
    """Returns a copy with some of the blocks."""
    members: Any = model.get_submodule(stack)
    memo: dict[int, Any] = {id(member): None for member in members[blocks:]}
    cut = copy.deepcopy(model, memo)
    left: Any = cut.get_submodule(stack)
    del left[blocks:]
    return cut


class _Pair:
    """Two models that differ by some blocks of a stack."""

    def __init__(self, more: nn.Module, less: nn.Module, stack: str) -> None:
        self.models = (more, less)
        self.blocks = len(list(more.get_submodule(stack).children())) - len(list(less.get_submodule(stack).children()))


def _shard(model: nn.Module, dtype: str | None, device_type: str) -> nn.Module:
    config = MiCSConfig(shard_size=_SHARD, node_size=_SHARD, verify=False, param_dtype=dtype)
    mics_shard(model, config, device_type=device_type)
    return model


def _batch(sample: Any, samples: int, tokens: int | None, device: torch.device) -> Any:
    """Returns a batch with values like ``sample``: whole numbers are ones, sequences may be cut."""

    def fill(tensor: Tensor) -> Tensor:
        shape = [samples, *tensor.shape[1:]] if tensor.dim() else []
        if tokens is not None and tensor.dim() == 2 and not tensor.is_floating_point():
            shape[1] = min(tokens, shape[1])
        make = torch.randn if tensor.is_floating_point() else torch.ones
        return make(shape, dtype=tensor.dtype, device=device)

    return tree_map_only(Tensor, fill, dict(sample) if isinstance(sample, Mapping) else sample)


# Measuring.


@dataclass(frozen=True)
class _Times:
    """Seconds of a pass: of the device, and of the host for both passes."""

    forward: float
    backward: float
    host: float


class _Contender:
    """A model that runs passes."""

    def __init__(self, model: nn.Module, step: Loss, device: torch.device) -> None:
        self.model, self._step = model.train(), step
        self._synchronize = torch.get_device_module(device.type).synchronize
        # What others do on this machine does not count where the host computes.
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter

    def passes(self, batch: Any) -> _Times:
        """Runs both passes."""
        with defer_replication_sync(self.model) if hasattr(self.model, "set_requires_all_reduce") else _nothing():
            self._synchronize()
            begin, host = time.perf_counter(), self._clock()
            loss = self._step(self.model, batch)
            launched = self._clock() - host
            self._synchronize()
            middle, host = time.perf_counter(), self._clock()
            loss.backward()
            launched += self._clock() - host
            self._synchronize()
            end = time.perf_counter()
        return _Times(middle - begin, end - middle, launched)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _differences(contenders: list[_Contender], batch: Any, blocks: int, seconds: float) -> _Times:
    """Returns what a block adds: medians over rounds in which the two models take turns."""
    longer, shorter = contenders
    for _ in range(_WARM_UP):
        longer.passes(batch), shorter.passes(batch)
    gc.collect()
    gc.disable()
    rounds: list[tuple[_Times, _Times]] = []
    end = time.monotonic() + seconds
    while len(rounds) < _ROUNDS[0] or (len(rounds) < _ROUNDS[1] and time.monotonic() < end):
        rounds.append((longer.passes(batch), shorter.passes(batch)))
    gc.enable()

    def added(name: str) -> float:
        return max(1e-9, statistics.median(getattr(more, name) - getattr(less, name) for more, less in rounds) / blocks)

    return _Times(added("forward"), added("backward"), added("host"))


def _kept(contenders: list[_Contender], batch: Any) -> float:
    """Returns the bytes more that the first of two models keeps for its backward pass."""
    kept = []
    for contender in contenders:
        own = {param.untyped_storage().data_ptr() for param in contender.model.parameters()}
        found: dict[int, Tensor] = {}

        def keep(tensor: Tensor, own: set[int] = own, found: dict[int, Tensor] = found) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            contender._step(contender.model, batch)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in found.values()))
    return float(kept[0] - kept[1])


def _optimizer_rate(block: nn.Module, training: Training, device: torch.device) -> float:
    """Returns the bytes a second that a step on the float32 parameters of one block that are trained moves."""
    params = [nn.Parameter(param.detach().float()) for param in block.parameters() if param.requires_grad]
    for param in params:
        param.grad = torch.randn_like(param)
    kind: Any = training.optimizer
    optimizer = getattr(torch.optim, kind)(params) if isinstance(kind, str) else kind(params)
    synchronize = torch.get_device_module(device.type).synchronize
    seconds = []
    for _ in range(_WARM_UP + _ROUNDS[0]):
        synchronize()
        begin = time.perf_counter()
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    states = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    numel = sum(param.nbytes for param in params)
    return (numel + 2 * (numel + states)) / statistics.median(seconds[_WARM_UP:])
