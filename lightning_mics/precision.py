"""The one table of precisions and dtypes, by every name they go by. Nothing here needs PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import did_you_mean

# Every name of a floating-point dtype that settings may use, by PyTorch's own.
DTYPE_NAMES: dict[str, tuple[str, ...]] = {
    "float32": ("fp32", "32"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "16"),
    "float64": (),
}


@dataclass(frozen=True)
class Precision:
    """A way to compute, under Lightning's name.

    Attributes:
        name: Lightning's name.
        accelerate: Accelerate's ``mixed_precision``; ``None`` where it has no such mode.
        param_dtype: Dtype in which parameters are gathered and computed with.
        state_dtype: Dtype of the parameters' shards where it is not the model's own.
        reduce_dtype: Dtype of gradient reduction where nothing else is asked for.
        aliases: Other names.
    """

    name: str
    accelerate: str | None
    param_dtype: str
    state_dtype: str | None = None
    reduce_dtype: str = "float32"
    aliases: tuple[str, ...] = ()

    @property
    def is_mixed(self) -> bool:
        """Whether parameters are gathered in another dtype than that of their shards."""
        return self.name.endswith("-mixed")


PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("32-true", "no", "float32", aliases=("32", "fp32", "no")),
        Precision("bf16-mixed", "bf16", "bfloat16", aliases=("bf16",)),
        Precision("bf16-true", None, "bfloat16", "bfloat16"),
        Precision("16-mixed", "fp16", "float16", aliases=("fp16",)),
        Precision("64-true", None, "float64", "float64", "float64", aliases=("64",)),
    )
}
# Accelerate's names, as its launch files and arguments take them.
ACCELERATE_PRECISIONS: dict[str, Precision] = {
    precision.accelerate: precision for precision in PRECISIONS.values() if precision.accelerate is not None
}
_ALIASES = {alias: precision for precision in PRECISIONS.values() for alias in precision.aliases}


def supported_precision(name: str) -> Precision:
    """Returns a precision by Lightning's name.

    Raises:
        MiCSConfigError: If MiCS cannot shard it.
    """
    if name not in PRECISIONS:
        raise MiCSConfigError(
            f"precision={name!r} is not supported by MiCS. Values that work: {', '.join(PRECISIONS)}.",
            setting="precision",
        )
    return PRECISIONS[name]


def find_precision(name: str) -> Precision:
    """Returns a precision by any of its names.

    Raises:
        MiCSConfigError: If it is unknown; suggests the nearest known name.
    """
    found = PRECISIONS.get(name) or _ALIASES.get(name)
    if found is None:
        hint = did_you_mean(name, [*PRECISIONS, *_ALIASES])
        names = sorted(PRECISIONS, key=lambda known: PRECISIONS[known].state_dtype is not None)  # the usual ones first
        words = [f"precision={name!r} is unknown.", hint, f"Values that work: {', '.join(names)}."]
        raise MiCSConfigError(" ".join(filter(None, words)), setting="precision")
    return found
