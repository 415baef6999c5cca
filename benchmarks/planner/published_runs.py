"""Published training runs with full sharding or HSDP against the planner's predictions, none tuned by row.

python benchmarks/planner/published_runs.py --table docs/results/planner-runs.md

The rows of the first three sources are all that FSDP ran in bfloat16 without float8, compilation or other parallelism;
of MosaicML's, those of models of 7 billion parameters and more with 2,048 tokens. Hardware and its constants are those
of the catalogue, which was there before the rows. What the sources do not say is assumed: MPT has GPT-2's blocks in
MosaicML's sizes; IBM's nodes are joined by 400 Gbit/s, torchtitan's A100 by EFA (p4de). Torchtitan's selection of
operations keeps attention and every second matrix product of a block: of a Llama's seven the first, third, fifth and
seventh. TFLOP/s count recomputation. Models of minGPT, and those of 2021, have attention in pieces, with its scores in
memory. That parameters of PyTorch's run on AWS waited in host memory is left out, and ZeRO-3 of 2021 gathers parameter
by parameter without overlap, as in ``published.py``.

Sources: pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md and docs/performance.md;
foundation-model-stack/fms-fsdp, README.md; mosaicml/llm-foundry, scripts/train/benchmarking/README.md; Zhao et al. 2023
(arXiv 2304.11277), section 5.4; pytorch.org/blog/introducing-pytorch-fully-sharded-data-parallel-api; Narayanan et al.
2021 (arXiv 2104.04473), table 2: ZeRO-3 without model parallelism.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_mics.plan import Candidate, ModelProfile, Plan, Training, evaluate, find_instance
from lightning_mics.plan.profile import Amount, Unit
from lightning_mics.plan.simulate import ZERO3_OF_2021, Engine
from lightning_mics.trace import models, profile_model

_HEADER = ["run", "a GPU", "predicted", "error"]
# Of what matrix products of a block return and compute, what torchtitan keeps and computes again.
_KEPT, _AGAIN = {"llama-3-8b": 0.587, "llama-3-70b": 0.578}, {"llama-3-8b": 0.365, "llama-3-70b": 0.353}
_TRAINING = Training(param_dtype="bfloat16", reduce_dtype="bfloat16")
_SHAPES: dict[str, dict[str, Any]] = {
    "mpt-7b": models._gpt(32, 4096, 32, 2048, 50368),
    "mpt-13b": models._gpt(40, 5120, 40, 2048, 50368),
    "mpt-30b": models._gpt(48, 7168, 56, 2048, 50368),
    "mpt-70b": models._gpt(80, 8192, 64, 2048, 50368),
    "llama-2-34b": models._llama(48, 8192, 64, 22016, key_value_heads=8),
}


@dataclass(frozen=True)
class Run:
    """A run: who reports it, what was trained on which nodes and how, and what is reported."""

    source: str
    model: str
    sequence: int
    instance: str
    gpus: int
    micro_batch: int
    reported: float
    accumulation: int = 1
    recompute: Any = False
    shard_size: int | None = None
    memory: float | None = None
    unit: str = "tokens/s"
    attention: str | None = None
    engine: Engine | None = None

    @property
    def label(self) -> str:
        words = {False: "", True: ", recomputed", "selective": ", selective"}
        recomputed = words.get(self.recompute, ", every 2nd recomputed")
        batch = f"{self.micro_batch} x {self.accumulation}" if self.accumulation > 1 else str(self.micro_batch)
        accelerator = find_instance(self.instance, 1).node.accelerator.name
        return f"{self.source}: {self.model}, {self.gpus} {accelerator}, {batch} x {self.sequence}{recomputed}"


def _mosaic(instance: str, rows: list[tuple[str, int, int, int, bool, int]]) -> list[Run]:
    """Rows are size, GPUs, micro-batch, accumulation, whether blocks are recomputed, tokens/s a GPU."""
    return [
        Run("MosaicML", f"mpt-{size}", 2048, instance, gpus, batch, tokens, steps, recompute)
        for size, gpus, batch, steps, recompute, tokens in rows
    ]


def _gpt3(source: str, sequence: int, instance: str, gpus: int, batch: int, reported: float, **more: Any) -> Run:
    settings = {"recompute": True, "unit": _TFLOPS, "attention": "eager", **more}
    return Run(source, "gpt3-175b", sequence, instance, gpus, batch, reported, **settings)


_TITAN, _IBM, _TFLOPS = "torchtitan", "IBM", "TFLOP/s"
RUNS = [
    Run(_TITAN, "llama-3-8b", 8192, "8xH100-96GB-roce-3200g", 8, 2, 5762, recompute="selective", memory=82.4),
    Run(_TITAN, "llama-3-8b", 8192, "8xH100-96GB-roce-3200g", 128, 2, 5605, recompute="selective", memory=67.0),
    Run(_TITAN, "llama-3-8b", 8192, "p4de.24xlarge", 64, 1, 2904, recompute=2),
    Run(_TITAN, "llama-3-8b", 8192, "p4de.24xlarge", 64, 1, 2973, recompute="selective"),
    Run(_TITAN, "llama-3-70b", 8192, "p4de.24xlarge", 64, 1, 331, recompute=True),
    Run(_IBM, "llama-2-7b", 4096, "8xA100-roce-400g", 128, 2, 3760, shard_size=8),
    Run(_IBM, "llama-2-13b", 4096, "8xA100-roce-400g", 128, 1, 1700, shard_size=8),
    Run(_IBM, "llama-2-34b", 4096, "8xA100-roce-400g", 128, 8, 772, recompute=True),
    Run(_IBM, "llama-2-70b", 4096, "8xA100-roce-400g", 128, 6, 380, recompute=True),
    *_mosaic(
        "8xA100-roce-1600g",
        [
            ("70b", 64, 8, 4, True, 410),
            ("70b", 32, 2, 16, True, 373),
            ("30b", 8, 3, 21, True, 916),
            ("13b", 8, 2, 3, False, 2262),
            ("7b", 8, 6, 2, False, 4641),
        ],
    ),
    *_mosaic(
        "8xA100-40GB-roce-1600g",
        [
            ("70b", 128, 4, 1, True, 376),
            ("70b", 64, 2, 1, True, 276),
            ("30b", 128, 6, 1, True, 865),
            ("30b", 32, 4, 1, True, 857),
            ("13b", 128, 16, 1, True, 1972),
            ("13b", 64, 16, 1, True, 1976),
            ("13b", 32, 14, 1, True, 1998),
            ("13b", 16, 10, 1, True, 1993),
            ("13b", 8, 4, 16, True, 1668),
            ("7b", 128, 18, 1, True, 3623),
            ("7b", 64, 18, 1, True, 3665),
            ("7b", 32, 18, 1, True, 3725),
            ("7b", 16, 16, 1, True, 3645),
            ("7b", 8, 12, 4, True, 3679),
        ],
    ),
    *_mosaic(
        "8xH100-roce-3200g",
        [
            ("70b", 64, 8, 4, True, 1039),
            ("70b", 32, 2, 16, True, 882),
            ("30b", 32, 14, 3, True, 2308),
            ("30b", 16, 10, 3, True, 2263),
            ("30b", 8, 3, 21, True, 2002),
            ("13b", 64, 2, 1, False, 4800),
            ("13b", 32, 2, 1, False, 4811),
            ("13b", 16, 2, 1, False, 4767),
            ("13b", 8, 2, 1, False, 4792),
            ("7b", 8, 6, 1, False, 10643),
        ],
    ),
    _gpt3("Zhao 2023", 2048, "8xA100-roce-2000g", 512, 1, 173),
    _gpt3("Zhao 2023", 2048, "8xA100-roce-2000g", 512, 2, 186),
    _gpt3("PyTorch on AWS", 512, "p4d.24xlarge", 128, 20, 159),
    _gpt3("Narayanan 2021", 2048, "dgx-a100", 384, 4, 144, engine=ZERO3_OF_2021),
]


def _titans(profile: ModelProfile) -> ModelProfile:
    """Returns a profile whose blocks, where products are kept, keep what torchtitan does."""

    @functools.cache
    def changed(block: Unit) -> Unit:
        kept, products = _KEPT[profile.name], block.products
        let_go = Amount(fixed=(1 - kept) * products.fixed, per_sample=(1 - kept) * products.per_sample)
        again = _AGAIN[profile.name] * (block.forward_flops - block.attention_flops)
        return replace(
            block,
            products=Amount(fixed=kept * products.fixed, per_sample=kept * products.per_sample),
            rest=block.rest + let_go,
            backward_flops=block.backward_flops + again,
        )

    return replace(profile, blocks=tuple(map(changed, profile.blocks)))


@functools.cache
def _profile(name: str, sequence: int, attention: str | None) -> ModelProfile:
    models._SHAPES.update(_SHAPES)
    model, sample, _ = models.build_model(name, sequence_length=sequence, attention=attention)
    return profile_model(model, sample, param_dtype="bfloat16", name=name)


def predict(run: Run) -> Plan:
    """Returns what the planner predicts of a run."""
    candidate = Candidate(
        scheme="mesh-2d" if run.shard_size else "full-sharding",
        shard_size=run.shard_size or run.gpus,
        micro_batch=run.micro_batch,
        accumulation=run.accumulation,
        activation_checkpointing=run.recompute,
    )
    profile, cluster = _profile(run.model, run.sequence, run.attention), find_instance(run.instance, run.gpus // 8)
    if run.source == _TITAN and run.recompute == "selective":
        profile = _titans(profile)
    return evaluate(profile, cluster, candidate, _TRAINING, engine=run.engine)


def main() -> None:
    """Predicts and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="write a Markdown table")
    options = parser.parse_args()
    rows, errors = [], []
    for run in RUNS:
        plan = predict(run)
        tokens = plan.samples_per_second * run.sequence / run.gpus
        speed = tokens if run.unit == "tokens/s" else plan.hardware_flops / 1e12
        errors.append(speed / run.reported - 1)
        rows.append([run.label, f"{run.reported:,.0f} {run.unit}", f"{speed:,.0f}", f"{errors[-1]:+.1%}"])
        if run.memory is not None:
            gib = plan.memory.total / 2**30
            rows.append([f"{run.label}: memory", f"{run.memory} GiB", f"{gib:.1f} GiB", f"{gib / run.memory - 1:+.1%}"])
    sizes = [abs(error) for error in errors]
    summary = f"{len(errors)} speeds of {len({run.source for run in RUNS})} sources: median error "
    summary += f"{statistics.median(sizes):.1%}, worst {max(sizes):.1%}, "
    summary += f"mean of signed errors {statistics.mean(errors):+.1%}."
    table = Table(*_HEADER)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table, summary)
    if options.table is not None:
        lines = [_HEADER, ["---", *["---:"] * 3], *rows]
        options.table.write_text("".join("| " + " | ".join(line) + " |\n" for line in lines) + f"\n{summary}\n")


if __name__ == "__main__":
    main()
