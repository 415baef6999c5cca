"""What is asked of the planner, and what it may vary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_mics.plan.profile import DTYPE_BYTES, Unit
from lightning_mics.precision import PRECISIONS, find_precision
from lightning_mics.topology import ClusterTopology, GroupLayout

Scheme = Literal["mics", "full-sharding", "mesh-2d", "ddp"]
SCHEME_NAMES: dict[Scheme, str] = {
    "mics": "MiCS",
    "full-sharding": "full sharding (ZeRO-3)",
    "mesh-2d": "2-D mesh, all-reduce every microstep",
    "ddp": "DDP",
}
_SHORT_NAMES: dict[Scheme, str] = {**SCHEME_NAMES, "full-sharding": "full sharding", "mesh-2d": "2-D mesh"}


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
        master_weights: ``"owners"`` keeps shards in ``param_dtype``, and float32 beside sliced optimizer states.
    """

    param_dtype: str = "bfloat16"
    reduce_dtype: str = "float32"
    optimizer: object = "AdamW"
    state_dtype: str | None = None
    replication_reduce_dtype: str | None = None
    replication_gather_dtype: str | None = None
    master_weights: str = "partition"

    @property
    def exchanged_width(self) -> int:
        """Bytes of an element of what replicas exchange in hop two."""
        return DTYPE_BYTES[self.replication_reduce_dtype or self.reduce_dtype]

    @property
    def fetched_dtype(self) -> str | None:
        """Dtype in which slices come together after a step; ``None`` for that of the shards."""
        return self.param_dtype if self.master_weights == "owners" else self.replication_gather_dtype

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
        activation_checkpointing: Whether blocks are computed again in the backward pass.
        reshard_after_forward: Whether blocks are freed between forward and backward.
        optimizer_shard_size: Ranks that divide optimizer states; ``None`` for those of a partition.
    """

    scheme: Scheme = "mics"
    shard_size: int
    hierarchical: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    activation_checkpointing: bool = False
    reshard_after_forward: bool = True
    optimizer_shard_size: int | None = None

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

    def recomputes(self, unit: Unit) -> bool:
        """Returns whether a unit is computed again in the backward pass."""
        return self.activation_checkpointing and unit.can_checkpoint

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
