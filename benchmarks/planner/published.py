"""Published figures of MiCS, ZeRO-3 and HSDP against the planner's predictions.

python benchmarks/planner/published.py --table docs/results/planner-published.md

All rows share the catalogue's figures of p4d.24xlarge and p4de.24xlarge. What the sources do not say is assumed, the
same in all rows: partitions of 128 ranks for the model of 100 billion parameters and of 64 for that of 175 billion, the
smallest that hold 16 bytes a parameter beside activations; 4096 tokens of a rank in a microstep; four microsteps;
activation checkpointing; gradients reduced in 16 bits; attention in pieces, as before FlashAttention.
TFLOP/s count recomputation, as Megatron-LM's formula does.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_mics.plan import Candidate, Cluster, ModelProfile, Plan, Training, evaluate, find_instance
from lightning_mics.plan.cost import Cost
from lightning_mics.plan.simulate import ZERO3_OF_2021, Engine, StepWork, UnitTimes, simulate
from lightning_mics.trace import profile_model
from lightning_mics.trace.models import build_model

_TRAINING = Training(param_dtype="float16", reduce_dtype="float16", state_dtype="float16")
_TOKENS = 4096
_ACCUMULATION = 4
_HEADER = ["figure", "reported", "predicted", "error"]
_BLOG = "Amazon Science, Near-linear scaling of gigantic-model training on AWS"


@dataclass(frozen=True)
class Figure:
    """One published figure."""

    what: str
    source: str
    unit: str
    reported: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.reported - 1

    def cells(self) -> list[str]:
        values = [f"{value:.1f} {self.unit}" for value in (self.reported, self.predicted)]
        return [self.what, *values, f"{100 * self.error:+.1f}%"]


@functools.cache
def _profile(name: str, sequence: int) -> ModelProfile:
    model, sample, _ = build_model(name, sequence_length=sequence, attention="eager")
    return profile_model(model, sample, param_dtype="float16", name=name)


def _mics(name: str, sequence: int, cluster: Cluster, shard_size: int) -> Plan:
    candidate = Candidate(
        shard_size=shard_size,
        hierarchical=True,
        micro_batch=_TOKENS // sequence,
        accumulation=_ACCUMULATION,
        activation_checkpointing=True,
    )
    return evaluate(_profile(name, sequence), cluster, candidate, _TRAINING)


def _zero3(name: str, sequence: int, cluster: Cluster) -> Plan:
    candidate = Candidate(
        scheme="full-sharding",
        shard_size=cluster.world_size,
        micro_batch=_TOKENS // sequence,
        accumulation=_ACCUMULATION,
        activation_checkpointing=True,
    )
    return evaluate(_profile(name, sequence), cluster, candidate, _TRAINING, engine=ZERO3_OF_2021)


def mics_figures() -> Iterator[Figure]:
    """Yields the figures of the MiCS authors."""
    small, large = (find_instance("p4d.24xlarge", nodes) for nodes in (16, 64))
    mics = [_mics("gpt-100b", 512, cluster, 128).hardware_flops / 1e12 for cluster in (small, large)]
    zero3 = [_zero3("gpt-100b", 512, cluster).hardware_flops / 1e12 for cluster in (small, large)]
    yield Figure("100B, 512 A100 (p4d): MiCS, a GPU", _BLOG, "TFLOP/s", 170.0, mics[1])
    yield Figure("100B, 512 A100 (p4d): ZeRO-3, a GPU", _BLOG, "TFLOP/s", 62.0, zero3[1])
    yield Figure("100B, 128 to 512 A100: MiCS, weak scaling", _BLOG, "%", 99.4, 100 * mics[1] / mics[0])
    yield Figure("100B, 128 to 512 A100: ZeRO-3, weak scaling", _BLOG, "%", 72.0, 100 * zero3[1] / zero3[0])
    flops = _mics("gpt3-175b", 2048, find_instance("p4de.24xlarge", 16), 64).hardware_flops / 1e12
    yield Figure("175B, sequence 2048, 128 A100 (p4de): MiCS, a GPU", _BLOG, "TFLOP/s", 169.0, flops)


def hsdp_figures() -> Iterator[Figure]:
    """Yields the step times of HSDP 8 x 2 over Ethernet: 10.8 s of compute and 11.4 s of replication a microbatch."""
    source = "a user's report on HSDP, 2 nodes of 8 A100 over Ethernet"
    model = UnitTimes(name="model", forward=3.6, backward=7.2, replicate=Cost(11.4, 11.4))
    blocking = Engine(gathers_ahead=False, reduces_beside=False, replicates_beside=False)
    for what, always, reported in (("deferred", False, 54.3), ("every microstep", True, 88.8)):
        work = StepWork(
            root=UnitTimes(name="(root)"), blocks=[model], accumulation=4, replicates_always=always, engine=blocking
        )
        label = f"HSDP 8 x 2, accumulation 4, replication {what}: a step"
        yield Figure(label, source, "s", reported, simulate(work).seconds)


def main() -> None:
    """Predicts and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="write a Markdown table")
    options = parser.parse_args()
    figures = [*mics_figures(), *hsdp_figures()]
    table = Table(*_HEADER)
    for figure in figures:
        table.add_row(*figure.cells())
    Console(width=100).print(table)
    if options.table is not None:
        rows = [_HEADER, ["---"] * len(_HEADER), *(figure.cells() for figure in figures)]
        options.table.write_text("".join("| " + " | ".join(row) + " |\n" for row in rows))


if __name__ == "__main__":
    main()
