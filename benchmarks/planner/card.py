"""Predicted against measured memory of a rank on a card: allocated bytes, without the reserve.

python benchmarks/planner/card.py --table docs/results/planner-card.md

One NVIDIA H200, PyTorch 2.11, one rank of 64 of a fake process group, partitions of 8, bf16-mixed, AdamW. The last two
are of ``benchmarks/gpu.py`` (``benchmarks/results/gpu.jsonl``), whose loop lets the model's outputs go. That of the
first four is not on record; it is taken to hold them, because what predictions without them lacked was, each time, the
bytes of the logits in 16 bits.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_mics.plan import Candidate, MemoryBreakdown, ModelProfile, Training, find_instance, predict_memory
from lightning_mics.trace import profile_model
from lightning_mics.trace.models import build_model

_GIB = 2**30
_HEADER = ["on an H200", "predicted", "measured", "error", "of which outputs", "workspaces"]


@dataclass(frozen=True)
class Case:
    """What was trained, and the bytes that were allocated at most."""

    what: str
    model: str
    settings: dict[str, Any]
    measured: float
    sequence: int = 1024
    holds_outputs: bool = True


CASES = [
    Case("GPT-2 XL, 4 x 1,024", "gpt2-xl", {"micro_batch": 4}, 22.99 * _GIB),
    Case("the same, not resharded", "gpt2-xl", {"micro_batch": 4, "reshard_after_forward": False}, 25.72 * _GIB),
    Case(
        "GPT-2 XL, 8 x 1,024, recomputed", "gpt2-xl", {"micro_batch": 8, "activation_checkpointing": True}, 9.78 * _GIB
    ),
    Case("BERT-large, 32 x 512", "bert-large", {"micro_batch": 32}, 17.37 * _GIB, sequence=512),
    Case("GPT-2 of 24 blocks of 1,024, 4 x 1,024: MiCS", "gpt2-24x1024", {"micro_batch": 4}, 9002745856, 1024, False),
    Case("the same: FSDP2", "gpt2-24x1024", {"micro_batch": 4, "scheme": "mesh-2d"}, 9073537536, 1024, False),
]


@functools.cache
def profile_of(name: str, sequence: int) -> ModelProfile:
    """Returns the profile of a model; that of ``benchmarks/gpu.py`` has no dropout."""
    model, sample, _ = build_model("gpt2-medium" if name == "gpt2-24x1024" else name, sequence_length=sequence)
    if name == "gpt2-24x1024":
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
    return profile_model(model, sample, param_dtype="bfloat16", name=name)


def predict(case: Case) -> MemoryBreakdown:
    """Returns what the planner predicts of a case."""
    candidate = Candidate(shard_size=8, accumulation=4, **case.settings)
    accelerator = find_instance("p5e.48xlarge", 8).node.accelerator
    training = Training(holds_outputs=case.holds_outputs)
    return predict_memory(profile_of(case.model, case.sequence), candidate, training, accelerator)


def errors() -> Iterator[float]:
    """Yields the relative errors of the cases."""
    for case in CASES:
        memory = predict(case)
        yield (memory.total - memory.reserve) / case.measured - 1


def rows() -> Iterator[list[str]]:
    """Yields a row of the table for each case."""
    for case in CASES:
        memory = predict(case)
        allocated = memory.total - memory.reserve
        sizes = [f"{size / _GIB:.2f} GiB" for size in (allocated, case.measured)]
        parts = [f"{size / _GIB:.2f} GiB" for size in (memory.outputs, memory.workspaces)]
        yield [case.what, *sizes, f"{allocated / case.measured - 1:+.1%}", *parts]


def main() -> None:
    """Predicts and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="write a Markdown table")
    options = parser.parse_args()
    table, found = Table(*_HEADER), list(rows())
    for row in found:
        table.add_row(*row)
    Console(width=140).print(table)
    if options.table is not None:
        lines = [_HEADER, ["---"] * len(_HEADER), *found]
        options.table.write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))


if __name__ == "__main__":
    main()
