"""``shard_size="auto"``: the smallest partition whose ranks have enough memory, predicted before anything is sharded.

Nothing is measured or tried out. The model's figures come from a pass on fake tensors, the states from the optimizer's
class, the memory from the device. Ranks exchange what they predict and decide alike: by the rank that needs most, and
by the one that has least. After the first optimizer steps the prediction is compared with what training takes, once.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_mics.config import MiCSConfig
from lightning_mics.core._torch import tree_leaves, tree_map_only
from lightning_mics.core.gradients.window import AccumulationWindow, WindowObserver
from lightning_mics.core.log import inform
from lightning_mics.core.mesh import communication_device, require_agreement
from lightning_mics.core.resources import Usage, bytes_on, device_memory, free_host_memory
from lightning_mics.errors import MiCSConfigError
from lightning_mics.metrics import format_bytes
from lightning_mics.plan.hardware import Accelerator, Cluster, Link, Node
from lightning_mics.plan.memory import MemoryBreakdown, predict_memory
from lightning_mics.plan.profile import ModelProfile, Param
from lightning_mics.plan.search import UNKNOWN_ACTIVATIONS, Choices, Misfit, Planning, explain_misfit, usable_memory
from lightning_mics.plan.settings import Candidate, Training
from lightning_mics.topology import ClusterTopology
from lightning_mics.trace import LeakedTensorsError, call_model, profile_model
from lightning_mics.trace.optimizers import OptimizerFootprint, optimizer_footprint

# Resident memory of a process also moves for reasons of its own: imports, buffers of libraries.
_NOISE = {"cpu": 2**28}
_MALLOC_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
_FETCH_SECONDS = 60
_MORE, _LESS, _TIGHT = 0.10, 0.25, 0.95


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a rank computes with in a microstep.

    Attributes:
        batch: A batch of one sample or more, as the model's step takes it.
        micro_batch: Number of samples in a microstep.
        through_forward: Whether it is for the model's ``forward``, also where the model has a ``training_step``.
    """

    batch: Any = field(repr=False)
    micro_batch: int
    through_forward: bool = False

    @classmethod
    def of(cls, batch: Any, *, through_forward: bool = False) -> Sample:
        """Takes a whole micro-batch; how many samples it has is the first dimension of its first tensor."""
        leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
        sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        return cls(batch=batch, micro_batch=max(1, *sizes[:1], 1), through_forward=through_forward)


def sample_of(loader: object) -> Sample | None:
    """Returns the first sample of a training DataLoader, with its batch size.

    A worker process fetches it: a dataset may open files, or draw numbers, when it is first asked, and that must not
    happen here. ``None`` where the sample cannot be had like this: of datasets without indices, or if anything goes
    wrong.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    try:
        with random_states_kept():
            if loader.batch_sampler is None:
                return Sample.of(_fetch(loader, batch_size=None))
            micro_batch = getattr(loader.batch_sampler, "batch_size", None)
            if not isinstance(micro_batch, int) or micro_batch < 1:
                return None
            return Sample(batch=_fetch(loader, batch_size=1), micro_batch=micro_batch)
    except Exception as error:
        # What a worker raises is part of a cycle that holds the loader, and with it the worker.
        traceback.clear_frames(error.__traceback__)
        return None


def _fetch(loader: DataLoader[Any], batch_size: int | None) -> Any:
    """Returns what the loader makes of the first index of its dataset, from a worker of its own kind."""
    first: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=[0],
        num_workers=1,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=_FETCH_SECONDS,
    )
    batches = iter(first)
    try:
        return tree_map_only(Tensor, Tensor.clone, next(batches))
    finally:
        del batches  # ends the worker


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restores the states of Python's, NumPy's and PyTorch's generators."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# --- The decision -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """What was decided, and why.

    Attributes:
        shard_size: The partition size.
        memory: What a rank is predicted to need, by part.
        memory_limit: What it has, in bytes.
        totals: The predicted bytes of all partition sizes that work on the cluster.
        notes: What was assumed.
        knows_activations: Whether activations are part of the prediction.
        num_optimizers: Number of optimizers.
    """

    shard_size: int
    memory: MemoryBreakdown
    memory_limit: int
    totals: Mapping[int, float]
    notes: Sequence[str] = ()
    knows_activations: bool = True
    num_optimizers: int = 1

    def __str__(self) -> str:
        needed, limit = format_bytes(self.memory.total), format_bytes(self.memory_limit)
        text = f"shard_size='auto' chose {self.shard_size}: a rank needs {needed} of {limit} ({_parts(self.memory)})"
        smaller = [size for size in self.totals if size < self.shard_size]
        if smaller:
            text += f"; shard_size={smaller[-1]} would need {format_bytes(self.totals[smaller[-1]])}"
        return " ".join([text + ".", *self.notes])


def _parts(memory: MemoryBreakdown) -> str:
    parts = {name.replace("_", " "): size for name, size in memory.parts().items() if size >= memory.total / 100}
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())


@dataclass(frozen=True, kw_only=True)
class _View:
    """What one rank knows.

    ``share`` divides ``memory`` among the ranks of a machine; ``own`` is what the rank's model takes of it already.
    """

    host: str
    memory: int
    share: bool
    own: int
    needs: Mapping[int, MemoryBreakdown]
    knows_activations: bool
    problem: str = ""


def choose_shard_size(
    model: nn.Module,
    config: MiCSConfig,
    topology: ClusterTopology,
    *,
    device_type: str,
    optimizers: Sequence[Optimizer | type[Optimizer] | str] = (),
    sample: Any = None,
) -> AutoChoice:
    """Returns the smallest partition size that fits. Collective over the world; the answer is the same on every rank.

    Args:
        model: The model, not sharded; its parameters may be on the meta device.
        config: The settings, with ``shard_size="auto"``, the same on every rank but for ``memory_limit``.
        topology: The cluster.
        device_type: ``"cuda"`` or ``"cpu"``.
        optimizers: Its optimizers, or the class or name of one; AdamW is assumed if none is known.
        sample: A micro-batch, or a :class:`Sample`.

    Raises:
        MiCSConfigError: On every rank, if no size fits: with the closest one and what would make it fit.
    """
    forecast = _Forecast(model, config, topology, device_type, optimizers, sample)
    views = _exchange(forecast.view())
    limit = _least_memory(views)
    needs = {size: max((view.needs[size] for view in views), key=lambda m: m.total) for size in views[0].needs}
    knows_activations = all(view.knows_activations for view in views)
    usable = int(usable_memory(limit, knows_activations=knows_activations))
    fitting = [size for size, memory in needs.items() if memory.total <= usable]
    require_agreement("what shard_size='auto' decides", (fitting[:1], limit))
    if not fitting:
        raise MiCSConfigError(forecast.explain(needs, usable))
    return AutoChoice(
        shard_size=fitting[0],
        memory=needs[fitting[0]],
        memory_limit=limit,
        totals={size: memory.total for size, memory in needs.items()},
        notes=tuple(forecast.notes),
        knows_activations=knows_activations,
        num_optimizers=max(1, len(optimizers)),
    )


def _exchange(view: _View) -> list[_View]:
    views: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(views, view)
    for other in views:
        if other.problem:
            raise MiCSConfigError(f"shard_size='auto' cannot plan this model: {other.problem} Give a number instead.")
    return views


def _least_memory(views: Sequence[_View]) -> int:
    ranks_on = Counter(view.host for view in views)
    return min(view.memory // ranks_on[view.host] + view.own if view.share else view.memory for view in views)


class _Forecast:
    """What one rank predicts for its model."""

    def __init__(
        self,
        model: nn.Module,
        config: MiCSConfig,
        topology: ClusterTopology,
        device_type: str,
        optimizers: Sequence[Optimizer | type[Optimizer] | str],
        sample: Any,
    ) -> None:
        self.notes: list[str] = []
        self._model, self._config, self._topology = model, config, topology
        self._device_type, self._asked = device_type, list(optimizers)
        self._optimizers = [optimizer for optimizer in self._asked if isinstance(optimizer, Optimizer)]
        self._given = sample
        self._sample: Sample | None = None
        self._micro_batch = 1
        self._knows_activations = True
        self._cluster = _cluster(topology, device_type)

    def view(self) -> _View:
        """Returns what the other ranks must hear."""
        needs: Mapping[int, MemoryBreakdown] = {}
        problem = ""
        limit, share, own = 0, False, 0
        try:
            limit, share, own = self._resources()
            self._take_sample()
            self._profile = self._make_profile()
            self._training = self._make_training()
            needs = {size: self._memory(self._candidate(size)) for size in self._sizes()}
        except Exception as error:  # the others wait for this rank
            problem = f"{type(error).__name__}: {error}"
        return _View(
            host=socket.gethostname(),
            memory=int(limit),
            share=share,
            own=own,
            needs=needs,
            knows_activations=self._knows_activations,
            problem=problem,
        )

    def _resources(self) -> tuple[int, bool, int]:
        """Returns the memory, whether it is the machine's, and what the model takes of it already."""
        own = bytes_on(self._model, self._device_type)
        others = 0
        if self._device_type != "cpu":
            allocated = torch.get_device_module(self._device_type).memory_allocated()
            others = max(0, allocated - own)  # other models of this process, for example
        if self._config.memory_limit is not None:
            return int(self._config.memory_limit) - others, False, own
        if self._device_type == "cpu":
            return free_host_memory(), True, own
        return device_memory(communication_device(self._device_type)) - others, False, own

    def _take_sample(self) -> None:
        given = self._given
        self._sample = given if given is None or isinstance(given, Sample) else Sample.of(given)
        self._micro_batch = 1 if self._sample is None else self._sample.micro_batch

    def _sizes(self) -> list[int]:
        staged = self._config.hierarchical is True
        return [p for p in self._topology.valid_shard_sizes() if not staged or p > self._topology.node_size]

    def _candidate(self, shard_size: int) -> Candidate:
        return Candidate(
            shard_size=shard_size,
            micro_batch=self._micro_batch,
            activation_checkpointing=self._config.activation_checkpointing,
            reshard_after_forward=self._config.reshard_after_forward,
        )

    # The model.

    def _make_profile(self) -> ModelProfile:
        traced = self._trace() if self._sample is not None else None
        if traced is not None:
            return traced
        tokens = _longest_sequence(self._model)
        profile = self._profile_model(None, sequence_length=tokens)
        self._knows_activations = profile.knows_activations
        if profile.knows_activations:
            self.notes.append(
                f"Activations follow a formula, for micro-batches of {self._micro_batch} with {tokens} tokens each; a "
                "sample would tell more."
            )
        else:
            self.notes.append(
                f"Without a sample nothing is known of activations: {UNKNOWN_ACTIVATIONS:.0%} of the memory is kept "
                "free for them."
            )
        return profile

    def _trace(self) -> ModelProfile | None:
        assert self._sample is not None
        failure = ""
        for batch, loss in _attempts(self._sample):
            try:
                profile = self._profile_model(batch, loss=loss)
            except LeakedTensorsError:
                raise
            except Exception as error:
                failure = failure or f"{type(error).__name__}: {error}"
            else:
                self.notes.append(f"Activations are those of micro-batches of {self._micro_batch}.")
                return profile
        self.notes.append(f"The model cannot be traced with its sample ({' '.join(failure.split())[:200]}).")
        return None

    def _profile_model(self, batch: Any, **options: Any) -> ModelProfile:
        return profile_model(
            self._model,
            batch,
            wrap=self._config.wrap,
            param_dtype=None if self._config.param_dtype is None else _name(self._config.param_dtype),
            device_type="cpu" if self._device_type == "cpu" else "cuda",
            **options,
        )

    # The optimizer.

    def _make_training(self) -> Training:
        param_dtype = _name(self._config.param_dtype or self._profile.compute_dtype)
        training = Training(param_dtype=param_dtype, reduce_dtype=_name(self._config.reduce_dtype or param_dtype))
        if not self._asked:
            self.notes.append("AdamW is assumed: no optimizer is known.")
            return training
        for optimizer in self._optimizers:
            if any(footprint.is_estimate for footprint, _ in self._footprints(optimizer, 1)):
                self.notes.append(
                    f"The states of {type(optimizer).__name__} are unknown: two float32 numbers an element are assumed."
                )
        # Its temporaries count, too; those of several optimizers are not there at the same time.
        first: Any = self._asked[0]
        return replace(training, optimizer=first)

    def _footprints(self, optimizer: Optimizer, shard_size: int) -> Iterator[tuple[OptimizerFootprint, int]]:
        """Yields what an optimizer needs for a shard, and how many such shards it has."""
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        for (shape, dtype), count in Counter((tuple(param.shape), _name(param.dtype)) for param in params).items():
            shard = Param(shape=Param(shape=shape).shard_shape(shard_size), dtype=dtype)
            yield optimizer_footprint(optimizer, (shard,), foreach=self._device_type != "cpu"), count

    def _memory(self, candidate: Candidate) -> MemoryBreakdown:
        memory = predict_memory(self._profile, candidate, self._training, self._cluster.node.accelerator)
        if self._optimizers:
            found = itertools.chain(*(self._footprints(entry, candidate.shard_size) for entry in self._optimizers))
            memory = replace(memory, optimizer=float(sum(count * footprint.state_bytes for footprint, count in found)))
        return memory

    # Where nothing fits.

    def explain(self, needs: Mapping[int, MemoryBreakdown], limit: int) -> str:
        """Returns why nothing fits, and what would help."""
        misfits = [
            Misfit(candidate=self._candidate(size), memory=memory, memory_limit=limit) for size, memory in needs.items()
        ]
        planning = Planning(
            profile=self._profile,
            cluster=self._cluster,
            training=self._training,
            choices=Choices(batches=[(self._micro_batch, 1)], memory_limit=limit),
            plans=[],
            misfits=sorted(misfits, key=lambda misfit: misfit.memory.total),
        )
        return " ".join(["shard_size='auto':", explain_misfit(planning), *self.notes])


def _cluster(topology: ClusterTopology, device_type: str) -> Cluster:
    """Returns the hardware; its speeds do not count here."""
    link = Link(bandwidth=1.0, efficiency=1.0, latency=0.0)
    accelerator = Accelerator(
        name="device",
        memory=1,
        peak_flops={"float32": 1.0},
        memory_bandwidth=1.0,
        compute_efficiency=1.0,
        device_type="cpu" if device_type == "cpu" else "cuda",
    )
    node = Node(name="node", accelerator=accelerator, num_accelerators=topology.node_size, intra=link, inter=link)
    return Cluster(node=node, num_nodes=topology.num_nodes)


def _attempts(sample: Sample) -> Iterator[tuple[Any, Any]]:
    """Yields a batch, and how to get a loss from it: ``None`` for a step's own."""
    batch = sample.batch
    yield batch, _loss_of_outputs if sample.through_forward else None
    if isinstance(batch, list | tuple) and len(batch) > 1:
        # Inputs and targets, of which forward takes the first.
        yield batch[0], _loss_of_outputs


def _loss_of_outputs(model: nn.Module, batch: Any) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(call_model(model, batch)) if isinstance(leaf, Tensor)]
    return torch.stack([leaf.float().mean() for leaf in leaves if leaf.requires_grad]).sum()


def _longest_sequence(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(config, name, None)
        if isinstance(length, int):
            return length
    return None


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


# --- The comparison ---------------------------------------------------------------------------------------------------


class MemoryCheck(WindowObserver):
    """Compares the prediction with what training takes, once, and says on rank 0 how they compare.

    Optimizers create their states in their first step, so the window after it is the first one that has them all.

    Args:
        choice: The decision.
        usage: What measures; made before the model is sharded.
    """

    def __init__(self, choice: AutoChoice, usage: Usage) -> None:
        self._choice, self._usage = choice, usage
        self._windows_left = 1 + choice.num_optimizers

    def begin(self) -> None:
        """Begins to watch; what sharding takes for a while does not count."""
        self._usage.restart_peak()

    def after_window(self, window: AccumulationWindow) -> bool:
        """Returns whether the comparison is done. Collective over the world when it is."""
        self._windows_left -= 1
        if self._windows_left > 0:
            self._usage.restart_peak()  # loading a checkpoint is not what training takes
            return False
        peak = self._usage.peak()
        most = torch.tensor(-1 if peak is None else peak, device=self._usage.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        text = compare(self._choice, int(most), self._usage.device.type) if int(most) >= 0 else ""
        if text:
            inform(text)
        return True


def compare(choice: AutoChoice, measured: int, device_type: str) -> str:
    """Says how a prediction compares with what was measured, and what to do where it was wrong.

    Args:
        choice: The decision.
        measured: Bytes of the rank that took most.
        device_type: Where.

    Returns:
        The message; empty where there is too little memory in it to tell.
    """
    # What the device's context and fragments take is not measured.
    predicted, noise = choice.memory.total - choice.memory.reserve, _NOISE.get(device_type, 0)
    if max(predicted, measured) < 2 * noise:
        return ""
    text = f"shard_size='auto' predicted {format_bytes(predicted)} a rank, measured {format_bytes(measured)}"
    is_tight = measured + choice.memory.reserve > _TIGHT * choice.memory_limit
    if not choice.knows_activations:
        text += ", which has activations in it"
        return f"{text}. {_when_more(choice, True, device_type)}" if is_tight else f"{text}."
    if measured - predicted > _MORE * predicted + noise:
        return f"{text}: more than expected. {_when_more(choice, is_tight, device_type)}"
    if predicted - measured > _LESS * predicted + noise:
        return f"{text}: less than expected. {_when_less(choice, measured / predicted)}"
    return f"{text}."


def _when_more(choice: AutoChoice, is_tight: bool, device_type: str) -> str:
    if device_type == "cpu" and _MALLOC_VARIABLE not in os.environ:
        return f"glibc keeps memory that tensors gave back; {_MALLOC_VARIABLE}=131072 in the environment prevents that."
    steps = ["Pass a sample as large as those that are trained with"]
    larger = [size for size in choice.totals if size > choice.shard_size]
    if is_tight:
        steps += [f"use shard_size={larger[0]}"] if larger else []
        return f"{', or '.join(steps)}: it hardly fits into {format_bytes(choice.memory_limit)}."
    return f"{steps[0]}; it fits into {format_bytes(choice.memory_limit)} all the same."


def _when_less(choice: AutoChoice, ratio: float) -> str:
    for size, total in choice.totals.items():
        if size < choice.shard_size and total * ratio <= choice.memory_limit:
            return f"shard_size={size} would probably fit, with {format_bytes(total * ratio)}, and communicate less."
    return "No smaller partition would fit either."
