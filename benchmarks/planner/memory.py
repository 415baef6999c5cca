"""Predicted against measured memory of a rank: Hugging Face models, trained by real processes on this machine.

python benchmarks/planner/memory.py --json benchmarks/results/planner-memory.jsonl \\
    --table docs/results/planner-memory.md

On CPUs a rank's memory is the growth of its process's resident memory, by the kernel's counters; that of the states is
by how much it shrinks when model and optimizer are dropped between two steps. The allocator is told to return what is
freed (MALLOC_MMAP_THRESHOLD_), so that the counters tell what is in use.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core.resources import ResidentMemory
from lightning_mics.metrics import format_bytes
from lightning_mics.plan import Candidate, Training, predict_memory
from lightning_mics.plan.hardware import Accelerator
from lightning_mics.trace import profile_model

_PARAM_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


@dataclass(frozen=True)
class Combination:
    """What is trained, and how."""

    model: str
    shard_size: int
    precision: str = "32-true"
    optimizer: str = "AdamW"
    checkpointing: bool = False
    reshard: bool = True
    batch: int = 4
    accumulation: int = 2
    ranks: int = 4
    optimizer_shard_size: int | None = None

    @property
    def label(self) -> str:
        sizes = f"p={self.shard_size}"
        if self.optimizer_shard_size is not None:
            sizes += f" q={self.optimizer_shard_size}"
        words = [f"{self.model} {sizes}", self.precision, self.optimizer, f"batch {self.batch}"]
        words += [f"{self.ranks} ranks"] * (self.ranks != 4)
        words += ["recompute"] * self.checkpointing + ["no reshard"] * (not self.reshard)
        return ", ".join(words)


COMBINATIONS = [
    Combination("gpt2", 1),
    Combination("gpt2", 2),
    Combination("gpt2", 4),
    Combination("gpt2", 2, checkpointing=True, batch=8),
    Combination("gpt2", 2, precision="bf16-mixed"),
    Combination("gpt2", 2, reshard=False),
    Combination("bert", 1, optimizer="SGD"),
    Combination("bert", 2, optimizer="RMSprop"),
    Combination("bert", 4, precision="bf16-mixed", checkpointing=True, batch=8),
    Combination("llama", 1, optimizer="Adagrad", batch=2),
    Combination("llama", 2, precision="bf16-true"),
    Combination("llama", 2, batch=8),
    Combination("llama", 4, precision="bf16-mixed"),
    Combination("llama", 4, checkpointing=True, batch=16),
    Combination("gpt2", 2, batch=1, ranks=8),
    Combination("gpt2", 2, batch=1, ranks=8, optimizer_shard_size=8),
    Combination("llama", 2, batch=1, ranks=8, optimizer_shard_size=4),
]


def build(name: str) -> nn.Module:
    """Returns a Hugging Face model of 20 to 60 million parameters on the meta device, without dropout."""
    import transformers as hf

    with torch.device("meta"):
        if name == "gpt2":
            config = hf.GPT2Config(
                n_embd=512, n_layer=8, n_head=8, vocab_size=16384, n_positions=256, use_cache=False, bos_token_id=0,
                eos_token_id=0,
                attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
            )  # fmt: skip
            return hf.GPT2LMHeadModel(config)
        if name == "bert":
            bert = hf.BertConfig(
                hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, vocab_size=16384,
                max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )  # fmt: skip
            return hf.BertForMaskedLM(bert)
        llama = hf.LlamaConfig(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
            intermediate_size=1408, vocab_size=16384, max_position_embeddings=256, use_cache=False,
        )  # fmt: skip
        return hf.LlamaForCausalLM(llama)


def sample(batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Returns a batch of 256 tokens a sample."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 16384, (batch, 256), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def predict(combination: Combination) -> dict[str, float]:
    """Returns the planner's memory by part, in bytes."""
    training = replace(Training.in_precision(combination.precision, combination.optimizer), holds_outputs=False)
    profile = profile_model(build(combination.model), sample(1), param_dtype=training.param_dtype, device_type="cpu")
    cpu = Accelerator(
        name="CPU", memory=2**40, peak_flops={"float32": 1e11}, memory_bandwidth=1e10, compute_efficiency=1.0,
        device_type="cpu",
    )  # fmt: skip
    candidate = Candidate(
        shard_size=combination.shard_size,
        optimizer_shard_size=combination.optimizer_shard_size,
        micro_batch=combination.batch,
        accumulation=combination.accumulation,
        activation_checkpointing=combination.checkpointing,
        reshard_after_forward=combination.reshard,
    )
    memory = predict_memory(profile, candidate, training, cpu)
    # Between steps partial sums are gone, and gradients are those of the rows that a rank steps on.
    gone = memory.partial_sums + memory.gradients * (1 - 1 / candidate.slices)
    return {**memory.parts(), "states": memory.states - gone, "total": memory.total}


def train(combination: Combination) -> tuple[int, int]:
    """Trains two steps; returns the bytes of the states between steps, and of the whole at its peak.

    Collective over the world.
    """
    memory = ResidentMemory()
    model = build(combination.model)
    if combination.precision.endswith("-true") and combination.precision != "32-true":
        model.to(torch.bfloat16)
    config = MiCSConfig(
        shard_size=combination.shard_size,
        optimizer_shard_size=combination.optimizer_shard_size or "partition",
        param_dtype=_PARAM_DTYPES[combination.precision],
        activation_checkpointing=combination.checkpointing,
        reshard_after_forward=combination.reshard,
        verify=False,
    )
    mics_shard(model, config)
    model.train()
    optimizer = getattr(torch.optim, combination.optimizer)(model.parameters(), lr=1e-4)
    memory.restart_peak()
    for step in range(2):
        for microstep in range(combination.accumulation):
            batch = sample(combination.batch, seed=dist.get_rank() + 10 * microstep)
            with defer_replication_sync(model, enabled=microstep + 1 < combination.accumulation):
                (model(**batch).loss / combination.accumulation).backward()
        optimizer.step()
        if step == 0:
            optimizer.zero_grad()
    peak = memory.peak_growth()
    model.state_dict()  # waits for rows from other ranks, which take memory while they are under way
    del batch
    gc.collect()
    before = memory.growth()
    del model, optimizer
    gc.collect()
    return before - memory.growth(), peak


def work(results: Path, numbers: list[int]) -> None:
    """What each rank runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for precision in _PARAM_DTYPES:  # libraries take their memory first
        train(Combination("gpt2", dist.get_world_size(), precision=precision, batch=1))
    for number in numbers:
        gc.collect()
        states, peak = (_largest(size) for size in train(COMBINATIONS[number]))
        if dist.get_rank() == 0:
            with results.open("a") as file:
                file.write(json.dumps({"number": number, "states": states, "peak": peak}) + "\n")
    dist.destroy_process_group()


def _largest(size: int) -> int:
    tensor = torch.tensor(size)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def measure(numbers: list[int], ranks: int) -> dict[int, dict[str, Any]]:
    """Returns what ranks of their own measured, by number of the combination."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [__file__, "--worker", str(results), "--only", *map(str, numbers)]
        subprocess.run(command, env=environment, check=True)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {line["number"]: line for line in lines}


def main() -> None:
    """Measures and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", default=list(range(len(COMBINATIONS))), metavar="N")
    parser.add_argument("--json", type=Path, help="write the figures as JSON lines")
    parser.add_argument("--measured", type=Path, help="take what was measured from JSON lines of all combinations")
    parser.add_argument("--table", type=Path, help="write a Markdown table")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, options.only)
        return
    measured: dict[int, dict[str, Any]] = {}
    if options.measured is not None:
        measured = dict(enumerate(json.loads(line)["measured"] for line in options.measured.read_text().splitlines()))
    for ranks in sorted({COMBINATIONS[number].ranks for number in options.only if number not in measured}):
        measured |= measure([number for number in options.only if COMBINATIONS[number].ranks == ranks], ranks)
    rows = []
    for number in options.only:
        combination = COMBINATIONS[number]
        rows.append({**asdict(combination), "predicted": predict(combination), "measured": measured[number]})
    if options.json is not None:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if options.table is not None:
        options.table.write_text(_markdown(rows, options.only))
    _show(rows, options.only)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for predicted, measured in (("states", "states"), ("total", "peak")):
        size, real = row["predicted"][predicted], row["measured"][measured]
        cells += [format_bytes(size), format_bytes(real), f"{100 * (size / real - 1):+.1f}%"]
    return cells


_HEADER = ["combination", "states predicted", "measured", "error", "peak predicted", "measured", "error"]


def _markdown(rows: list[dict[str, Any]], numbers: list[int]) -> str:
    lines = [_HEADER, ["---"] * len(_HEADER)]
    lines += [[COMBINATIONS[number].label, *_cells(row)] for number, row in zip(numbers, rows, strict=True)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _show(rows: list[dict[str, Any]], numbers: list[int]) -> None:
    table = Table(*_HEADER)
    for number, row in zip(numbers, rows, strict=True):
        table.add_row(COMBINATIONS[number].label, *_cells(row))
    Console(width=140).print(table)
    for number, row in zip(numbers, rows, strict=True):
        parts = itertools.islice(row["predicted"].items(), 9)
        print(number, ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts if size))


if __name__ == "__main__":
    main()
