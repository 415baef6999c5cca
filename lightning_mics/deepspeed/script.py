"""What belongs into the training script: batch sizes, clipping, precision, optimizer and scheduler."""

from __future__ import annotations

import inspect
import math
from types import ModuleType
from typing import Any

import torch

from lightning_mics.config import as_dtype
from lightning_mics.deepspeed.conversion import Optimizer
from lightning_mics.deepspeed.reader import AUTO, Reader, known
from lightning_mics.errors import MiCSConfigError
from lightning_mics.precision import PRECISIONS
from lightning_mics.text import did_you_mean

_TOTAL, _MICRO, _STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def read_batch(reader: Reader, world_size: int | None) -> dict[str, int | None]:
    """Reads the three batch settings, works out what is missing, and refuses what contradicts itself."""
    total, micro, steps = (reader.whole(key) for key in (_TOTAL, _MICRO, _STEPS))
    if steps is None and _STEPS not in reader and (total is None) != (micro is None):
        steps = 1  # DeepSpeed's choice, where one batch size alone is given
    factors = {_MICRO: micro, _STEPS: steps, "world_size": world_size}
    given = {name: value for name, value in factors.items() if value is not None}
    product = math.prod(given.values())
    listed = " x ".join(f"{name}={value}" for name, value in given.items())
    if total is None and len(given) == 3:
        total = product
    elif total is not None and len(given) == 3 and total != product:
        raise MiCSConfigError(
            f"{_TOTAL}={total} is not {listed} = {product}. Set {_TOTAL}={product}, or leave one of the three out: it "
            "follows from the others.",
            setting=_TOTAL,
        )
    elif total is not None and len(given) == 2:
        if total % product:
            nothing_fits = ", so that no number of ranks fits" if world_size is None else ""
            raise MiCSConfigError(
                f"{_TOTAL}={total} is not a multiple of {listed} = {product}{nothing_fits}. Try "
                f"{_TOTAL}={-(-total // product) * product}.",
                setting=_TOTAL,
            )
        factors = {name: total // product if value is None else value for name, value in factors.items()}
    micro, steps, world_size = factors.values()
    _note_batch(reader, micro, steps, world_size)
    return {
        "global_batch_size": total,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": steps,
        "world_size": world_size,
    }


def _note_batch(reader: Reader, micro: int | None, steps: int | None, world_size: int | None) -> None:
    arithmetic = "micro batch x microsteps x ranks"
    if None not in (micro, steps, world_size):
        arithmetic = f"{micro} a rank x {steps} microsteps x {world_size} ranks"
    if reader.whole(_TOTAL) is not None:
        reader.kept(_TOTAL, f"The global batch: {arithmetic}. It has no setting of its own.")
    if reader.whole(_MICRO) is not None:
        reader.kept(_MICRO, f"DataLoader(batch_size={micro}) in the script.")
    if reader.whole(_STEPS) is not None:
        both = f"accumulate_grad_batches={steps} of the Trainer, gradient_accumulation_steps={steps} of Accelerate."
        reader.kept(_STEPS, both)


def read_clipping(reader: Reader) -> float | None:
    """Reads the norm at which gradients are clipped."""
    norm = reader.number("gradient_clipping") or None
    if norm is not None:
        both = f"gradient_clip_val={norm} of the Trainer, clip_grad_norm_(..., {norm}) of Accelerate."
        reader.kept("gradient_clipping", both)
    return norm


def read_precision(reader: Reader) -> str | None:
    """Reads which of the four sections about precision is on; returns Lightning's name of it."""
    bf16 = "bf16" if reader.under("bf16") else "bfloat16"
    switches = {name: reader.switch(f"{name}.enabled") for name in (bf16, "fp16", "torch_autocast", "amp")}
    if switches[bf16] and switches["fp16"]:
        raise MiCSConfigError(f"{bf16}.enabled and fp16.enabled are both true. Set one of them to false.")
    chosen = next((name for name, on in switches.items() if on), None)
    precision = None if chosen is None else _precision_of(reader, chosen)
    for name, on in switches.items():
        key = f"{name}.enabled"
        if name == chosen and precision is not None:
            reader.replaced(key, _precision_note(precision))
        elif on:
            reader.replaced(key, f"Superseded by {chosen}, which is on as well.")
        elif on is False and chosen:
            reader.replaced(key, f"Off; {chosen} decides.")
    return precision


def _precision_of(reader: Reader, section: str) -> str:
    if section in ("bf16", "bfloat16"):
        key = f"{section}.bf16_master_weights_and_grads"
        if reader.switch(key):
            reader.replaced(key, "precision='bf16-true': no float32 copy is kept.")
            return "bf16-true"
        return "bf16-mixed"
    if section == "torch_autocast":
        key = "torch_autocast.dtype"
        is_bf16 = as_dtype(reader.value(key, "bfloat16"), key) == torch.bfloat16
        name = "bf16-mixed" if is_bf16 else "16-mixed"
        reader.replaced(key, f"precision={name!r}, mixed_precision={PRECISIONS[name].accelerate!r}")
        return name
    return "16-mixed"


def _precision_note(name: str) -> str:
    if name == "bf16-true":
        return (
            "precision='bf16-true' of the Trainer; for Accelerate load the model in bfloat16, with mixed_precision off."
        )
    precision = PRECISIONS[name]
    return (
        f"precision={name!r} of the Trainer, mixed_precision={precision.accelerate!r} of Accelerate; in a bare loop "
        f"param_dtype={precision.param_dtype!r}. Shards stay in float32, as DeepSpeed's master weights, and are "
        "gathered in 16 bits."
    )


class _Names(dict[str, Any]):
    """Names and what stands for them in a sentence: without a value, themselves."""

    def __missing__(self, name: str) -> str:
        return name


def read_scheduler(reader: Reader) -> str | None:
    """Says what to write for the scheduler.

    Returns:
        The parameter of the schedule that overwrites the optimizer's learning rate, if the file has it.
    """
    key, name = "scheduler.type", reader.value("scheduler.type")
    if name in (None, AUTO):
        return None
    params = reader.under("scheduler.params")
    schedules = known()["schedulers"]
    if name in schedules:
        given = {param: param if value == AUTO else value for param, value in params.items()}
        kind = "linear" if params.get("warmup_type") == "linear" else "log"
        sentence = schedules[name].get(kind, schedules[name]["log"])
        filled = sentence.format_map(_Names({**known()["scheduler_defaults"], **given}))
        reader.replaced(key, f"{filled} Step it with each optimizer step.")
        rate = schedules[name].get("rate")
        return rate if rate in params else None
    is_torch = _is_in(torch.optim.lr_scheduler, name, torch.optim.lr_scheduler.LRScheduler)
    if is_torch:
        arguments = ", ".join(["optimizer", *(f"{param}={value!r}" for param, value in params.items())])
        reader.kept(key, f"`torch.optim.lr_scheduler.{name}({arguments})`, stepped with each optimizer step.")
    else:
        hint = did_you_mean(str(name), [*schedules, *vars(torch.optim.lr_scheduler)], "Create it in the script.")
        reader.dropped(key, f"Neither DeepSpeed nor PyTorch has it. {hint}")
    decide = reader.kept if is_torch else reader.dropped
    for param in params:
        decide(f"scheduler.params.{param}", "Goes with scheduler.type.")
    return None


def _is_in(module: ModuleType, name: Any, base: type) -> bool:
    found = getattr(module, str(name), None)
    return isinstance(found, type) and issubclass(found, base)


def read_optimizer(reader: Reader, scheduled_rate: str | None) -> Optimizer | None:
    """Reads the optimizer.

    Args:
        reader: The file.
        scheduled_rate: The parameter of the schedule that overwrites the learning rate.
    """
    name = reader.value("optimizer.type")
    if name in (None, AUTO):
        return None
    params = reader.under("optimizer.params")
    entry = known()["optimizers"].get(str(name).lower(), {})
    target = entry.get("torch", str(name))
    if str(name).lower() == "adam" and params.get("adam_w_mode") is False:
        target = "Adam"
    if "dropped" in entry or not _is_in(torch.optim, target, torch.optim.Optimizer):
        note = "PyTorch has no such optimizer. Create it in the script, from the sharded parameters."
        reader.dropped("optimizer.type", entry.get("dropped", note))
        for param in params:
            reader.dropped(f"optimizer.params.{param}", "Goes with the optimizer.")
        return None
    taken = inspect.signature(getattr(torch.optim, target)).parameters
    arguments = {param: value for param, value in params.items() if param in taken}
    _note_parameters(reader, target, params, arguments)
    if isinstance(betas := arguments.get("betas"), list):
        arguments["betas"] = tuple(betas)
    note = f"torch.optim.{target}{entry.get('note', '')}."
    if target == "AdamW" and params.get("torch_adam") is not True and "weight_decay" not in arguments:
        # PyTorch's AdamW decays by 0.01 if nothing is said, DeepSpeed's not at all.
        arguments["weight_decay"] = 0.0
        note += " weight_decay=0.0 is DeepSpeed's default."
    decide = reader.kept if target.lower() == str(name).lower() else reader.replaced
    decide("optimizer.type", note)
    if scheduled_rate is not None:
        _take_rate(reader, arguments, scheduled_rate)
    left_open = tuple(param for param, value in arguments.items() if value == AUTO)
    return Optimizer(
        name=target,
        arguments={param: value for param, value in arguments.items() if value != AUTO},
        open=left_open,
    )


def _note_parameters(reader: Reader, target: str, params: dict[str, Any], arguments: dict[str, Any]) -> None:
    for param, value in params.items():
        key = f"optimizer.params.{param}"
        if param in arguments and value != AUTO:
            reader.kept(key, f"Argument of torch.optim.{target}.")
        elif value != AUTO and key not in known()["fields"]:
            reader.dropped(key, f"torch.optim.{target} has no such argument.")


def _take_rate(reader: Reader, arguments: dict[str, Any], param: str) -> None:
    """Gives the optimizer the rate that its schedule multiplies, as DeepSpeed's schedules overwrite it."""
    rate, own = reader.value(f"scheduler.params.{param}"), arguments.get("lr", AUTO)
    if isinstance(rate, list):
        return
    if AUTO not in (own, rate) and own != rate:
        reader.replaced("optimizer.params.lr", f"lr={rate}: the schedule's {param} overwrites it.")
    arguments["lr"] = rate
