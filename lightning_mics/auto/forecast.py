"""What a rank of each partition size is predicted to need."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_mics.auto.activations import profile_with
from lightning_mics.auto.sample import Sample
from lightning_mics.config import MiCSConfig
from lightning_mics.core.apply import units_of
from lightning_mics.core.recompute import planned_recomputation
from lightning_mics.plan.evaluate import inter_bytes, predict_traffic
from lightning_mics.plan.hardware import Accelerator, Cluster, Link, Node
from lightning_mics.plan.memory import MemoryBreakdown, predict_memory
from lightning_mics.plan.profile import Param
from lightning_mics.plan.search import Choices, Misfit, Planning, by_modesty, explain_misfit
from lightning_mics.plan.settings import Candidate, MasterWeights, Training
from lightning_mics.text import format_bytes
from lightning_mics.topology import ClusterTopology, OptimizerShardSize
from lightning_mics.trace.optimizers import OptimizerFootprint, optimizer_footprint
from lightning_mics.trace.structure import dtype_name


class Forecast:
    """What one rank predicts for its model.

    Args:
        model: The model, not sharded.
        config: The settings.
        topology: The cluster.
        device_type: ``"cuda"`` or ``"cpu"``.
        optimizers: The optimizers, or the class or name of one.
        sample: What a rank computes with in a microstep, if that is known.

    Attributes:
        notes: What was assumed.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MiCSConfig,
        topology: ClusterTopology,
        device_type: str,
        optimizers: Sequence[Optimizer | type[Optimizer] | str],
        sample: Sample | None,
    ) -> None:
        self._config, self._device_type = config, device_type
        self._cluster = _cluster(topology, device_type)
        self._micro_batch = 1 if sample is None else sample.micro_batch
        self._profile, self.notes = profile_with(model, sample, config, device_type)
        recomputation = planned_recomputation(model, units_of(model, config), config)
        if recomputation is None:
            self.notes.append(
                "Nothing is taken to be recomputed: plans know blocks, and activation_checkpointing= chooses others."
            )
        self._recomputation = recomputation or False
        self._optimizers = [optimizer for optimizer in optimizers if isinstance(optimizer, Optimizer)]
        self._training = self._make_training(optimizers)

    @property
    def knows_activations(self) -> bool:
        """Whether activations are part of it."""
        return self._profile.knows_activations

    def needs(self) -> dict[int, MemoryBreakdown]:
        """Returns what a rank needs by partition size, for all sizes that work."""
        topology, is_staged = self._cluster.topology, self._config.hierarchical is True
        sizes = [size for size in topology.valid_shard_sizes() if not is_staged or size > topology.node_size]
        divided = self._config.optimizer_shard_size
        if not isinstance(divided, str):
            sizes = [size for size in sizes if divided % size == 0]
        return {size: self._memory(self._candidate(size)) for size in sizes}

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

    def advice(self, shard_size: int, limit: int) -> str | None:
        """Says which smaller partition would fit if all ranks divided optimizer states; ``None`` if that wins nothing.

        The rule is that of ``mics plan`` among plans of which none is known to be faster.
        """
        topology = self._cluster.topology
        if self._config.optimizer_shard_size != "partition":
            return None
        smaller = [size for size in topology.valid_shard_sizes() if size < shard_size]
        masters: MasterWeights = "owners" if self._training.has_masters else "partition"
        ways = {way: self._memory(way) for way in (self._candidate(size, "world", masters) for size in smaller)}
        ways = {way: memory for way, memory in ways.items() if memory.total <= limit}
        chosen = self._candidate(shard_size)
        ways[chosen] = self._memory(chosen)
        traffic = {way: predict_traffic(self._profile, self._cluster, way, self._training) for way in ways}
        best = min(ways, key=lambda way: by_modesty(way, traffic[way], ways[way]))
        sent, before = inter_bytes(traffic[best]), inter_bytes(traffic[chosen])
        if sent >= before:
            return None
        owners = " and master_weights='owners'" * best.has_owners
        return (
            f"With optimizer_shard_size='world'{owners} shard_size={best.shard_size} would do: a rank needs "
            f"{format_bytes(ways[best].total)}, and nodes send {sent / before:.0%} as much out of themselves."
        )

    def _candidate(
        self,
        shard_size: int,
        optimizer_shard_size: OptimizerShardSize | None = None,
        master_weights: MasterWeights | None = None,
    ) -> Candidate:
        layout = self._cluster.topology.layout(shard_size)
        divided = layout.resolve_optimizer_shard_size(optimizer_shard_size or self._config.optimizer_shard_size)
        return Candidate(
            shard_size=shard_size,
            optimizer_shard_size=divided if divided > shard_size else None,
            master_weights=master_weights or self._config.master_weights,
            micro_batch=self._micro_batch,
            activation_checkpointing=self._recomputation,
            activation_checkpointing_offload=self._config.activation_checkpointing_offload,
            reshard_after_forward=self._config.reshard_after_forward,
        )

    def _make_training(self, asked: Sequence[Any]) -> Training:
        param_dtype = dtype_name(self._config.param_dtype or self._profile.compute_dtype)
        training = Training(
            param_dtype=param_dtype,
            reduce_dtype=dtype_name(self._config.reduce_dtype or param_dtype),
        )
        if not asked:
            self.notes.append("AdamW is assumed: no optimizer is known.")
            return training
        for optimizer in self._optimizers:
            if any(footprint.is_estimate for footprint, _ in self._footprints(optimizer, Candidate(shard_size=1))):
                self.notes.append(
                    f"The states of {type(optimizer).__name__} are unknown: two float32 numbers an element are assumed."
                )
        # Its temporaries count, too; those of several optimizers are not there at the same time.
        return replace(training, optimizer=asked[0])

    def _footprints(self, optimizer: Optimizer, candidate: Candidate) -> Iterator[tuple[OptimizerFootprint, int]]:
        """Yields what an optimizer needs for a slice of a shard, and how many such slices it has."""
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        for (shape, dtype), count in Counter((tuple(param.shape), dtype_name(param.dtype)) for param in params).items():
            shard = Param(shape=Param(shape=shape).shard_shape(candidate.shard_size), dtype=dtype)
            stepped = replace(shard, shape=shard.shard_shape(candidate.slices))
            yield optimizer_footprint(optimizer, (stepped,), foreach=self._device_type != "cpu"), count

    def _memory(self, candidate: Candidate) -> MemoryBreakdown:
        memory = predict_memory(self._profile, candidate, self._training, self._cluster.node.accelerator)
        if self._optimizers:
            found = itertools.chain(*(self._footprints(entry, candidate) for entry in self._optimizers))
            states = float(sum(count * footprint.state_bytes for footprint, count in found))
            memory = replace(memory, optimizer=states)
        return memory


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
