"""How a global batch is divided over ranks and microsteps."""

from __future__ import annotations

from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import check_positive_int, divisors

# Larger micro-batches than this are not tried: they gain nothing where they fit.
_LARGEST_MICRO_BATCH = 256
DEFAULT_ACCUMULATION = 4


def divide_batch(
    world_size: int, global_batch: int | None, micro_batch: int | None, accumulation: int | None
) -> list[tuple[int, int]]:
    """Returns the pairs of micro-batch and accumulation that make a global batch.

    Args:
        world_size: Number of ranks.
        global_batch: Samples of an optimizer step, of all ranks.
        micro_batch: Samples of a rank in a microstep.
        accumulation: Microsteps of an optimizer step.

    Returns:
        One pair, or several where ``global_batch`` leaves a choice. Without any of them: micro-batches of one sample,
        accumulated over four microsteps.

    Raises:
        MiCSConfigError: If the numbers contradict each other, with the arithmetic.
    """
    given = {"global_batch": global_batch, "micro_batch": micro_batch, "accumulation": accumulation}
    for name, value in given.items():
        if value is not None:
            check_positive_int(name, value, 8)
    if global_batch is None:
        return [(micro_batch or 1, accumulation or DEFAULT_ACCUMULATION)]
    if micro_batch is not None and accumulation is not None:
        _check_product(world_size, global_batch, micro_batch, accumulation)
        return [(micro_batch, accumulation)]
    factor, name = (micro_batch, "micro_batch") if micro_batch is not None else (accumulation or 1, "accumulation")
    assert factor is not None
    if global_batch % (world_size * factor):
        _refuse_remainder(world_size, global_batch, factor, name)
    rest = global_batch // world_size // factor
    if micro_batch is not None:
        return [(micro_batch, rest)]
    if accumulation is not None:
        return [(rest, accumulation)]
    return [(size, rest // size) for size in divisors(rest) if size <= _LARGEST_MICRO_BATCH]


def _check_product(world_size: int, global_batch: int, micro_batch: int, accumulation: int) -> None:
    product = world_size * micro_batch * accumulation
    if product != global_batch:
        raise MiCSConfigError(
            f"global_batch={global_batch} contradicts the others: {world_size} ranks x micro_batch={micro_batch} x "
            f"accumulation={accumulation} = {product}. Set global_batch={product}, or leave one of the three out."
        )


def _refuse_remainder(world_size: int, global_batch: int, factor: int, name: str) -> None:
    step = world_size * factor
    below, above = global_batch // step * step, -(-global_batch // step) * step
    works = " or ".join(f"global_batch={value}" for value in (below, above) if value)
    times = "" if factor == 1 else f" x {name}={factor}"
    product = f"{world_size} ranks" if factor == 1 else f"{world_size} ranks{times} = {step}"
    raise MiCSConfigError(
        f"global_batch={global_batch} cannot be divided evenly: {product}, and "
        f"{global_batch} / {step} = {global_batch / step:.2f}. Try {works}."
    )
