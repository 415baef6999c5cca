"""From plan to run and back: what ``mics plan --json`` predicted of a run, and what is measured of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import format_bytes, format_number

# Settings of a candidate that a run has, too; where stages are left to a measurement, both are candidates.
_SETTINGS = (
    *("shard_size", "optimizer_shard_size", "master_weights", "accumulation"),
    *("activation_checkpointing", "activation_checkpointing_offload", "reshard_after_forward"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of a run.

    Attributes:
        world_size: Number of ranks.
        shard_size: Ranks of a partition group.
        optimizer_shard_size: Ranks that divide optimizer states; ``None`` for those of a partition.
        accumulation: Microsteps of an optimizer step.
        activation_checkpointing: Which blocks are computed again in the backward pass; no plan has another than a
            :data:`~lightning_mics.topology.Recomputation`.
        reshard_after_forward: Whether blocks are freed between forward and backward.
        master_weights: Where float32 values of parameters are if optimizer states are divided further.
        activation_checkpointing_offload: Whether what recomputed blocks keep waits in host memory.
    """

    world_size: int
    shard_size: int
    optimizer_shard_size: int | None
    accumulation: int
    activation_checkpointing: object
    reshard_after_forward: bool
    master_weights: str = "partition"
    activation_checkpointing_offload: bool = False


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a step takes.

    Attributes:
        seconds: Of an optimizer step.
        memory: Bytes of the rank that needs most, without the device's context and fragments; ``None`` if unknown.
        inter_bytes: Bytes that leave a node in an optimizer step.
        exposed: Seconds of a step in which compute waits for communication, by what it waits for as
            :class:`~lightning_mics.plan.StepTime` has it; ``None`` if unknown.
    """

    seconds: float
    memory: float | None
    inter_bytes: float
    exposed: Mapping[str, float] | None = None


class PlannedRun:
    """What was planned for a run, by micro-batch.

    Args:
        path: What ``mics plan --json`` wrote.
        run: The settings of the run.

    Raises:
        MiCSConfigError: If it cannot be read, is for another cluster, or has no plan with these settings.
    """

    def __init__(self, path: str | os.PathLike[str], run: Run) -> None:
        self._path = Path(path)
        answer = self._read()
        if answer["cluster"]["world_size"] != run.world_size:
            raise MiCSConfigError(
                f"{path} plans for {answer['cluster']['world_size']} ranks, and this run has {run.world_size}. Plan "
                "again with --nodes, or leave plan= out."
            )
        wanted = {name: value for name, value in asdict(run).items() if name in _SETTINGS}
        found = [plan for plan in answer["plans"] if {name: plan["candidate"][name] for name in _SETTINGS} == wanted]
        if not found:
            settings = ", ".join(f"{name}={value}" for name, value in wanted.items() if value is not None)
            raise MiCSConfigError(f"{path} has no plan with {settings}. {_advice(run)}, or leave plan= out.")
        self._plans: dict[int, dict[str, Any]] = {}
        for plan in found:  # the best of each
            self._plans.setdefault(plan["candidate"]["micro_batch"], plan)

    def _read(self) -> dict[str, Any]:
        try:
            answer = json.loads(self._path.read_text(encoding="utf-8"))
            if {"cluster", "plans"} <= answer.keys():
                return dict(answer)
        except OSError as error:
            raise MiCSConfigError(f"{self._path} cannot be read ({error.strerror or error}).") from error
        except (ValueError, AttributeError):
            pass
        raise MiCSConfigError(f"{self._path} is not what mics plan --json writes. Try: mics plan ... --json plan.json")

    def compare(self, micro_batch: int, measured: Figures) -> str:
        """Returns a line on how far off the prediction was, and a table of by how much.

        Args:
            micro_batch: Samples of a rank in a microstep.
            measured: What the run takes.
        """
        plan = self._plans.get(micro_batch)
        if plan is None:
            known = ", ".join(map(str, sorted(self._plans)))
            return (
                f"{self._path} plans for micro-batches of {known}, and this run has {micro_batch}: nothing to compare."
            )
        memory, time, traffic = plan["memory"], plan["time"], plan["traffic"].values()
        planned = Figures(
            seconds=time["seconds"],
            memory=memory["total"] - memory["reserve"],
            inter_bytes=sum(hop["inter_bytes"] for hop in traffic),
        )
        rows = [["step", *_row(planned.seconds, measured.seconds, _seconds)]]
        if measured.memory is not None:
            rows.append(["peak memory of a rank", *_row(planned.memory or 0.0, measured.memory, format_bytes)])
        rows.append(["out of a node, a step", *_row(planned.inter_bytes, measured.inter_bytes, format_bytes)])
        rows += _exposed(time, measured)
        lines = [f"  {name:<22}{was:>12}{found:>12}{off:>9}" for name, was, found, off in rows]
        return "\n".join([self._sentence(planned, measured), f"  {'':<22}{'planned':>12}{'measured':>12}", *lines])

    def _sentence(self, planned: Figures, measured: Figures) -> str:
        off = _off(planned.seconds, measured.seconds)
        text = f"A step takes {_seconds(measured.seconds)}, {off} than {self._path} says"
        if measured.memory is None:
            return f"{text}."
        return f"{text}; a rank needs {format_bytes(measured.memory)}, {_off(planned.memory or 0.0, measured.memory)}."


def _advice(run: Run) -> str:
    if isinstance(run.activation_checkpointing, bool | int | str):
        return "Plan again with the settings of this run"
    return (
        "A plan recomputes all blocks, every so-many-th, or all but their products: choose blocks by "
        "activation_checkpointing=True, a number or 'selective', and plan again with the settings of this run"
    )


def _exposed(time: Mapping[str, Any], measured: Figures) -> Iterator[list[str]]:
    """Yields the share of the step that compute waits for communication, then that of each part of it."""
    planned, found = time["exposed"], measured.exposed
    for name, parts in {"exposed communication": planned, **{f"  {part}": (part,) for part in planned}}.items():
        was = sum(planned[part] for part in parts) / time["seconds"]
        if found is None:
            yield [name, f"{was:.1%}", "-", ""]
        else:
            yield [name, f"{was:.1%}", f"{sum(found[part] for part in parts) / measured.seconds:.1%}", ""]


def _row(planned: float, measured: float, show: Any) -> list[str]:
    off = f"{measured / planned - 1:+.0%}" if planned else ""
    return [show(planned), show(measured), off]


def _off(planned: float, measured: float) -> str:
    if not planned:
        return "more"
    return f"{abs(measured / planned - 1):.0%} {'more' if measured >= planned else 'less'}"


def _seconds(value: float) -> str:
    return f"{format_number(value)} s"
