"""Runs experiments: a cluster for each set of links, all contenders in turn, one line of results for each."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.contenders import missing_package
from lightning_mics.bench.experiments import Experiment
from lightning_mics.bench.launch import NodeFailedError, run_on_cluster
from lightning_mics.bench.records import Case, Contender, Record, append, read_results
from lightning_mics.bench.spec import ClusterSpec, format_rate

_PACKAGES = ("torch", "lightning", "transformers", "deepspeed", "lightning-mics")


@dataclass(frozen=True)
class Measurement:
    """One contender in one round of one case."""

    case: Case
    contender: Contender
    round: int


_Advance = Callable[..., None]


def run_experiment(
    experiment: Experiment, results: Path, console: Console, *, fresh: bool = False, log_dir: Path | None = None
) -> None:
    """Measures what the results file does not have yet.

    A contender that cannot run is noted in the results and left out; the others go on.

    Args:
        experiment: What to measure.
        results: A file of JSON lines; new ones are appended.
        console: Where to show progress.
        fresh: Whether to measure again what the file has; of equal measurements, the last one counts.
        log_dir: Where to leave the logs of all ranks; a temporary folder otherwise.

    Raises:
        EmulatorError: If this machine cannot emulate a cluster.
    """
    run = _describe_run()
    todo = _remaining(experiment, [] if fresh or not results.exists() else read_results(results))
    if not todo:
        console.print(f"{results} has all of it already. --fresh measures again.")
        return
    with _bar(console, experiment, len(todo)) as advance:
        todo = _note_missing(todo, run, results, advance)
        for number, (spec, group) in enumerate(_by_cluster(todo)):
            logs = log_dir / f"{experiment.name}-{number}" if log_dir is not None else None
            _run_group(experiment, spec, group, run, results, logs, advance)


def _remaining(experiment: Experiment, records: Sequence[Record]) -> list[Measurement]:
    """Returns the measurements to make: round by round, so that contenders take turns.

    What was skipped stays so: when its package is installed, it becomes another contender by the version.
    """
    done = {record.key() for record in records if record.status in ("ok", "skipped")}
    found = []
    for case in experiment.cases():
        for number, contender in itertools.product(range(experiment.rounds), experiment.contenders_of(case)):
            if (case.key(), contender, number) not in done:
                found.append(Measurement(case, contender, number))
    return found


def _by_cluster(todo: Sequence[Measurement]) -> list[tuple[ClusterSpec, list[Measurement]]]:
    def cluster(item: Measurement) -> tuple[int, int, int | None]:
        return item.case.num_nodes, item.case.node_size, item.case.rate

    groups = []
    for (num_nodes, node_size, rate), items in itertools.groupby(todo, key=cluster):
        groups.append((ClusterSpec(num_nodes=num_nodes, node_size=node_size, rate=rate), list(items)))
    return groups


def _note_missing(todo: list[Measurement], run: dict[str, Any], results: Path, advance: _Advance) -> list[Measurement]:
    kept = []
    for item in todo:
        reason = missing_package(item.contender)
        if reason is None:
            kept.append(item)
        else:
            _append_failure(results, run, item, "skipped", reason)
            advance(item)
    return kept


def _append_failure(results: Path, run: dict[str, Any], item: Measurement, status: str, error: str) -> None:
    append(
        results,
        Record(run=run, case=item.case, contender=item.contender, round=item.round, status=status, error=error),
    )


def _run_group(
    experiment: Experiment,
    spec: ClusterSpec,
    group: list[Measurement],
    run: dict[str, Any],
    results: Path,
    logs: Path | None,
    advance: _Advance,
) -> None:
    """Measures on one cluster; starts anew without a contender that failed."""
    hint = "" if logs is not None else " (deleted; to keep them, name a folder with --log-dir)"
    for attempt in itertools.count():
        if not group:
            return
        with EmulatedCluster(spec) as cluster:
            plan = _write_plan(cluster.folder, experiment, group, run, results)
            follow = _Follow(plan, advance)
            try:
                run_on_cluster(
                    cluster,
                    ["-m", "lightning_mics.bench.worker", str(plan)],
                    log_dir=(logs or cluster.folder / "logs") / str(attempt),
                    environment=_environment(),
                    on_poll=follow,
                )
                return
            except NodeFailedError as error:
                current = follow.current
                if current is None or current == len(group):
                    raise NodeFailedError(f"{error}{hint}") from error
                failed, rest = group[current], group[current:]
                _append_failure(results, run, failed, "failed", f"{error}{hint}")
                group = [item for item in rest if _who(item) != _who(failed)]
                advance(failed, len(rest) - len(group))


def _who(item: Measurement) -> tuple[str, Contender]:
    return item.case.key(), item.contender


def _environment() -> dict[str, str]:
    """Returns variables for the ranks: nothing downloads, and DeepSpeed computes on CPUs."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def _write_plan(
    folder: Path, experiment: Experiment, group: Sequence[Measurement], run: dict[str, Any], results: Path
) -> Path:
    plan = folder / "plan.json"
    content = {
        "run": run,
        "results": str(results.resolve()),
        "current": str(folder / "current"),
        "warmup": experiment.warmup,
        "steps": experiment.steps,
        "measurements": [asdict(item) for item in group],
    }
    plan.write_text(json.dumps(content))
    return plan


class _Follow:
    """Tells the progress bar what the ranks are at, by the file in which they note it."""

    def __init__(self, plan: Path, advance: _Advance) -> None:
        content = json.loads(plan.read_text())
        self._path, self._advance = Path(content["current"]), advance
        self._items = [_measurement(item) for item in content["measurements"]]
        self.current: int | None = None

    def __call__(self) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text()
        number = int(text) if text.strip() else None
        if number is None or number == self.current:
            return
        for index in range(self.current or 0, number):
            self._advance(self._items[index])
        self.current = number
        if number < len(self._items):
            self._advance(self._items[number], 0)


def _measurement(item: dict[str, Any]) -> Measurement:
    return Measurement(Case(**item["case"]), Contender(**item["contender"]), item["round"])


@contextmanager
def _bar(console: Console, experiment: Experiment, total: int) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{experiment.name}: starting processes", total=total)

        def advance(item: Measurement, count: int = 1) -> None:
            where = f"{item.case.num_nodes} x {item.case.node_size} ranks, {format_rate(item.case.rate)}"
            bar.update(task, advance=count, description=f"{experiment.name}: {item.contender.label} ({where})")

        yield advance


def _describe_run() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "id": uuid.uuid4().hex[:8],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "python": platform.python_version(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
    }


def shortened(experiment: Experiment, rounds: int | None, contenders: Sequence[str] | None) -> Experiment:
    """Returns the experiment with what the command line says otherwise."""
    changes: dict[str, Any] = {}
    if rounds is not None:
        changes["rounds"] = rounds
    if contenders:
        changes["contenders"] = tuple(contenders)
    changed = replace(experiment, **changes)
    changed.check()
    return changed
