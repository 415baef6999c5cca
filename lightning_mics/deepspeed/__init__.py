"""From a DeepSpeed configuration to MiCS: what becomes of each of its fields.

Reads the JSON only; neither DeepSpeed nor ``torch.distributed`` is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning_mics.config import MiCSConfig
from lightning_mics.deepspeed.conversion import Conversion, Field, Optimizer
from lightning_mics.deepspeed.reader import Reader, load
from lightning_mics.deepspeed.script import read_batch, read_clipping, read_optimizer, read_precision, read_scheduler
from lightning_mics.deepspeed.sharding import (
    check_cluster,
    read_activations,
    read_offload,
    read_reduce_dtype,
    read_sharding,
)

__all__ = ["Conversion", "Field", "Optimizer", "convert_deepspeed"]


def convert_deepspeed(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    world_size: int | None = None,
    node_size: int | None = None,
) -> Conversion:
    """Reads a DeepSpeed configuration.

    Args:
        source: Path of the JSON file, or its content as a mapping.
        world_size: Number of ranks, if known. Batch sizes and the shard size are then checked against it.
        node_size: Number of ranks on a node, if known.

    Raises:
        MiCSConfigError: If the file cannot be read, a value in it cannot be meant, or its numbers contradict each
            other.
    """
    tree, name = load(source)
    check_cluster(world_size, node_size)
    reader = Reader(tree)
    sharding = read_sharding(reader, world_size, node_size)
    settings = {**sharding, **read_reduce_dtype(reader), **read_offload(reader), **read_activations(reader)}
    batch = read_batch(reader, world_size)
    precision = read_precision(reader)
    scheduled_rate = read_scheduler(reader)
    return Conversion(
        config=MiCSConfig.from_dict(settings),
        source=name,
        **batch,
        clip_norm=read_clipping(reader),
        precision=precision,
        optimizer=read_optimizer(reader, scheduled_rate),
        hints=tuple(_default_hints(reader, precision, settings)),
        report=reader.report(),
    )


def _default_hints(reader: Reader, precision: str | None, settings: Mapping[str, Any]) -> list[str]:
    hints = []
    if "gradient_clipping" not in reader:
        hints.append(
            "gradient_clipping is not in the file. Recent versions of DeepSpeed then clip at 1.0, older ones do not; "
            "here nothing is clipped unless you say so."
        )
    if precision in ("bf16-mixed", "bf16-true") and "reduce_dtype" not in settings:
        hints.append(
            "Gradients are reduced in float32. DeepSpeed reduces those of a bfloat16 model in bfloat16, with half the "
            "bytes; reduce_dtype='bfloat16' does that here."
        )
    if precision is None and any(
        reader.is_auto(f"{name}.enabled") for name in ("bf16", "fp16", "amp", "torch_autocast")
    ):
        hints.append("The precision is 'auto' in the file: set precision= or mixed_precision= in the script.")
    return hints
