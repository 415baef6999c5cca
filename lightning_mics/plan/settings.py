"""What is asked of the planner, and what it may vary."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.profile import DTYPE_BYTES, Again, Unit
from lightning_mics.precision import PRECISIONS, find_precision
from lightning_mics.topology import ClusterTopology, GroupLayout, Recomputation, check_positive_int

MasterWeights = Literal["partition", "owners"]
Scheme = Literal["mics", "full-sharding", "mesh-2d", "ddp"]
SCHEME_NAMES: dict[Scheme, str] = {
    "mics": "MiCS",
    "full-sharding": "full sharding (ZeRO-3)",
    "mesh-2d": "2-D mesh, all-reduce every microstep",
    "ddp": "DDP",
}
_SHORT_NAMES: dict[Scheme, str] = {**SCHEME_NAMES, "full-sharding": "full sharding", "mesh-2d": "2-D mesh"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs from a model as its configuration has it.

    Attributes:
        loss_chunks: Pieces in which a micro-batch's logits are computed, turned into gradients and let go, as fused
            cross-entropy does it; ``None`` for all at once.
        lora_rank: Rank of low-rank adapters, beside which everything else is frozen; ``None`` for none.
        lora_targets: Which layers get adapters, by the last part of their name or a pattern; by default all linear
            ones but the head.
        frozen: Patterns of parameters' names that are not trained.
        base_bits: Bits of the weights of linear layers that are not trained, 4 (NF4) or 8, as bitsandbytes keeps them;
            the head has its own. ``None`` for the model's own dtype.
        double_quantization: Whether the scales of a base of 4 bits are quantized, too.
        attention: Name of the attention in transformers, for example ``"eager"``; ``None`` for its default.

    Raises:
        MiCSConfigError: If a number is none that works, targets are named without a rank, or a base of few bits would
            be trained.
    """

    loss_chunks: int | None = None
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    base_bits: int | None = None
    double_quantization: bool = False
    attention: str | None = None

    def __post_init__(self) -> None:
        for name, example in (("loss_chunks", 8), ("lora_rank", 16)):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name), example)
        if self.lora_targets and self.lora_rank is None:
            raise MiCSConfigError("lora_targets names layers for adapters of no rank. Add lora_rank=16.")
        self._check_base()

    def _check_base(self) -> None:
        if self.base_bits not in (None, 4, 8):
            raise MiCSConfigError(f"base_bits={self.base_bits!r} is not one of None, 4, 8.")
        if self.base_bits is not None and self.lora_rank is None and not self.frozen:
            raise MiCSConfigError(
                f"base_bits={self.base_bits} is for weights that are not trained, and all are. Add lora_rank=16 for "
                "adapters beside them, or leave base_bits out."
            )
        if self.double_quantization and self.base_bits != 4:
            raise MiCSConfigError(
                f"double_quantization is for the scales of a base of 4 bits, and base_bits={self.base_bits}. Set "
                "base_bits=4, or leave it out."
            )

    @property
    def words(self) -> list[str]:
        """What to say of it."""
        words = [f"LoRA of rank {self.lora_rank}"] * (self.lora_rank is not None)
        words += [f"frozen {', '.join(self.frozen)}"] * bool(self.frozen)
        scales = " (scales quantized, too)" * self.double_quantization
        words += [f"a base of {self.base_bits} bits{scales}"] * (self.base_bits is not None)
        words += [f"loss in {self.loss_chunks} chunks"] * (self.loss_chunks is not None)
        return words + [f"{self.attention} attention"] * (self.attention is not None)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What stays the same in all candidates.

    Attributes:
        param_dtype: Dtype in which parameters are gathered and computed with, for example ``"bfloat16"``.
        reduce_dtype: Dtype of gradient reduction.
        optimizer: Name of a class in ``torch.optim``, a class, or an instance.
        state_dtype: Dtype of the shards of parameters, and of their gradients; ``None`` keeps the parameters' own.
        replication_reduce_dtype: Dtype in which replicas exchange gradients; ``None`` for ``reduce_dtype``.
        replication_gather_dtype: Dtype in which slices come together after a step; ``None`` for that of the shards.
        variant: What differs from the model as its configuration has it.
        compile_gain: How many times as fast blocks compute because they are compiled; stated, not predicted.
        holds_outputs: Whether the loop holds the model's outputs until those of the next microstep, as
            ``outputs = model(...)`` does; ``model(...).loss`` does not.
    """

    param_dtype: str = "bfloat16"
    reduce_dtype: str = "float32"
    optimizer: object = "AdamW"
    state_dtype: str | None = None
    replication_reduce_dtype: str | None = None
    replication_gather_dtype: str | None = None
    variant: Variant = field(default_factory=Variant)
    compile_gain: float = 1.0
    holds_outputs: bool = True

    @property
    def exchanged_width(self) -> int:
        """Bytes of an element of what replicas exchange in hop two."""
        return DTYPE_BYTES[self.replication_reduce_dtype or self.reduce_dtype]

    @property
    def has_masters(self) -> bool:
        """Whether it computes in 16 bits with parameters in float32, which may be elsewhere than their shards."""
        return DTYPE_BYTES[self.param_dtype] == 2 and self.state_dtype is None

    @property
    def widening(self) -> int:
        """Bytes of a sum in hop two for each byte of what it is made of."""
        summed = DTYPE_BYTES[self.reduce_dtype]
        return 1 if self.replication_reduce_dtype is None else max(summed, 4) // self.exchanged_width

    @classmethod
    def in_precision(cls, precision: str, optimizer: object) -> Training:
        """Returns the dtypes of a precision, by any of its names.

        Raises:
            MiCSConfigError: If it is unknown; suggests the nearest known name.
        """
        found = find_precision(str(precision))
        return cls(
            param_dtype=found.param_dtype,
            reduce_dtype=found.reduce_dtype,
            optimizer=optimizer,
            state_dtype=found.state_dtype,
        )

    @property
    def precision(self) -> str:
        """Lightning's name of these dtypes; that of ``param_dtype`` where there is none."""
        for known in PRECISIONS.values():
            if (known.param_dtype, known.state_dtype) == (self.param_dtype, self.state_dtype):
                return known.name
        return self.param_dtype


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train.

    Attributes:
        scheme: ``"mics"``, or a way to compare with.
        shard_size: Ranks that a replica is sharded over; 1 for DDP, all for full sharding.
        hierarchical: Whether collectives of a partition that spans nodes run in two stages.
        micro_batch: Samples of a rank in a microstep.
        accumulation: Microsteps of an optimizer step.
        activation_checkpointing: Which blocks are computed again in the backward pass: ``False`` for none, ``True`` for
            all, a number for every so-many-th; or ``"selective"`` for all but their matrix products and attention.
        activation_checkpointing_offload: Whether what blocks that are computed again keep is in host memory.
        reshard_after_forward: Whether blocks are freed between forward and backward.
        optimizer_shard_size: Ranks that divide optimizer states; ``None`` for those of a partition.
        master_weights: ``"owners"`` keeps shards in ``param_dtype``, and float32 beside sliced optimizer states.
    """

    scheme: Scheme = "mics"
    shard_size: int
    hierarchical: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    activation_checkpointing: Recomputation = False
    activation_checkpointing_offload: bool = False
    reshard_after_forward: bool = True
    optimizer_shard_size: int | None = None
    master_weights: MasterWeights = "partition"

    def __post_init__(self) -> None:
        assert self.scheme != "ddp" or self.shard_size == 1, "DDP does not shard"

    def layout(self, topology: ClusterTopology) -> GroupLayout:
        """Returns its groups.

        Raises:
            MiCSConfigError: If the shard size cannot work on the cluster.
        """
        return topology.layout(self.shard_size)

    @property
    def slices(self) -> int:
        """Number of slices into which the optimizer states of a shard are divided."""
        return (self.optimizer_shard_size or self.shard_size) // self.shard_size

    @property
    def has_owners(self) -> bool:
        """Whether float32 values of parameters are with those who step on them alone."""
        return self.master_weights == "owners" and self.slices > 1

    def again(self, blocks: Sequence[Unit]) -> list[Again]:
        """Returns for each block what of it is computed again in the backward pass, alone or in one around it."""
        how, number = self.activation_checkpointing, itertools.count()
        around: Again = None

        def of(block: Unit) -> Again:
            if not how or not block.can_checkpoint:
                return None
            if isinstance(how, str):
                return how
            if next(number) % how:
                return None
            return "offloaded" if self.activation_checkpointing_offload else "all"

        result = []
        for block in blocks:
            around = around if block.is_inside else of(block)
            result.append(around)
        return result

    @property
    def recomputation(self) -> str:
        """What of blocks is computed again, for example ``"every 2nd"``; empty for nothing."""
        how = self.activation_checkpointing
        if not how or isinstance(how, str):
            return how or ""
        return "all" if how == 1 else f"1 of {how}"

    @property
    def label(self) -> str:
        """What to call it in tables, for example ``"MiCS p=8"``."""
        if self.scheme != "mics":
            return SCHEME_NAMES[self.scheme]
        own = f" q={self.optimizer_shard_size}" if self.slices > 1 else ""
        return f"MiCS p={self.shard_size}{own}" + (" two-stage" if self.hierarchical else "")

    @property
    def short_label(self) -> str:
        """What to call it where there is little room, for example ``"2-D mesh"``."""
        return self.label if self.scheme == "mics" else _SHORT_NAMES[self.scheme]
