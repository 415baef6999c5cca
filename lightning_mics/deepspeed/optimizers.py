"""Optimizers of DeepSpeed as those of PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from lightning_mics.deepspeed.conversion import Call, Code
from lightning_mics.deepspeed.reader import Reader
from lightning_mics.deepspeed.schedulers import Parameters, Schedule, call_of
from lightning_mics.deepspeed.tables import AUTO

_OPTIMIZERS = {
    "adam": "AdamW",
    "adamw": "AdamW",
    "adagrad": "Adagrad",
    "onebitadam": "AdamW",
    "zerooneadam": "AdamW",
}
_FOREIGN_OPTIMIZERS = {
    "lamb": "PyTorch has no LAMB. torch.optim.AdamW is the nearest; any torch.optim.Optimizer class works.",
    "onebitlamb": "PyTorch has no LAMB. torch.optim.AdamW is the nearest; any torch.optim.Optimizer class works.",
    "lion": "PyTorch has no Lion. Any torch.optim.Optimizer class that updates elementwise works on shards.",
    "muon": "Muon works on whole matrices, of which a rank holds a shard. torch.optim.AdamW is the nearest.",
    "muadam": "Of the package mup, whose marks on parameters do not outlive sharding. Set the rates of the groups.",
    "muadamw": "Of the package mup, whose marks on parameters do not outlive sharding. Set the rates of the groups.",
    "musgd": "Of the package mup, whose marks on parameters do not outlive sharding. Set the rates of the groups.",
}
_COMPRESSED = "Part of compressed communication, which MiCS does not have: gradients stay on few ranks instead."
_OPTIMIZER_PARAMS = {
    "torch_adam": "MiCS always uses PyTorch's optimizers.",
    "adam_w_mode": "It decides between torch.optim.AdamW (true) and torch.optim.Adam (false).",
    "set_grad_none": "optimizer.zero_grad() sets gradients to None unless told otherwise.",
    "fp32_optimizer_states": "Optimizer states have the dtype of the shards, float32 with mixed precision.",
}
_OPTIMIZER_PARAMS_DROPPED = {
    "max_grad_norm": "DeepSpeed refuses it, too; clip with gradient_clipping.",
    "bias_correction": "PyTorch's Adam and AdamW always correct the bias.",
    **dict.fromkeys(
        (
            "freeze_step",
            "cuda_aware",
            "comm_backend_name",
            "var_freeze_step",
            "var_update_scaler",
            "local_step_scaler",
            "local_step_clipper",
        ),
        _COMPRESSED,
    ),
}


def read_optimizer(reader: Reader, schedule: Schedule) -> Call | None:
    """Reads the optimizer, with the learning rate that the schedule expects."""
    name = reader.value("optimizer.type")
    if name is None or name == AUTO:
        reader.left_to_script("optimizer.type") if name else reader.changed("optimizer.type", "No optimizer.")
        return None
    params = Parameters(reader, "optimizer")
    lowered = str(name).lower()
    target = _torch_optimizer(params, str(name))
    if target is None:
        note = "PyTorch has no such optimizer. Create it in the script, from the sharded parameters."
        params.drop_all(_FOREIGN_OPTIMIZERS.get(lowered, note))
        return None
    call, unknown = call_of(params, getattr(torch.optim, target), f"torch.optim.{target}")
    call = _with_scheduled_lr(_with_deepspeed_defaults(params, call, lowered), schedule)
    _note_optimizer(params, call, unknown, str(name), schedule)
    return call


def _torch_optimizer(params: Parameters, name: str) -> str | None:
    lowered = name.lower()
    if lowered == "adam" and params.values.get("adam_w_mode") is False:
        return "Adam"
    if lowered in _OPTIMIZERS:
        return _OPTIMIZERS[lowered]
    if lowered in _FOREIGN_OPTIMIZERS:
        return None
    found = getattr(torch.optim, name, None)
    return name if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) else None


def _with_deepspeed_defaults(params: Parameters, call: Call, name: str) -> Call:
    own_adam = name in ("adam", "adamw", "onebitadam", "zerooneadam") and params.values.get("torch_adam") is not True
    if call.target != "torch.optim.AdamW" or not own_adam or "weight_decay" in call.arguments:
        return call
    # PyTorch's AdamW decays by 0.01 if nothing is said, DeepSpeed's not at all.
    return dataclasses.replace(call, arguments={**call.arguments, "weight_decay": 0.0})


def _adds_weight_decay(params: Parameters, call: Call) -> bool:
    return "weight_decay" in call.arguments and "weight_decay" not in params.values


def _with_scheduled_lr(call: Call, schedule: Schedule) -> Call:
    """Gives the optimizer the rate that the schedule multiplies; DeepSpeed's schedules overwrite it anyway."""
    if schedule.base_lr is None:
        return call
    unset = tuple(name for name in call.unset if name != "lr")
    if isinstance(schedule.base_lr, Code) and schedule.base_lr not in unset:
        unset = (str(schedule.base_lr), *unset)
    return dataclasses.replace(call, arguments={**call.arguments, "lr": schedule.base_lr}, unset=unset)


def _note_optimizer(params: Parameters, call: Call, unknown: Mapping[str, str], name: str, schedule: Schedule) -> None:
    decay = " weight_decay=0.0 is DeepSpeed's default." if _adds_weight_decay(params, call) else ""
    if call.target.lower() == f"torch.optim.{name}".lower():
        params.reader.carried("optimizer.type", f"{call.target}.{decay}")
    elif name.lower() in ("onebitadam", "zerooneadam"):
        params.reader.changed(
            "optimizer.type", f"{call.target}, without the compressed communication of {name!r}.{decay}"
        )
    else:
        params.reader.changed("optimizer.type", f"{call.target}, which is what DeepSpeed's {name!r} computes.{decay}")
    for key, value in params.values.items():
        if key == "lr" and schedule.base_lr is not None and value not in (schedule.base_lr, AUTO):
            params.note("lr", "changed", f"lr={schedule.base_lr}: the schedule's {schedule.base_key} overwrites it.")
        elif key in _OPTIMIZER_PARAMS:
            params.note(key, "changed", _OPTIMIZER_PARAMS[key])
        elif key in unknown:
            params.note(key, "dropped", _OPTIMIZER_PARAMS_DROPPED.get(key, unknown[key]))
        else:
            params.note(key, "carried", f"Argument of {call.target}.")
