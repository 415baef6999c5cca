"""What the planner knows of a model: its units in the order of a forward pass, and what each of them costs.

A profile comes from a trace (:func:`lightning_mics.trace.profile_model`) or from a formula. It is all that
planning needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

# Tokens of a sample by default, at most, where a model could take more.
DEFAULT_LENGTH = 8192
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "int8": 1}
# What of a block is computed again in the backward pass; selective: all but matrix products and attention.
Again = Literal["all", "selective", "offloaded"] | None


@dataclass(frozen=True, kw_only=True)
class Param:
    """A parameter.

    Attributes:
        shape: Its whole shape.
        dtype: Its own dtype, for example ``"float32"``.
        trainable: Whether it gets a gradient.
        packed: Weights in an element: two in a byte of a weight of 4 bits, none in what goes with such a weight.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    trainable: bool = True
    packed: int = 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def weights(self) -> int:
        """Number of weights in its elements."""
        return self.numel * self.packed

    @property
    def is_quantized(self) -> bool:
        """Whether it is of integers, a part of a quantized weight: no precision casts it."""
        return "int" in self.dtype

    def cast(self, dtype: str) -> str:
        """Returns its dtype where a precision has ``dtype``."""
        return self.dtype if self.is_quantized else dtype

    def shard_shape(self, shard_size: int) -> tuple[int, ...]:
        """Returns the largest shard's shape: FSDP2 divides the first dimension, rounding up."""
        return (-(-self.shape[0] // shard_size), *self.shape[1:])

    def shard_numel(self, shard_size: int) -> int:
        """Returns the elements of the largest shard."""
        return math.prod(self.shard_shape(shard_size))


def quantized_params(shape: tuple[int, int], bits: int, double_quantization: bool) -> tuple[Param, ...]:
    """Returns what ``bitsandbytes`` keeps of a frozen weight of 4 or 8 bits, the values first, scales as whole numbers.

    4 bits (NF4): two weights a byte, a float32 scale for each block of 64 and the 16 values: 4.5 bits a weight. Double
    quantization has 8 bits a scale, a float32 scale for each block of 256 of these, their 256 values and their mean:
    4.127 bits (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3). 8 bits: a byte a
    weight, and a float32 scale for each row (Dettmers et al., "LLM.int8()", 2022).

    Args:
        shape: Rows (outputs) and columns of the weight.
        bits: 4 or 8.
        double_quantization: Whether scales of 4 bits are quantized, too.
    """
    numel = math.prod(shape)

    def scales(count: int, dtype: str = "int32") -> Param:
        return Param(shape=(count,), dtype=dtype, trainable=False, packed=0)

    if bits == 8:
        return Param(shape=shape, dtype="int8", trainable=False), scales(shape[0])
    blocks = -(-numel // 64)
    values = Param(shape=(-(-numel // 2), 1), dtype="uint8", trainable=False, packed=2)
    if not double_quantization:
        return values, scales(blocks), scales(16)
    return values, scales(blocks, "uint8"), scales(16), scales(-(-blocks // 256)), scales(256), scales(1)


@dataclass(frozen=True, kw_only=True)
class Amount:
    """Bytes that grow with the samples of a microstep.

    Attributes:
        fixed: Bytes whatever the number of samples.
        per_sample: Bytes of each sample.
    """

    fixed: float = 0.0
    per_sample: float = 0.0

    def at(self, samples: int) -> float:
        """Returns the bytes of a microstep."""
        return self.fixed + self.per_sample * samples

    def __add__(self, other: Amount) -> Amount:
        return Amount(fixed=self.fixed + other.fixed, per_sample=self.per_sample + other.per_sample)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """An FSDP unit: parameters that are gathered together, and the compute between their gather and their release.

    Attributes:
        name: Name in the model.
        params: Its parameters, without those of units inside of it.
        forward_flops: Floating-point operations of a sample's forward pass.
        backward_flops: The same of its backward pass, without recomputation.
        saved: What its forward pass keeps for the backward pass, without parameters.
        checkpoint: What it keeps with activation checkpointing: its inputs.
        products: What its matrix products and attention return: kept beside its inputs where the rest is recomputed.
        rest: What of ``saved`` is none of these.
        outputs: What it returns and the backward pass does not need; of the root, what a loop may hold.
        early_numel: Elements whose gradients are there before the backward passes of blocks begin, as those of a head;
            ``None`` for all.
        forward_extra: Most that is allocated during its forward pass beyond what is kept in the end.
        checkpoint_extra: The same where it is computed again.
        backward_extra: Most that is allocated during its backward pass beyond what was kept; without gradients of
            parameters.
        can_checkpoint: Whether activation checkpointing applies to it.
        is_inside: Whether it lies inside a block to which that applies, and is computed again when that one is: the
            last one before it that is inside of none.
        forward_traffic: What operations of its forward pass read and write that are no products of matrices.
        backward_traffic: The same of its backward pass, without recomputation.
        attention_flops: Of ``forward_flops``, those of attention in one piece; twice as many in the backward pass.
        masked_flops: Of ``attention_flops``, those that kernels leave out, because attention is causal.
        forward_launches: Operations that the host launches for its forward pass, whatever the number of samples.
        backward_launches: The same of its backward pass, without recomputation.
    """

    name: str
    params: tuple[Param, ...]
    forward_flops: float
    backward_flops: float
    saved: Amount = field(default_factory=Amount)
    checkpoint: Amount = field(default_factory=Amount)
    products: Amount = field(default_factory=Amount)
    rest: Amount = field(default_factory=Amount)
    outputs: Amount = field(default_factory=Amount)
    early_numel: int | None = None
    forward_extra: Amount = field(default_factory=Amount)
    checkpoint_extra: Amount = field(default_factory=Amount)
    backward_extra: Amount = field(default_factory=Amount)
    can_checkpoint: bool = True
    is_inside: bool = False
    forward_traffic: Amount = field(default_factory=Amount)
    backward_traffic: Amount = field(default_factory=Amount)
    attention_flops: float = 0.0
    masked_flops: float = 0.0
    forward_launches: int = 0
    backward_launches: int = 0

    @property
    def runs_backward(self) -> bool:
        """Whether the backward pass comes here: not where it and all before it are frozen."""
        return self.backward_flops > 0 or self.trainable_numel > 0

    @property
    def fuses_backward(self) -> bool:
        """Whether its gradients are made in its forward pass, as a fused loss does it."""
        return self.backward_flops == 0 < self.forward_flops and self.trainable_numel > 0

    def kept(self, again: Again) -> Amount:
        """Returns what is there from its forward pass to its backward pass."""
        if again is None:
            return self.saved
        return {"all": self.checkpoint, "offloaded": Amount()}.get(again, self.checkpoint + self.products)

    def recomputed(self, again: Again) -> Amount:
        """Returns what computing it again allocates and lets go."""
        if again is None:
            return Amount()
        return {"all": self.saved, "offloaded": self.saved + self.checkpoint}.get(again, self.rest)

    @cached_property
    def numel(self) -> int:
        """Number of weights of all parameters."""
        return sum(param.weights for param in self.params)

    @cached_property
    def trainable_numel(self) -> int:
        """Number of elements that get gradients."""
        return sum(param.numel for param in self.params if param.trainable)

    def gathered_bytes(self, shard_size: int, dtype: str) -> int:
        """Returns the bytes of a gathered message: as many shards as ranks, all as large as the largest.

        Weights travel in ``dtype``, parts of quantized ones as they are stored.
        """
        known, key = self._messages, (shard_size, dtype)
        if key not in known:
            sizes = (param.shard_numel(shard_size) * DTYPE_BYTES[param.cast(dtype)] for param in self.params)
            known[key] = shard_size * sum(sizes)
        return known[key]

    def reduced_numel(self, shard_size: int) -> int:
        """Returns the elements of a message of gradients, which has shards as large as the largest, too."""
        known, key = self._messages, (shard_size, None)
        if key not in known:
            known[key] = shard_size * sum(param.shard_numel(shard_size) for param in self.params if param.trainable)
        return known[key]

    @cached_property
    def _messages(self) -> dict[tuple[int, str | None], int]:
        return {}

    def unpacked_bytes(self, dtype: str) -> int:
        """Returns what is read and written where its quantized weights are made ones of a dtype."""
        width, quantized = DTYPE_BYTES[dtype], (param for param in self.params if param.is_quantized)
        return sum(param.numel * DTYPE_BYTES[param.dtype] + param.weights * width for param in quantized)

    def __hash__(self) -> int:
        """A few numbers tell units apart; a search asks for it thousands of times."""
        return hash((self.numel, self.forward_flops, self.backward_flops))


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """A model, as the planner sees it.

    Attributes:
        name: What to call it.
        root: What is outside of all blocks: embeddings, head, loss. Gathered first, and until the end of the backward
            pass.
        blocks: The other units in the order of the forward pass. Equal units are one object, repeated.
        sequence_length: Tokens of a sample; ``None`` where samples are not sequences.
        buffer_bytes: Memory of the buffers, which every rank holds whole.
        compute_dtype: Dtype in which the trace computed, for example ``"bfloat16"``.
        source: Where the figures are from: ``"trace"``, ``"formula"`` or ``"shapes only"``, without activations.
        active_numel: Parameters that a token meets, where there are experts; ``None`` for all.
    """

    name: str
    root: Unit
    blocks: tuple[Unit, ...]
    sequence_length: int | None = None
    buffer_bytes: int = 0
    compute_dtype: str = "float32"
    source: str = "trace"
    active_numel: int | None = None

    @property
    def units(self) -> Iterator[Unit]:
        """All units, the root first."""
        yield self.root
        yield from self.blocks

    @property
    def knows_activations(self) -> bool:
        """Whether activations are part of the figures."""
        return self.source != "shapes only"

    @cached_property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(unit.numel for unit in self.units)

    @cached_property
    def trainable_numel(self) -> int:
        """Number of parameters that get gradients."""
        return sum(unit.trainable_numel for unit in self.units)

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of a sample's forward and backward pass, without recomputation."""
        return sum(unit.forward_flops + unit.backward_flops for unit in self.units)
