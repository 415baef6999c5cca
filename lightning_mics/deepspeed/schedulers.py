"""Schedulers of DeepSpeed as those of PyTorch and transformers."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from lightning_mics.deepspeed.conversion import Call, Code
from lightning_mics.deepspeed.reader import Reader
from lightning_mics.deepspeed.tables import AUTO
from lightning_mics.errors import MiCSConfigError


@dataclass(frozen=True)
class Schedule:
    """A scheduler, and the learning rate it expects of the optimizer."""

    call: Call | None = None
    # The optimizer's learning rate that the schedule multiplies, where DeepSpeed's schedule names it.
    base_lr: float | Code | None = None
    base_key: str = ""


class Parameters:
    """A ``params`` section; values that are "auto" become names for the script to set."""

    def __init__(self, reader: Reader, section: str) -> None:
        self.reader = reader
        self.section = section
        self.values = reader.under(f"{section}.params")
        # An empty section is a leaf of its own, with nothing left of its key.
        self.values.pop("", None)

    def get(self, name: str, default: Any = None) -> Any:
        """A value of any kind."""
        value = self.values.get(name, default)
        return Code(_NAMES.get(name, name)) if value == AUTO else value

    def rate(self, name: str, default: float | None) -> float | Code | None:
        """A number of at least 0."""
        if isinstance(value := self.get(name), Code):
            return value
        return default if value is None else self.reader.number(f"{self.section}.params.{name}")

    def steps(self, name: str, default: int, least: int = 1) -> int | Code:
        """A number of steps."""
        if isinstance(value := self.get(name), Code):
            return value
        return default if value is None else self.reader.whole(f"{self.section}.params.{name}", least, 1000) or 0

    def call(self, target: str, arguments: Mapping[str, Any]) -> Call:
        """A call with arguments that were read from here."""
        names = {_NAMES.get(name, name) for name, value in self.values.items() if value == AUTO}
        code = " ".join(value for value in arguments.values() if isinstance(value, Code))
        used = sorted(name for name in names if re.search(rf"\b{re.escape(name)}\b", code))
        return Call(target=target, arguments=arguments, unset=tuple(used))

    def note(self, name: str, outcome: str, note: str) -> None:
        """Notes what became of one parameter."""
        key = f"{self.section}.params.{name}"
        if self.values.get(name) == AUTO:
            self.reader.left_to_script(key)
        elif outcome == "carried":
            self.reader.carried(key, note)
        elif outcome == "changed":
            self.reader.changed(key, note)
        else:
            self.reader.dropped(key, note)

    def note_all(self, target: str, dropped: Mapping[str, str], base_key: str = "") -> None:
        """Notes every parameter, as part of a call or, with a note of its own, as dropped."""
        for name in self.values:
            if name in dropped:
                self.note(name, "dropped", dropped[name])
            elif name == base_key:
                self.note(name, "carried", "lr of the optimizer, which the schedule multiplies.")
            else:
                self.note(name, "carried", f"Part of the call of {target}.")

    def drop_all(self, note: str) -> None:
        """Notes that there is no counterpart to call."""
        self.reader.dropped(f"{self.section}.type", note)
        for name in self.values:
            self.note(name, "dropped", f"Goes with the {self.section}.")


# The schedule's highest rate is the optimizer's.
_NAMES = {"warmup_max_lr": "lr", "lr_range_test_min_lr": "lr"}


def read_scheduler(reader: Reader) -> Schedule:
    """Reads the scheduler."""
    name = reader.value("scheduler.type")
    if name is None or name == AUTO:
        reader.left_to_script("scheduler.type") if name else reader.changed("scheduler.type", "No scheduler.")
        return Schedule()
    params = Parameters(reader, "scheduler")
    if name not in _SCHEDULES:
        return _read_torch_scheduler(params, str(name))
    if any(isinstance(value, list) for value in params.values.values()):
        params.drop_all("Not converted with a value for each parameter group: use LambdaLR, with a function for each.")
        return Schedule()
    return _SCHEDULES[name](params)


def _scheduled(
    params: Parameters,
    call: Call,
    base: tuple[str, Any] | None = None,
    dropped: Mapping[str, str] = MappingProxyType({}),
    extra: str = "",
) -> Schedule:
    note = f"{call.target}, stepped with each optimizer step.{extra}"
    params.reader.changed("scheduler.type", note)
    params.note_all(call.target, dropped, base[0] if base else "")
    return Schedule(call, base[1], base[0]) if base else Schedule(call)


# DeepSpeed's warmups spend the first two steps at the lowest rate.
_ONE_STEP_EARLIER = " Its warmup is one step ahead of DeepSpeed's."


def _warmup(params: Parameters) -> tuple[int | Code, bool, str]:
    """Returns the warmup's steps, whether it is linear, and its share of the full rate as an expression."""
    steps = params.steps("warmup_num_steps", 1000)
    # DeepSpeed divides by the logarithm of it.
    steps = steps if isinstance(steps, Code) else max(2, steps)
    if params.values.get("warmup_type") == "linear":
        return steps, True, f"step / {steps}"
    return steps, False, f"math.log(step + 1) / math.log({steps})"


def _lambda_lr(params: Parameters, expression: str) -> Call:
    return params.call("torch.optim.lr_scheduler.LambdaLR", {"lr_lambda": Code(f"lambda step: {expression}")})


def _above(low: float | Code, expression: str) -> str:
    """Returns an expression that runs from ``low`` to 1 where ``expression`` runs from 0 to 1."""
    return f"{low} + (1 - {low}) * ({expression})" if low else expression


def _lowest_share(params: Parameters, high: Any) -> float | Code:
    """Returns the lowest rate as a share of the highest."""
    # transformers fills "auto" with 0.
    low = 0.0 if params.values.get("warmup_min_lr") == AUTO else params.rate("warmup_min_lr", 0.0)
    if not low or not high:
        return 0.0
    return Code(f"({low} / {high})") if isinstance(high, Code) else float(f"{float(low) / high:.6g}")


def _warmup_lr(params: Parameters) -> Schedule:
    high = params.rate("warmup_max_lr", None)
    base = None if high is None else ("warmup_max_lr", high)
    # Without a highest rate of its own the schedule takes the optimizer's.
    own = params.reader.value("optimizer.params.lr", 0.001)
    low = _lowest_share(params, (Code("lr") if own == AUTO else own) if high is None else high)
    steps, linear, share = _warmup(params)
    if linear and not low:
        call = params.call("transformers.get_constant_schedule_with_warmup", {"num_warmup_steps": steps})
    elif linear and not isinstance(low, Code) and low <= 1:
        arguments = {"start_factor": low, "total_iters": steps}
        call = params.call("torch.optim.lr_scheduler.LinearLR", arguments)
    else:
        call = _lambda_lr(params, _above(low, f"min(1.0, {share})"))
    return _scheduled(params, call, base, extra=_ONE_STEP_EARLIER)


def _warmup_decay_lr(params: Parameters) -> Schedule:
    high = params.rate("warmup_max_lr", 0.001)
    low = _lowest_share(params, high)
    steps, linear, share = _warmup(params)
    total = _total_steps(params)
    if linear and not low:
        arguments = {"num_warmup_steps": steps, "num_training_steps": total}
        call = params.call("transformers.get_linear_schedule_with_warmup", arguments)
    else:
        decay = f"max(0.0, ({total} - step) / max(1, {total} - {steps}))"
        call = _lambda_lr(params, _above(low, f"{share} if step < {steps} else {decay}"))
    return _scheduled(params, call, ("warmup_max_lr", high), extra=_ONE_STEP_EARLIER)


def _total_steps(params: Parameters) -> int | Code:
    if params.values.get("total_num_steps") is None:
        raise MiCSConfigError(
            "scheduler.params.total_num_steps is missing; this scheduler needs it. Try 10000, or 'auto'."
        )
    return params.steps("total_num_steps", 0)


def _warmup_cosine_lr(params: Parameters) -> Schedule:
    steps, linear, share = _warmup(params)
    total = _total_steps(params)
    low, end = params.rate("warmup_min_ratio", 0.0), params.rate("cos_min_ratio", 0.0001)
    if linear and not low:
        arguments = {"num_warmup_steps": steps, "num_training_steps": total, "min_lr_rate": end}
        call = params.call("transformers.get_cosine_with_min_lr_schedule_with_warmup", arguments)
    else:
        progress = f"min(1.0, (step - {steps}) / max(1, {total} - {steps}))"
        decay = f"{end} + (1 - {end}) * (1 + math.cos(math.pi * {progress})) / 2"
        call = _lambda_lr(params, f"{_above(low or 0.0, share)} if step < {steps} else {decay}")
    return _scheduled(params, call, extra=f"{_ONE_STEP_EARLIER} Train no longer than total_num_steps.")


def _lr_range_test(params: Parameters) -> Schedule:
    low = params.rate("lr_range_test_min_lr", 0.001)
    size, rate = params.steps("lr_range_test_step_size", 2000), params.rate("lr_range_test_step_rate", 1.0)
    divide = "//" if params.values.get("lr_range_test_staircase") is True else "/"
    call = _lambda_lr(params, f"1 + {rate} * (step {divide} {size})")
    extra = " Lightning's Tuner(trainer).lr_find(model) does the whole test."
    return _scheduled(params, call, ("lr_range_test_min_lr", low), extra=extra)


_NO_STAIRS = "No stairs in OneCycleLR: the rate changes with each step."
_NO_DECAY = "OneCycleLR ends after total_steps, and raises if it is stepped further. Train no longer, or use LambdaLR."
_ONE_CYCLE_DROPPED = {
    "cycle_first_stair_count": _NO_STAIRS,
    "cycle_second_stair_count": _NO_STAIRS,
    "decay_step_size": _NO_DECAY,
    "decay_lr_rate": _NO_DECAY,
    "decay_mom_rate": _NO_DECAY,
}


def _one_cycle(params: Parameters) -> Schedule:
    low, high = params.rate("cycle_min_lr", None), params.rate("cycle_max_lr", None)
    if low is None or high is None:
        raise MiCSConfigError(
            "scheduler.params of OneCycle needs cycle_min_lr and cycle_max_lr. Try cycle_min_lr=0.0001 and "
            "cycle_max_lr=0.001."
        )
    first = params.steps("cycle_first_step_size", 2000)
    second = first if params.get("cycle_second_step_size") is None else params.steps("cycle_second_step_size", 0, 0)
    is_open = isinstance(first, Code) or isinstance(second, Code)
    total = Code(f"({first} + {second})") if is_open else int(first) + int(second)
    arguments: dict[str, Any] = {
        "max_lr": high,
        "total_steps": total,
        "pct_start": _ratio(first, total),
        "anneal_strategy": "linear",
        "div_factor": _ratio(high, low),
        "final_div_factor": 1.0,
        "cycle_momentum": params.get("cycle_momentum", True),
    }
    if arguments["cycle_momentum"] is not False:
        arguments["base_momentum"] = params.rate("cycle_min_mom", 0.8)
        arguments["max_momentum"] = params.rate("cycle_max_mom", 0.9)
    call = params.call("torch.optim.lr_scheduler.OneCycleLR", arguments)
    return _scheduled(params, call, dropped=_ONE_CYCLE_DROPPED)


def _ratio(above: float | Code, below: float | Code) -> float | Code:
    if isinstance(above, Code) or isinstance(below, Code):
        return Code(f"{above} / {below}")
    # A cycle may start at a rate of 0.
    return above / below if below else Code("float('inf')")


_SCHEDULES = {
    "WarmupLR": _warmup_lr,
    "WarmupDecayLR": _warmup_decay_lr,
    "WarmupCosineLR": _warmup_cosine_lr,
    "LRRangeTest": _lr_range_test,
    "OneCycle": _one_cycle,
}


def _read_torch_scheduler(params: Parameters, name: str) -> Schedule:
    schedulers = {key: value for key, value in vars(torch.optim.lr_scheduler).items() if _is_scheduler(value)}
    if name not in schedulers:
        near = difflib.get_close_matches(name, [*_SCHEDULES, *schedulers], n=1)
        hint = f" Is {near[0]!r} meant?" if near else ""
        params.drop_all(f"Neither DeepSpeed nor PyTorch has it.{hint} Create it in the script.")
        return Schedule()
    call, unknown = call_of(params, schedulers[name], f"torch.optim.lr_scheduler.{name}")
    params.reader.carried("scheduler.type", f"{call.target}, stepped with each optimizer step.")
    params.note_all(call.target, unknown)
    return Schedule(call)


def _is_scheduler(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.lr_scheduler.LRScheduler)


def call_of(params: Parameters, target: type, name: str) -> tuple[Call, dict[str, str]]:
    """Returns the call with those parameters that ``target`` takes, and a note for each of the others."""
    known = inspect.signature(target).parameters
    unknown = {key: f"{name} has no such argument." for key in params.values if key not in known}
    arguments = {key: params.get(key) for key in params.values if key in known}
    if isinstance(betas := arguments.get("betas"), list):
        arguments["betas"] = tuple(betas)
    return params.call(name, arguments), unknown
