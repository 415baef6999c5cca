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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.contenders import reason_to_skip
from lightning_mics.bench.experiments import Experiment
from lightning_mics.bench.launch import Cluster, NodeFailedError, run_on_cluster
from lightning_mics.bench.loopback import LoopbackCluster
from lightning_mics.bench.records import Measurement, Record, append, read_results
from lightning_mics.bench.site import Site, open_site
from lightning_mics.bench.spec import ClusterSpec, format_rate

_PACKAGES = ("torch", "lightning", "transformers", "deepspeed", "lightning-mics")


_Advance = Callable[..., None]

# For the ranks: nothing downloads, and DeepSpeed computes on CPUs.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


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
        EmulatorError: If this machine cannot emulate a cluster, and the experiment is for CPUs.
        MiCSError: If it is for cards, and there is none.
    """
    with open_site(experiment.device, experiment.most_ranks) as site:
        for note in site.notes:
            console.print(note, markup=False)
        _run_at(site, experiment, results, console, fresh, log_dir)


def _run_at(
    site: Site, experiment: Experiment, results: Path, console: Console, fresh: bool, log_dir: Path | None
) -> None:
    todo = _remaining(experiment, site, [] if fresh or not results.exists() else read_results(results))
    if not todo:
        console.print(f"{results} has all of it already. --fresh measures again.")
        return
    with _bar(console, experiment, len(todo)) as advance:
        run = _Run(experiment, site, results, advance)
        todo = run.note_missing(todo)
        for number, (spec, group) in enumerate(itertools.groupby(todo, key=lambda item: item.case.cluster)):
            run.measure(spec, list(group), log_dir / f"{experiment.name}-{number}" if log_dir is not None else None)


def _remaining(experiment: Experiment, site: Site, records: Sequence[Record]) -> list[Measurement]:
    """Returns the measurements to make: round by round, so that contenders take turns.

    What was skipped stays so: when its package is installed, it becomes another contender by the version.
    """
    done = {record.key() for record in records if record.status in ("ok", "skipped")}
    found = []
    for case in experiment.cases(site.hardware):
        for number, contender in itertools.product(range(experiment.rounds), experiment.contenders_of(case)):
            if (case.key(), contender, number) not in done:
                found.append(Measurement(case, contender, number))
    return found


class _Run:
    """What one run of an experiment adds to its results."""

    def __init__(self, experiment: Experiment, site: Site, results: Path, advance: _Advance) -> None:
        self._experiment, self._site, self._results, self._advance = experiment, site, results, advance
        self._facts = _describe_run(site)

    def note_missing(self, todo: Sequence[Measurement]) -> list[Measurement]:
        """Returns what can be measured here, and notes what cannot."""
        kept = []
        for item in todo:
            reason = reason_to_skip(item.case, item.contender)
            if reason is None:
                kept.append(item)
            else:
                self._append(item, "skipped", reason)
                self._advance(item)
        return kept

    def measure(self, spec: ClusterSpec, group: list[Measurement], logs: Path | None) -> None:
        """Measures on one cluster; starts anew without a contender that failed."""
        hint = "" if logs is not None else " (deleted; to keep them, name a folder with --log-dir)"
        for attempt in itertools.count():
            if not group:
                return
            with self._cluster(spec) as cluster:
                follow = _Follow(cluster.folder / "current", group, self._advance)
                try:
                    run_on_cluster(
                        cluster,
                        ["-m", "lightning_mics.bench.worker", str(self._write_plan(cluster.folder, group))],
                        log_dir=(logs or cluster.folder / "logs") / str(attempt),
                        environment={**_ENVIRONMENT, **self._site.environment},
                        on_poll=follow,
                    )
                    return
                except NodeFailedError as error:
                    if follow.current is None or follow.current == len(group):
                        raise NodeFailedError(f"{error}{hint}") from error
                    failed, rest = group[follow.current], group[follow.current :]
                    self._append(failed, "failed", f"{error}{hint}")
                    group = [item for item in rest if (item.case, item.contender) != (failed.case, failed.contender)]
                    self._advance(failed, len(rest) - len(group))

    def _cluster(self, spec: ClusterSpec) -> Cluster:
        if self._site.is_loopback:
            return LoopbackCluster(spec)
        # Clients of CUDA's multi-process service meet it in shared memory.
        return EmulatedCluster(spec, shared_memory=bool(self._site.hardware))

    def _append(self, item: Measurement, status: str, error: str) -> None:
        append(self._results, item.record(self._facts, status, error=error))

    def _write_plan(self, folder: Path, group: Sequence[Measurement]) -> Path:
        plan = folder / "plan.json"
        content = {
            "run": self._facts,
            "hardware": self._site.hardware,
            "results": str(self._results.resolve()),
            "current": str(folder / "current"),
            "warmup": self._experiment.warmup,
            "steps": self._experiment.steps,
            "measurements": [asdict(item) for item in group],
        }
        plan.write_text(json.dumps(content))
        return plan


class _Follow:
    """Tells the progress bar what the ranks are at, by the file in which they note it."""

    def __init__(self, path: Path, group: Sequence[Measurement], advance: _Advance) -> None:
        self._path, self._group, self._advance = path, group, advance
        self.current: int | None = None

    def __call__(self) -> None:
        text = self._path.read_text().strip() if self._path.exists() else ""
        if not text or int(text) == self.current:
            return
        for item in self._group[self.current or 0 : int(text)]:
            self._advance(item)
        self.current = int(text)
        for item in self._group[self.current :][:1]:
            self._advance(item, 0)


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


def _describe_run(site: Site) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "id": uuid.uuid4().hex[:8],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {**versions, **site.versions},
        "python": platform.python_version(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release().split("-")[0],
    }


def shortened(
    experiment: Experiment, rounds: int | None, contenders: Sequence[str] | None, device: str | None = None
) -> Experiment:
    """Returns the experiment with what the command line says otherwise."""
    changes: dict[str, Any] = {}
    if rounds is not None:
        changes["rounds"] = rounds
    if contenders:
        changes["contenders"] = tuple(contenders)
    if device is not None:
        changes["device"] = device
    changed = replace(experiment, **changes)
    changed.check()
    return changed
