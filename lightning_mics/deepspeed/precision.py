"""Dtypes: precision, loss scaling, reduction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_mics.config import as_dtype
from lightning_mics.deepspeed.reader import Reader
from lightning_mics.deepspeed.tables import AUTO, COMM, GRAD_ACCUM
from lightning_mics.errors import MiCSConfigError


@dataclass(frozen=True)
class Precision:
    """The names of a precision in Lightning and in Accelerate, and the loss scaler's arguments."""

    lightning: str | None = None
    accelerate: str | None = None
    scaler: Mapping[str, float] = field(default_factory=dict)
    is_open: bool = False


def read_precision(reader: Reader) -> Precision:
    """Reads which of the four sections about precision is on."""
    bf16 = "bf16" if reader.under("bf16") else "bfloat16"
    switches = {name: reader.switch(f"{name}.enabled") for name in (bf16, "fp16", "torch_autocast", "amp")}
    chosen = [name for name, on in switches.items() if on]
    if {bf16, "fp16"} <= set(chosen):
        raise MiCSConfigError(f"{bf16}.enabled and fp16.enabled are both true. Set one of them to false.")
    precision = _precision_of(reader, chosen[0]) if chosen else Precision()
    for name in switches:
        if reader.is_auto(f"{name}.enabled"):
            reader.left_to_script(f"{name}.enabled")
        elif chosen[:1] == [name]:
            reader.changed(f"{name}.enabled", _precision_note(precision))
        elif switches[name]:
            reader.changed(f"{name}.enabled", f"Superseded by {chosen[0]}, which is on as well.")
        else:
            reader.changed(f"{name}.enabled", f"Off; {chosen[0]} decides." if chosen else "Off: no setting.")
    if chosen[:1] == ["fp16"]:
        _note_loss_scale(reader, precision)
    is_open = not chosen and any(reader.is_auto(f"{name}.enabled") for name in switches)
    return dataclasses.replace(precision, is_open=is_open)


def _precision_of(reader: Reader, name: str) -> Precision:
    if name in ("bf16", "bfloat16"):
        if reader.switch(f"{name}.bf16_master_weights_and_grads"):
            reader.changed(f"{name}.bf16_master_weights_and_grads", "precision='bf16-true': no float32 copy is kept.")
            return Precision("bf16-true", "no")
        return Precision("bf16-mixed", "bf16")
    if name == "torch_autocast":
        dtype = reader.value("torch_autocast.dtype", "bfloat16")
        if as_dtype(dtype, "torch_autocast.dtype") == torch.bfloat16:
            reader.changed("torch_autocast.dtype", "precision='bf16-mixed', mixed_precision='bf16'")
            return Precision("bf16-mixed", "bf16")
        reader.changed("torch_autocast.dtype", "precision='16-mixed', mixed_precision='fp16'")
        return Precision("16-mixed", "fp16")
    scaler = _read_loss_scale(reader) if name == "fp16" else {}
    return Precision("16-mixed", "fp16", scaler)


def _precision_note(precision: Precision) -> str:
    if precision.lightning == "bf16-true":
        return (
            "precision='bf16-true' of the Trainer; for Accelerate load the model in bfloat16, with mixed_precision off."
        )
    dtype = "bfloat16" if precision.accelerate == "bf16" else "float16"
    return (
        f"precision={precision.lightning!r} of the Trainer, mixed_precision={precision.accelerate!r} of Accelerate; in "
        f"a bare loop param_dtype='{dtype}'. Shards stay in float32, as DeepSpeed's master weights, and are gathered "
        "in 16 bits."
    )


# What the scaler has where the file says nothing: DeepSpeed's defaults. PyTorch's are 65536 and 2000.
_SCALE_POWER, _SCALE_WINDOW = 16, 1000
_NEVER = 1_000_000_000


def _read_loss_scale(reader: Reader) -> dict[str, float]:
    static = reader.number("fp16.loss_scale")
    if static:
        return {"init_scale": static, "growth_interval": _NEVER}
    power = reader.whole("fp16.initial_scale_power", least=0, example=_SCALE_POWER)
    window = reader.whole("fp16.loss_scale_window", example=_SCALE_WINDOW)
    scale = float(2 ** (_SCALE_POWER if power is None else power))
    return {"init_scale": scale, "growth_interval": _SCALE_WINDOW if window is None else window}


def _note_loss_scale(reader: Reader, precision: Precision) -> None:
    scale, interval = precision.scaler["init_scale"], int(precision.scaler["growth_interval"])
    if interval == _NEVER:
        reader.changed(
            "fp16.loss_scale",
            f"GradScaler(init_scale={scale}, growth_interval={_NEVER}): a scale that never grows. It still halves when "
            "gradients overflow.",
        )
        reader.changed("fp16.initial_scale_power", "Not used with a fixed loss_scale, as in DeepSpeed.")
        reader.changed("fp16.loss_scale_window", "Not used with a fixed loss_scale, as in DeepSpeed.")
        return
    reader.changed("fp16.loss_scale", "Dynamic, by PyTorch's GradScaler, shared by all ranks.")
    for key, name in (("initial_scale_power", "init_scale"), ("loss_scale_window", "growth_interval")):
        if reader.is_auto(f"fp16.{key}"):
            reader.left_to_script(f"fp16.{key}")
        else:
            reader.carried(f"fp16.{key}", f"GradScaler({name}={precision.scaler[name]})")


def read_reduce_dtype(reader: Reader) -> dict[str, Any]:
    """One setting here says what two say there: the dtype of reduction, and of accumulation over microsteps."""
    given = {key: reader.value(key) for key in (COMM, GRAD_ACCUM) if reader.value(key) not in (None, AUTO)}
    dtypes = {key: as_dtype(str(value).lower(), key) for key, value in given.items()}
    for key in (COMM, GRAD_ACCUM):
        if key not in given:
            reader.changed(key, "reduce_dtype='float32', the default.")
    if not dtypes:
        return {}
    # The wider of the two loses nothing.
    chosen = max(dtypes.values(), key=lambda dtype: torch.finfo(dtype).bits if dtype else 0)
    name = str(chosen).removeprefix("torch.")
    for key, dtype in dtypes.items():
        if dtype == chosen:
            reader.carried(key, f"reduce_dtype={name!r}")
        else:
            reader.changed(key, f"reduce_dtype={name!r}: one setting for both hops and the accumulation, so the wider.")
    return {"reduce_dtype": name}
