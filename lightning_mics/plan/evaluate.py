"""What one candidate would need, take and send."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightning_mics.metrics import Hop, LinkShare, Traffic, partition_share, replication_share, slice_share
from lightning_mics.plan.cost import FREE, Cost, NetworkCosts
from lightning_mics.plan.hardware import Cluster, Host
from lightning_mics.plan.host import backward_seconds, forward_seconds, optimizer_seconds
from lightning_mics.plan.memory import MemoryBreakdown, gradient_bytes, predict_memory
from lightning_mics.plan.profile import DTYPE_BYTES, Again, ModelProfile, Unit
from lightning_mics.plan.settings import Candidate, Training
from lightning_mics.plan.simulate import Engine, StepTime, StepWork, UnitTimes, engine_of, simulate

# Share of the memory's bandwidth that operations reach which only read and write (assumption).
_MEMORY_EFFICIENCY = 0.85
# DDP's defaults: a small first bucket, so that communication begins early.
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = 2**20, 25 * 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A candidate, and what is predicted for it.

    Attributes:
        candidate: The settings.
        world_size: Number of ranks.
        memory: Bytes of a rank at the peak of a step, by part.
        memory_limit: Bytes that a rank has.
        time: Seconds of an optimizer step, by stream, with its events.
        traffic: Collectives and bytes of an optimizer step for each hop, of one node.
        samples_per_second: Of all ranks.
        model_flops: FLOP/s of a rank that train the model; without recomputation.
        hardware_flops: FLOP/s of a rank, with recomputation.
        mfu: ``model_flops`` in relation to the accelerator's peak.
    """

    candidate: Candidate
    world_size: int
    memory: MemoryBreakdown
    memory_limit: float
    time: StepTime = field(repr=False)
    traffic: Mapping[Hop, Traffic] = field(repr=False)
    samples_per_second: float
    model_flops: float
    hardware_flops: float
    mfu: float

    @property
    def fits(self) -> bool:
        """Whether a rank has the memory."""
        return self.memory.total <= self.memory_limit

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step."""
        return self.world_size * self.candidate.micro_batch * self.candidate.accumulation

    @property
    def inter_bytes(self) -> int:
        """Bytes that leave a node in an optimizer step."""
        return inter_bytes(self.traffic)

    @property
    def partition_inter_bytes(self) -> int:
        """Bytes of partition groups' collectives that leave a node in an optimizer step: those of every microstep."""
        return partition_inter_bytes(self.traffic)


def inter_bytes(traffic: Mapping[Hop, Traffic]) -> int:
    """Returns the bytes that leave a node."""
    return sum(hop.inter_bytes for hop in traffic.values())


def partition_inter_bytes(traffic: Mapping[Hop, Traffic]) -> int:
    """Returns the bytes of partition groups' collectives that leave a node."""
    return sum(traffic[hop].inter_bytes for hop in (Hop.PARTITION_GATHER, Hop.PARTITION_REDUCE))


def evaluate(
    profile: ModelProfile,
    cluster: Cluster,
    candidate: Candidate,
    training: Training,
    *,
    memory: MemoryBreakdown | None = None,
    memory_limit: float | None = None,
    engine: Engine | None = None,
) -> Plan:
    """Predicts memory, time and traffic of a candidate.

    Args:
        profile: The model.
        cluster: The hardware.
        candidate: The settings.
        training: Dtypes and the optimizer.
        memory: The memory, where it is known already.
        memory_limit: Bytes that a rank has; by default those of the accelerator.
        engine: How collectives overlap; by default what the scheme does on such devices.

    Raises:
        MiCSConfigError: If the shard size cannot work on the cluster.
    """
    accelerator = cluster.node.accelerator
    memory = memory or predict_memory(profile, candidate, training, accelerator)
    time = simulate(_Step(profile, cluster, candidate, training).work(memory, engine))
    samples = candidate.micro_batch * candidate.accumulation
    blocks = zip(profile.blocks, candidate.again(profile.blocks), strict=True)
    whole = [unit for unit, again in blocks if again in ("all", "offloaded") and unit.runs_backward]
    recomputed = sum(unit.forward_flops for unit in whole)
    model_flops = profile.flops * samples / time.seconds
    return Plan(
        candidate=candidate,
        world_size=cluster.world_size,
        memory=memory,
        memory_limit=accelerator.memory if memory_limit is None else memory_limit,
        time=time,
        traffic=predict_traffic(profile, cluster, candidate, training),
        samples_per_second=cluster.world_size * samples / time.seconds,
        model_flops=model_flops,
        hardware_flops=model_flops + recomputed * samples / time.seconds,
        mfu=model_flops / peak_flops(cluster, training),
    )


def peak_flops(cluster: Cluster, training: Training) -> float:
    """Returns the accelerator's peak rate in the dtype of the computation, in FLOP/s.

    Raises:
        MiCSConfigError: If it is not known.
    """
    return cluster.node.accelerator.peak_in(training.param_dtype)


class _Rates:
    """What passes of a unit take on a device that waits for nothing.

    Where the device's rates of products and of attention are known, those and the bytes that all else reads and writes
    add up; else floating-point operations alone count, and unpacking of quantized weights.
    """

    def __init__(self, profile: ModelProfile, cluster: Cluster, training: Training) -> None:
        device = cluster.node.accelerator
        self._peak, self._device = peak_flops(cluster, training), device
        self._adds_up = profile.source == "trace" and device.product_efficiency > 0
        self._traffic, self._dtype = device.memory_bandwidth * _MEMORY_EFFICIENCY, training.param_dtype

    def seconds(self, unit: Unit, samples: int) -> tuple[float, float, float]:
        """Returns the seconds of a forward pass, of a backward pass, and of all but products in a forward pass."""
        if not self._adds_up:
            rate = self._peak * self._device.compute_efficiency / samples
            unpacking = unit.unpacked_bytes(self._dtype) / self._traffic
            rest = 2 * unit.rest.at(samples) / self._device.memory_bandwidth + unpacking  # written and read
            backward = unit.backward_flops / rate + unpacking * (unit.backward_flops > 0)
            return unit.forward_flops / rate + unpacking, backward, rest
        products = self._peak * self._device.product_efficiency / samples
        attention = self._peak * (self._device.attention_efficiency or self._device.product_efficiency) / samples
        attended, rest = (unit.attention_flops - unit.masked_flops) / attention, unit.forward_traffic.at(samples)
        forward = (unit.forward_flops - unit.attention_flops) / products + attended
        backward = 0.0
        if unit.backward_flops:  # attention computes its scores again
            backward = (unit.backward_flops - 2 * unit.attention_flops) / products + 2.5 * attended
        rest, traffic = rest / self._traffic, unit.backward_traffic.at(samples) / self._traffic
        return forward + rest, backward + traffic, rest


class _Step:
    """Makes of a candidate what the simulation plays."""

    def __init__(self, profile: ModelProfile, cluster: Cluster, candidate: Candidate, training: Training) -> None:
        self._profile, self._candidate, self._training = profile, candidate, training
        self._cluster, self._accelerator = cluster, cluster.node.accelerator
        # On CPUs what computes is the host itself, whose time is part of the rate.
        self._host = Host() if self._accelerator.device_type == "cpu" else cluster.node.host
        self._layout = candidate.layout(cluster.topology)
        self._rates = _Rates(profile, cluster, training)
        self._costs = NetworkCosts(
            cluster,
            self._layout,
            candidate.hierarchical,
            candidate.optimizer_shard_size,
            _widening(candidate, training),
        )

    def work(self, memory: MemoryBreakdown, engine: Engine | None) -> StepWork:
        """Returns the work of a step."""
        candidate, layout, costs = self._candidate, self._layout, self._costs
        settles = not layout.spans_nodes and layout.num_replicas > 1
        engine = engine or engine_of(candidate.scheme, self._accelerator.device_type, settles=settles)
        times = functools.cache(lambda unit, again: self._unit_times(unit, again, engine.least_message))
        units = self._profile.blocks
        root, blocks = times(self._profile.root, None), list(map(times, units, candidate.again(units)))
        if candidate.scheme == "ddp":
            root, blocks = self._in_buckets(root, blocks)
        return StepWork(
            root=root,
            blocks=blocks,
            accumulation=candidate.accumulation,
            replicates_always=candidate.scheme == "mesh-2d",
            gathers_again=candidate.reshard_after_forward and candidate.scheme != "ddp",
            optimizer=self._optimizer_seconds(memory),
            optimizer_host=optimizer_seconds(self._host, self._profile),
            agreement=costs.agreement() if candidate.scheme == "mics" else 0.0,
            engine=engine,
        )

    def _unit_times(self, unit: Unit, again: Again, least_message: int | None) -> UnitTimes:
        candidate, training, accelerator = self._candidate, self._training, self._accelerator
        forward, backward, rest = self._rates.seconds(unit, candidate.micro_batch)
        backward += {"all": forward, "offloaded": forward, "selective": rest}.get(again or "", 0.0)
        if unit is not self._profile.root:
            forward, backward = forward / training.compile_gain, backward / training.compile_gain
        if again == "offloaded":  # copies run on the stream of the computation
            copying = unit.checkpoint.at(candidate.micro_batch) / accelerator.host_bandwidth
            forward, backward = forward + copying, backward + copying
        compiled = training.compile_gain != 1
        times = UnitTimes(
            name=unit.name,
            forward=forward,
            backward=backward,
            forward_host=forward_seconds(self._host, unit, candidate, compiled),
            backward_host=backward_seconds(self._host, unit, candidate, again, compiled),
            runs_backward=unit.runs_backward,
        )
        if candidate.scheme == "ddp":
            return times
        gathered = unit.gathered_bytes(candidate.shard_size, training.param_dtype)
        trainable = unit.reduced_numel(candidate.shard_size)
        reduced = trainable * DTYPE_BYTES[training.reduce_dtype]
        exchanged = trainable * _exchanged_width(candidate, training) / candidate.shard_size
        # Gathered messages are copied into parameters, gradients into the message of the reduction.
        return replace(
            times,
            unpack=accelerator.unit_overhead + 2 * gathered / accelerator.memory_bandwidth,
            backward=backward + (gathered + reduced) / accelerator.memory_bandwidth,
            gather=self._messages(unit, gathered, training.param_dtype, least_message),
            reduce=self._messages(unit, reduced, training.reduce_dtype, least_message),
            replicate=self._costs.replication(exchanged) if reduced else FREE,
            slices=self._costs.slices(_sliced_bytes(unit, candidate, training)),
        )

    def _messages(self, unit: Unit, message_bytes: int, dtype: str, least_message: int | None) -> Cost:
        """Returns the cost of the collectives of a unit's parameters: of one message, or of one for each of them."""
        if message_bytes == 0:
            return FREE
        if least_message is None:
            return self._costs.partition(message_bytes)
        large = [param for param in unit.params if param.numel >= least_message]
        return sum((self._costs.partition(param.numel * DTYPE_BYTES[param.cast(dtype)]) for param in large), FREE)

    def _in_buckets(self, root: UnitTimes, blocks: list[UnitTimes]) -> tuple[UnitTimes, list[UnitTimes]]:
        """Gives DDP's all-reduces to the units that complete its buckets in the backward pass, the last to the root."""
        waiting, least = 0, _FIRST_BUCKET_BYTES
        result = list(blocks)
        for index in reversed(range(len(blocks))):
            waiting += gradient_bytes(self._profile.blocks[index], self._training)
            if waiting >= least:
                result[index] = replace(blocks[index], replicate=self._costs.replication(waiting))
                waiting, least = 0, _BUCKET_BYTES
        rest = waiting + gradient_bytes(self._profile.root, self._training)
        return replace(root, replicate=self._costs.replication(rest) if rest else FREE), result

    def _optimizer_seconds(self, memory: MemoryBreakdown) -> float:
        """An optimizer is bound by memory: it reads gradients, and reads and writes parameters and states."""
        stepped = memory.gradients / self._candidate.slices
        moved = stepped + 2 * (stepped + memory.optimizer)  # frozen parameters stay
        return moved / (self._accelerator.memory_bandwidth * self._accelerator.optimizer_efficiency)


def predict_traffic(
    profile: ModelProfile, cluster: Cluster, candidate: Candidate, training: Training
) -> dict[Hop, Traffic]:
    """Returns the collectives of an optimizer step and the bytes that one node sends, as the ledger counts them."""
    layout = candidate.layout(cluster.topology)
    microsteps = candidate.accumulation
    trainable = [unit for unit in profile.units if unit.trainable_numel]
    size = layout.shard_size
    elements = sum(unit.reduced_numel(size) for unit in trainable)
    reduced, exchanged = elements * DTYPE_BYTES[training.reduce_dtype], elements * _exchanged_width(candidate, training)
    if candidate.scheme == "ddp":
        exchanged = sum(gradient_bytes(unit, training) for unit in trainable)
    replications = microsteps if candidate.scheme == "mesh-2d" else 1
    partition, optimizer_shard_size = partition_share(layout, candidate.hierarchical), size * candidate.slices
    replication = replication_share(layout, optimizer_shard_size, _widening(candidate, training))

    def traffic(calls: int, message_bytes: float, share: LinkShare) -> Traffic:
        return Traffic(calls, int(message_bytes), int(message_bytes * share.intra), int(message_bytes * share.inter))

    result = {hop: Traffic() for hop in Hop}
    if candidate.scheme != "ddp":
        again = [unit for unit in profile.blocks if candidate.reshard_after_forward and unit.runs_backward]
        gathers = [unit for unit in (*profile.units, *again) if unit.numel]
        gathered = microsteps * sum(unit.gathered_bytes(size, training.param_dtype) for unit in gathers)
        result[Hop.PARTITION_GATHER] = traffic(microsteps * len(gathers), gathered, partition)
        result[Hop.PARTITION_REDUCE] = traffic(microsteps * len(trainable), microsteps * reduced, partition)
    if layout.num_replicas > 1:
        message = replications * exchanged / layout.shard_size
        result[Hop.REPLICATION_REDUCE] = traffic(replications * len(trainable), message, replication)
    if candidate.slices > 1:
        message = sum(_sliced_bytes(unit, candidate, training) for unit in trainable)
        result[Hop.REPLICATION_GATHER] = traffic(len(trainable), message, slice_share(layout, optimizer_shard_size))
    return result


def _exchanged_width(candidate: Candidate, training: Training) -> int:
    """Returns the bytes of an element of what replicas exchange; other schemes have one dtype for both hops."""
    return training.exchanged_width if candidate.scheme == "mics" else DTYPE_BYTES[training.reduce_dtype]


def _widening(candidate: Candidate, training: Training) -> int:
    return training.widening if candidate.scheme == "mics" else 1


def _sliced_bytes(unit: Unit, candidate: Candidate, training: Training) -> int:
    """Returns the bytes of the message that brings the slices of a unit's shards together."""
    total, fetched = 0, training.param_dtype if candidate.has_owners else training.replication_gather_dtype
    for param in unit.params if candidate.slices > 1 else ():
        if param.trainable:
            rows, *rest = param.shard_shape(candidate.shard_size)
            width = DTYPE_BYTES[fetched or training.state_dtype or param.dtype]
            total += candidate.slices * -(-rows // candidate.slices) * math.prod(rest) * width
    return total
