"""From a DeepSpeed configuration to MiCS: what becomes of each of its fields.

Reads the JSON only; neither DeepSpeed nor ``torch.distributed`` is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning_mics.config import MiCSConfig
from lightning_mics.deepspeed.batch import read_batch, read_clipping
from lightning_mics.deepspeed.conversion import Call, Code, Conversion, Field
from lightning_mics.deepspeed.optimizers import read_optimizer
from lightning_mics.deepspeed.precision import Precision, read_precision, read_reduce_dtype
from lightning_mics.deepspeed.reader import Reader, load
from lightning_mics.deepspeed.remainder import account_for_the_rest
from lightning_mics.deepspeed.schedulers import read_scheduler
from lightning_mics.deepspeed.sharding import check_cluster, read_activations, read_offload, read_sharding

__all__ = ["Call", "Code", "Conversion", "Field", "convert_deepspeed"]


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
    batch = read_batch(reader, world_size)
    precision = read_precision(reader)
    settings = {**sharding, **read_reduce_dtype(reader), **read_offload(reader), **read_activations(reader)}
    schedule = read_scheduler(reader)
    optimizer = read_optimizer(reader, schedule)
    clip_norm = read_clipping(reader)
    hints = _default_hints(reader, precision, settings)
    account_for_the_rest(reader)
    return Conversion(
        config=MiCSConfig.from_dict(settings),
        source=name,
        gradient_accumulation_steps=batch.steps,
        micro_batch_size=batch.micro,
        global_batch_size=batch.total,
        world_size=batch.world,
        clip_norm=clip_norm,
        precision=precision.lightning,
        mixed_precision=precision.accelerate,
        grad_scaler=precision.scaler,
        optimizer=optimizer,
        scheduler=schedule.call,
        hints=tuple(hints),
        carried=reader.fields("carried"),
        changed=reader.fields("changed"),
        no_counterpart=reader.fields("no_counterpart"),
    )


def _default_hints(reader: Reader, precision: Precision, settings: Mapping[str, Any]) -> list[str]:
    hints = []
    if "gradient_clipping" not in reader:
        hints.append(
            "gradient_clipping is not in the file. Recent versions of DeepSpeed then clip at 1.0, older ones do not; "
            "here nothing is clipped unless you say so."
        )
    if precision.lightning in ("bf16-mixed", "bf16-true") and "reduce_dtype" not in settings:
        hints.append(
            "Gradients are reduced in float32. DeepSpeed reduces those of a bfloat16 model in bfloat16, with half the "
            "bytes; reduce_dtype='bfloat16' does that here."
        )
    if precision.is_open:
        hints.append("The precision is 'auto' in the file: set precision= or mixed_precision= in the script.")
    return hints
