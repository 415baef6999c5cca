"""Lightning's names of precisions as what the planner needs of them."""

from __future__ import annotations

import difflib

from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.settings import Training

# Dtype of the gathered parameters, and of the shards where it is not the model's own.
_PRECISIONS: dict[str, tuple[str, str | None]] = {
    "32-true": ("float32", None),
    "bf16-mixed": ("bfloat16", None),
    "16-mixed": ("float16", None),
    "bf16-true": ("bfloat16", "bfloat16"),
}
_OTHER_NAMES = {"32": "32-true", "fp32": "32-true", "no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def training_for(precision: str, optimizer: str) -> Training:
    """Returns the dtypes of a precision.

    Raises:
        MiCSConfigError: If the precision or the optimizer is unknown; suggests the nearest known name.
    """
    from lightning_mics.trace.optimizers import optimizer_footprint

    name = _OTHER_NAMES.get(str(precision), str(precision))
    if name not in _PRECISIONS:
        near = difflib.get_close_matches(name, [*_PRECISIONS, *_OTHER_NAMES], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise MiCSConfigError(f"precision={precision!r} is unknown.{hint} Values that work: {', '.join(_PRECISIONS)}.")
    optimizer_footprint(optimizer, (), foreach=False)
    param_dtype, state_dtype = _PRECISIONS[name]
    return Training(param_dtype=param_dtype, optimizer=optimizer, state_dtype=state_dtype)
