"""Batch sizes, accumulation and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_mics.deepspeed.reader import Reader
from lightning_mics.deepspeed.tables import MICRO, STEPS, TOTAL
from lightning_mics.errors import MiCSConfigError


@dataclass(frozen=True)
class Batch:
    """Batch sizes, accumulation and number of ranks, as far as they are known."""

    total: int | None
    micro: int | None
    steps: int | None
    world: int | None


def read_batch(reader: Reader, world: int | None) -> Batch:
    """Reads the three batch settings, works out what is missing, and refuses what contradicts itself."""
    total, micro, steps = (reader.whole(key) for key in (TOTAL, MICRO, STEPS))
    if steps is None and STEPS not in reader and (total is None) != (micro is None):
        steps = 1  # DeepSpeed's choice, where one batch size alone is given
    if total is not None and micro is not None and steps is not None:
        world = _check_batch(total, micro, steps, world)
    elif total is not None and world is not None and micro is not None:
        steps = _divide(total, {MICRO: micro, "world_size": world})
    elif total is not None and world is not None and steps is not None:
        micro = _divide(total, {STEPS: steps, "world_size": world})
    elif micro is not None and world is not None and steps is not None:
        total = micro * steps * world
    batch = Batch(total, micro, steps, world)
    _note_batch(reader, batch)
    return batch


def _check_batch(total: int, micro: int, steps: int, world: int | None) -> int:
    parts = f"{MICRO}={micro} x {STEPS}={steps}"
    if world is not None:
        if total != micro * steps * world:
            raise MiCSConfigError(
                f"{TOTAL}={total} is not {parts} x world_size={world} = {micro * steps * world}. Set {TOTAL}="
                f"{micro * steps * world}, or leave one of the three out: it follows from the others."
            )
        return world
    if total % (micro * steps):
        raise MiCSConfigError(
            f"{TOTAL}={total} is not a multiple of {parts} = {micro * steps}, so that no number of ranks fits. Try "
            f"{TOTAL}={-(-total // (micro * steps)) * micro * steps}."
        )
    return total // (micro * steps)


def _divide(total: int, parts: Mapping[str, int]) -> int:
    product = 1
    for part in parts.values():
        product *= part
    if total % product:
        listed = " x ".join(f"{name}={value}" for name, value in parts.items())
        raise MiCSConfigError(
            f"{TOTAL}={total} is not a multiple of {listed} = {product}. Try {TOTAL}={-(-total // product) * product}."
        )
    return total // product


def _note_batch(reader: Reader, batch: Batch) -> None:
    for key in (TOTAL, MICRO, STEPS):
        if reader.is_auto(key):
            reader.left_to_script(key)
    if None not in (batch.micro, batch.steps, batch.world):
        arithmetic = f"{batch.micro} a rank x {batch.steps} microsteps x {batch.world} ranks"
    else:
        arithmetic = "micro batch x microsteps x ranks"
    if not reader.is_auto(TOTAL):
        reader.carried(TOTAL, f"The global batch: {arithmetic}. It has no setting of its own.")
    if not reader.is_auto(MICRO):
        reader.carried(MICRO, f"DataLoader(batch_size={batch.micro}) in the script.")
    if not reader.is_auto(STEPS):
        reader.carried(
            STEPS,
            f"accumulate_grad_batches={batch.steps} of the Trainer, gradient_accumulation_steps={batch.steps} of "
            "Accelerate.",
        )


def read_clipping(reader: Reader) -> float | None:
    """Reads the norm at which gradients are clipped."""
    key = "gradient_clipping"
    norm = reader.number(key)
    if reader.is_auto(key):
        reader.left_to_script(key)
    elif norm:
        reader.carried(key, f"gradient_clip_val={norm} of the Trainer, clip_grad_norm_(..., {norm}) of Accelerate.")
    else:
        reader.carried(key, "No clipping.")
    return norm or None
