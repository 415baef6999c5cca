"""A plan as files and as lines to paste: for Accelerate, LightningCLI and MiCSConfig, and everything as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from lightning_mics.accelerate.launch_file import LaunchSettings, launch_commands, write_launch_file
from lightning_mics.cli.code import layout_call, write_text
from lightning_mics.plan.profile import ModelProfile
from lightning_mics.plan.scaling import ScalingPoint
from lightning_mics.plan.search import Planning
from lightning_mics.plan.sensitivity import sensitivity
from lightning_mics.plan.settings import Training
from lightning_mics.plan.simulate import StepTime
from lightning_mics.precision import PRECISIONS

# As many of the first plans come with what they would take under worse conditions.
_SENSITIVE = 10
# Columns of a call that is an argument of another one.
_INSIDE = 60
# Stands for the address that nobody knows before the machines are there.
MACHINE_0 = "ADDRESS_OF_MACHINE_0"


def mics_settings(planning: Planning) -> dict[str, Any]:
    """Returns the settings of the best plan that differ from the defaults, and the shard size.

    ``hierarchical`` is left to the measurement at set-up, unless it was fixed.
    """
    candidate = planning.best.candidate
    settings: dict[str, Any] = {"shard_size": candidate.shard_size}
    if planning.choices.hierarchical is not None and candidate.layout(planning.cluster.topology).spans_nodes:
        settings["hierarchical"] = candidate.hierarchical
    if candidate.slices > 1:
        is_world = candidate.optimizer_shard_size == planning.cluster.world_size
        settings["optimizer_shard_size"] = "world" if is_world else candidate.optimizer_shard_size
    if planning.training.replication_reduce_dtype is not None:
        settings["replication_reduce_dtype"] = planning.training.replication_reduce_dtype
    if planning.training.replication_gather_dtype is not None and candidate.slices > 1:
        settings["replication_gather_dtype"] = planning.training.replication_gather_dtype
    if candidate.has_owners:
        settings["master_weights"] = candidate.master_weights
    if not candidate.reshard_after_forward:
        settings["reshard_after_forward"] = False
    if candidate.activation_checkpointing:
        settings["activation_checkpointing"] = candidate.activation_checkpointing
    if candidate.activation_checkpointing_offload:
        settings["activation_checkpointing_offload"] = True
    return settings


def trainer_code(planning: Planning) -> str:
    """Returns the line that creates a Lightning ``Trainer`` for the best plan."""
    strategy = layout_call("MiCSStrategy", mics_settings(planning), _INSIDE)
    return layout_call("trainer = Trainer", {"strategy": strategy, **_trainer_arguments(planning)})


def accelerate_code(planning: Planning) -> str:
    """Returns the line that creates a ``MiCSAccelerator`` for the best plan."""
    arguments = {
        "mics_plugin": layout_call("MiCSPlugin", mics_settings(planning), _INSIDE),
        "gradient_accumulation_steps": planning.best.candidate.accumulation,
        "mixed_precision": _mixed_precision(planning.training),
    }
    return layout_call("accelerator = MiCSAccelerator", arguments)


def _trainer_arguments(planning: Planning) -> dict[str, Any]:
    node = planning.cluster.node
    on_cpu = {"accelerator": "cpu"} if node.accelerator.device_type == "cpu" else {}
    return {
        **on_cpu,
        "num_nodes": planning.cluster.num_nodes,
        "devices": node.num_accelerators,
        "precision": planning.training.precision,
        "accumulate_grad_batches": planning.best.candidate.accumulation,
    }


def _mixed_precision(training: Training) -> str:
    """Returns Accelerate's name of a precision; what it has none for leaves the model as it is."""
    precision = PRECISIONS.get(training.precision)
    return (precision and precision.accelerate) or "no"


def write_plan(
    planning: Planning, path: Path, kind: str = "accelerate", *, main_process_ip: str | None = None, force: bool = False
) -> str:
    """Writes the best plan into a file of a kind (one of the command's formats); returns how to use it.

    Without the address of machine 0, a file for Accelerate has a placeholder.

    Raises:
        MiCSConfigError: If no plan fits, or the file exists or cannot be written.
    """
    if kind == "lightning":
        write_text(path, _lightning_yaml(planning), force=force)
        return f"Pass it to a script that uses LightningCLI: fit --config {path}"
    state_dtype = planning.training.state_dtype
    hint = f"\nBuild the model in {state_dtype}: the file has no word for that." if state_dtype is not None else ""
    if kind == "accelerate":
        return _write_for_accelerate(planning, path, main_process_ip, force) + hint
    write_text(path, _mics_yaml(planning), force=force)
    return f"Read it with MiCSConfig.from_yaml({str(path)!r}).{hint}"


def _write_for_accelerate(planning: Planning, path: Path, main_process_ip: str | None, force: bool) -> str:
    candidate, machines = planning.best.candidate, planning.cluster.num_nodes
    several = machines > 1
    settings = LaunchSettings(
        shard_size=candidate.shard_size,
        num_processes=planning.cluster.world_size,
        num_machines=machines,
        main_process_ip=(main_process_ip or MACHINE_0) if several else main_process_ip,
        mixed_precision=_mixed_precision(planning.training),
        cpu=planning.cluster.node.accelerator.device_type == "cpu",
        reshard_after_forward=candidate.reshard_after_forward,
        activation_checkpointing=candidate.activation_checkpointing is True,
        activation_checkpointing_offload=candidate.activation_checkpointing_offload,
    )
    wires = ("replication_reduce_dtype", "replication_gather_dtype")
    names = ("hierarchical", "optimizer_shard_size", *wires, "master_weights")
    beside = {name: mics_settings(planning).get(name) for name in names}
    if candidate.activation_checkpointing is not settings.activation_checkpointing:
        beside["activation_checkpointing"] = candidate.activation_checkpointing  # the file knows all and nothing
    variables = {f"MICS_{name.upper()}": str(value).lower() for name, value in beside.items() if value is not None}
    write_launch_file(path, settings, environment=variables, force=force)
    use = f"Start a script with it: {launch_commands(path, variables, machines)[0]}"
    if several and main_process_ip is None:
        use += f"\nFirst put the address of machine 0 in the place of {MACHINE_0}, or add --main_process_ip."
    return use


def _lightning_yaml(planning: Planning) -> str:
    strategy = {"class_path": "lightning_mics.MiCSStrategy", "init_args": mics_settings(planning)}
    trainer = {**_trainer_arguments(planning), "strategy": strategy}
    comments = _comments(planning, "For LightningCLI.")
    return comments + yaml.safe_dump({"trainer": trainer}, sort_keys=False)


def _mics_yaml(planning: Planning) -> str:
    settings = mics_settings(planning)
    if planning.training.param_dtype != "float32":
        settings["param_dtype"] = planning.training.param_dtype
    microsteps = f", microsteps {planning.best.candidate.accumulation}"
    comments = _comments(planning, "Read it with MiCSConfig.from_yaml(...).", microsteps)
    return comments + yaml.safe_dump(settings, sort_keys=False)


def _comments(planning: Planning, use: str, more: str = "") -> str:
    best, cluster = planning.best, planning.cluster
    batch = f"micro-batch of a rank {best.candidate.micro_batch}{more} (global batch {best.global_batch})"
    return (
        f"# Written by `mics plan` for {planning.profile.name} on {cluster.num_nodes} x {cluster.node.name}. {use}\n"
        f"# For the training script: {batch}.\n"
    )


# JSON.


def to_json(planning: Planning, scaling: Sequence[ScalingPoint] = (), *, events: bool = False) -> str:
    """Returns everything that is known, as JSON; the ``events`` of a step for the best plan and its contenders."""
    with_events = [plan.time for plan in (*planning.plans[:1], *planning.contenders)] if events else []
    plain = _Plain(with_events)
    answer = {**plain(planning), "precision": planning.training.precision, "scaling": plain(list(scaling))}
    shown = [*planning.plans[:_SENSITIVE], *planning.contenders]
    answer["sensitivity"] = plain([sensitivity(planning, plan) for plan in shown])
    return json.dumps(answer, indent=2, allow_nan=False) + "\n"


class _Plain:
    """Turns dataclasses, mappings and sequences into what JSON has."""

    # Properties that save readers arithmetic.
    _PROPERTIES = (
        *("fits", "global_batch", "total", "label", "numel"),
        *("trainable_numel", "flops", "world_size", "reason", "rate"),
    )

    def __init__(self, with_events: Sequence[StepTime]) -> None:
        self._with_events = {id(time) for time in with_events}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._fields(value)
        if isinstance(value, Mapping):
            return {self(key): self(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def _fields(self, value: Any) -> dict[str, Any]:
        names = [entry.name for entry in dataclasses.fields(value)]
        if isinstance(value, StepTime) and id(value) not in self._with_events:
            names.remove("events")
        properties = [name for name in self._PROPERTIES if name not in names and hasattr(value, name)]
        plain = {name: self(getattr(value, name)) for name in (*names, *properties)}
        if isinstance(value, ModelProfile):
            # Dozens of equal blocks are one entry with a count.
            runs = [(unit, len(list(equal))) for unit, equal in itertools.groupby(value.blocks)]
            plain["blocks"] = [{"count": count, **self._fields(unit)} for unit, count in runs]
        return plain
