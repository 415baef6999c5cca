"""Predicted against measured step times, on emulated clusters whose links `mics plan --measure` has measured.

python benchmarks/planner/step_time.py --json benchmarks/results/planner-step-time.jsonl \\
    --table docs/results/planner-step-time.md
python benchmarks/planner/step_time.py --experiment scale

Linux, as root, about twenty minutes. Each cluster is first measured, then all contenders train on it in turn. Blocks
compute for given times without using a CPU, so that the ranks of a few cores stand for accelerators.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.experiments import load_experiment
from lightning_mics.bench.launch import run_on_cluster
from lightning_mics.bench.records import Case, Contender, Record, read_results
from lightning_mics.bench.runner import run_experiment
from lightning_mics.bench.spec import format_rate
from lightning_mics.bench.workload import ModelSpec, build_model, microbatch
from lightning_mics.plan import Candidate, Cluster, ModelProfile, Plan, Training, evaluate, load_cluster
from lightning_mics.plan.evaluate import peak_flops
from lightning_mics.trace import profile_model

_HERE = Path(__file__).parent
_EXPERIMENTS = [str(_HERE / "step-time-single.yaml"), str(_HERE / "step-time.yaml")]
_TRAINING = Training(param_dtype="float32")
_SCHEMES: dict[str, Any] = {name: name for name in ("mics", "full-sharding", "mesh-2d", "ddp")}
_HEADER = ["nodes", "link", "accumulation", "contender", "measured", "predicted", "error"]


@dataclass(frozen=True)
class Comparison:
    """One contender on one cluster; times in seconds."""

    case: Case
    contender: Contender
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    def cells(self) -> list[str]:
        return [
            str(self.case.num_nodes),
            format_rate(self.case.rate),
            str(self.case.accumulation),
            self.contender.label,
            f"{self.measured:.2f} s",
            f"{self.predicted:.2f} s",
            f"{100 * self.error:+.1f}%",
        ]


def make_model() -> tuple[nn.Module, dict[str, Any]]:
    """What `mics plan --measure --model` computes with on each rank."""
    spec = _spec(load_experiment(str(_HERE / "step-time.yaml")).cases()[0])
    tokens = microbatch(spec, 1, 0, 0, 1)
    return build_model(spec), {"input_ids": tokens, "labels": tokens}


def _spec(case: Case) -> ModelSpec:
    return ModelSpec(layers=case.model["num_layers"], width=case.model["width"], sequence=case.model["sequence_length"])


def measure_cluster(case: Case, folder: Path) -> Cluster:
    """Returns what `mics plan --measure` finds on an emulated cluster."""
    name = f"{case.num_nodes}x{case.node_size}-{case.rate}"
    file = folder / f"{name}.yaml"
    if not file.exists():
        arguments = ["-m", "lightning_mics", "plan", "--measure", "--model", "step_time:make_model"]
        arguments += ["--precision", "32-true", "--save-cluster", str(file)]
        spec = case.cluster
        with EmulatedCluster(spec) as cluster:
            environment = {"PYTHONPATH": str(_HERE), "HF_HUB_OFFLINE": "1"}
            run_on_cluster(cluster, arguments, log_dir=folder / f"{name}-logs", environment=environment)
    return load_cluster(file)


def with_emulated_compute(profile: ModelProfile, case: Case, cluster: Cluster) -> ModelProfile:
    """Returns the profile with operations that take as long as the emulated compute of a block."""
    rate = peak_flops(cluster, _TRAINING) * cluster.node.accelerator.compute_efficiency
    forward, backward = (seconds * rate / case.microbatch_size for seconds in case.compute)
    slower = functools.cache(
        lambda block: dataclasses.replace(
            block,
            forward_flops=block.forward_flops + forward,
            backward_flops=block.backward_flops + backward,
        )
    )
    return dataclasses.replace(profile, blocks=tuple(slower(block) for block in profile.blocks))


def predict(case: Case, contender: Contender, profile: ModelProfile, cluster: Cluster) -> Plan:
    """Returns what the planner says of a contender."""
    in_training = {name: value for name, value in contender.settings.items() if name == "replication_reduce_dtype"}
    in_candidate = {name: value for name, value in contender.settings.items() if name not in in_training}
    candidate = Candidate(
        scheme=_SCHEMES[contender.name],
        shard_size=contender.shard_size,
        hierarchical=contender.hierarchical,
        optimizer_shard_size=contender.optimizer_shard_size,
        micro_batch=case.microbatch_size,
        accumulation=case.accumulation,
        **in_candidate,
    )
    training = dataclasses.replace(_TRAINING, **in_training)
    return evaluate(with_emulated_compute(profile, case, cluster), cluster, candidate, training)


def compare(records: list[Record], folder: Path) -> Iterator[Comparison]:
    """Yields comparisons, by case."""
    model, sample = make_model()
    profile = profile_model(model, sample, param_dtype="float32", device_type="cpu", wrap=["GPT2Block"])

    def key(record: Record) -> tuple[str, str]:
        return record.case.key(), record.contender.label

    for _, group in itertools.groupby(sorted(records, key=key), key=key):
        found = list(group)
        case, contender = found[0].case, found[0].contender
        measured = statistics.median(seconds for record in found for seconds in record.step_seconds)
        cluster = measure_cluster(case, folder)
        yield Comparison(case, contender, measured, predict(case, contender, profile, cluster).time.seconds)


def misordered(comparisons: list[Comparison]) -> list[str]:
    """Returns pairs of contenders that the planner ranks the other way round, in words."""
    wrong = []
    for before, after in itertools.combinations(comparisons, 2):
        same = before.case.key() == after.case.key()
        if same and (before.measured - after.measured) * (before.predicted - after.predicted) < 0:
            gap = abs(before.measured / after.measured - 1)
            wrong.append(f"{before.contender.label} and {after.contender.label}, {100 * gap:.1f}% apart")
    return wrong


def errors_of_ratios(comparisons: list[Comparison]) -> list[float]:
    """Returns how far off the ratio of two step times is, for each pair of contenders of a case."""
    pairs = itertools.combinations(comparisons, 2)
    ratios = [(one, other) for one, other in pairs if one.case.key() == other.case.key()]
    return sorted(abs((1 + one.error) / (1 + other.error) - 1) for one, other in ratios)


def summarise(comparisons: list[Comparison]) -> str:
    """Returns the errors in a sentence: of steps, and of the ratio of two of them."""
    steps = sorted(abs(comparison.error) for comparison in comparisons)
    ratios = errors_of_ratios(comparisons)
    return (
        f"{len(steps)} steps: error {statistics.median(steps):.1%} in the median, {steps[-1]:.1%} at most. "
        f"{len(ratios)} pairs of contenders: error of the ratio of their steps {statistics.median(ratios):.1%} in the "
        f"median, {ratios[-1]:.1%} at most. Ranked the other way round: {'; '.join(misordered(comparisons)) or 'none'}."
    )


def main() -> None:
    """Measures and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures as JSON lines")
    parser.add_argument("--table", type=Path, help="write a Markdown table")
    parser.add_argument("--experiment", nargs="+", default=_EXPERIMENTS, help="what to measure")
    parser.add_argument("--folder", type=Path, help="keep measurements here, and go on from what is there")
    options = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = folder / "records.jsonl"
        for experiment in map(load_experiment, options.experiment):
            for case in experiment.cases():
                measure_cluster(case, folder)
            run_experiment(experiment, results, console)
        records = [
            record for record in read_results(results) if record.status == "ok" and record.contender.name in _SCHEMES
        ]
        found = list(compare(records, folder))
    table = Table(*_HEADER)
    for comparison in found:
        table.add_row(*comparison.cells())
    console.print(table)
    console.print(summarise(found))
    if options.json is not None:
        lines = [json.dumps({**dataclasses.asdict(item), "error": item.error}) for item in found]
        options.json.write_text("".join(line + "\n" for line in lines))
    if options.table is not None:
        rows = [_HEADER, ["---"] * len(_HEADER), *(comparison.cells() for comparison in found)]
        lines = "".join("| " + " | ".join(row) + " |\n" for row in rows)
        options.table.write_text(f"{lines}\n{summarise(found)}\n")


if __name__ == "__main__":
    main()
