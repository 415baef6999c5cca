"""``mics bench``: an emulated cluster on this machine, and what to run on it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.launch import NodeFailedError, rank_logs, run_on_cluster
from lightning_mics.bench.namespaces import clean
from lightning_mics.bench.records import DEVICES
from lightning_mics.bench.spec import ClusterSpec, format_rate, parse_rate
from lightning_mics.errors import MiCSConfigError
from lightning_mics.metrics import format_bytes
from lightning_mics.processes import exit_on_signals

_Run = Callable[[argparse.Namespace], int | None]


def configure(parser: argparse.ArgumentParser) -> _Run:
    """Adds the commands of ``mics bench`` to its parser; returns what runs the chosen one."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (summary, configure_command) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run_bench=configure_command(command))
    return _run_command


def _run_command(options: argparse.Namespace) -> int | None:
    exit_on_signals()
    run: _Run = options.run_bench
    return run(options)


def add_cluster_options(parser: argparse.ArgumentParser, nodes: int, ranks: int, rate: str) -> None:
    """Adds the options that describe an emulated cluster, with their defaults; :func:`spec_of` reads them."""
    add = parser.add_argument
    add("--nodes", type=int, default=nodes, metavar="N", help=f"number of nodes (default: {nodes})")
    add("--ranks", type=int, default=ranks, metavar="N", help=f"ranks a node (default: {ranks})")
    add("--rate", default=rate, help=f"of each node's link, such as 1gbit, or none for no limit (default: {rate})")
    add("--mtu", type=int, default=9000, metavar="BYTES", help="largest packet of the links (default: 9000)")


def spec_of(options: argparse.Namespace) -> ClusterSpec:
    """Returns the cluster that the options of :func:`add_cluster_options` describe.

    Raises:
        MiCSConfigError: If an option cannot work.
    """
    rate = parse_rate(options.rate)
    return ClusterSpec(num_nodes=options.nodes, node_size=options.ranks, rate=rate, mtu=options.mtu)


def _configure_cluster(parser: argparse.ArgumentParser) -> _Run:
    add_cluster_options(parser, nodes=4, ranks=2, rate="100mbit")
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="leave the logs in this folder (default: none left)"
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    parser.add_argument("script", metavar="SCRIPT", help="what each rank runs, as for torchrun")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script")
    return _cluster


def _cluster(options: argparse.Namespace) -> int:
    spec = spec_of(options)
    if not options.module and not Path(options.script).is_file():
        raise MiCSConfigError(f"There is no file {options.script}. Name a Python script, or a module after -m.")
    with EmulatedCluster(spec) as cluster:
        log_dir = options.log_dir or cluster.folder / "logs"
        echo = _Echo(cluster, log_dir)
        began = time.monotonic()
        try:
            arguments = [*(["-m"] if options.module else []), options.script, *options.arguments]
            run_on_cluster(cluster, arguments, log_dir=log_dir, on_poll=echo)
        except NodeFailedError as error:
            echo(whole_lines=False)
            hint = "" if options.log_dir else " (deleted; to keep them, name a folder with --log-dir)"
            print(f"mics: {error}{hint}", file=sys.stderr)
            return 1
        elapsed = time.monotonic() - began
        echo(whole_lines=False)
        _print_traffic(spec, cluster.sent_bytes(), elapsed)
    if options.log_dir:
        print(f"Logs: {options.log_dir}")
    return 0


class _Echo:
    """Prints whole lines of the ranks' logs as they grow, each with its node and rank."""

    def __init__(self, cluster: EmulatedCluster, log_dir: Path) -> None:
        self._spec = cluster.spec
        self._log_dir = log_dir
        self._read: dict[Path, int] = {}

    def __call__(self, whole_lines: bool = True) -> None:
        for node in range(self._spec.num_nodes):
            for (rank, stream), path in rank_logs(self._log_dir, node, self._spec.node_size).items():
                screen = sys.stdout if stream == "stdout" else sys.stderr
                self._print_file(path, f"[node {node}, rank {rank}] ", screen, whole_lines)

    def _print_file(self, path: Path, prefix: str, screen: TextIO, whole_lines: bool) -> None:
        already = self._read.get(path, 0)
        if path.stat().st_size == already:
            return
        with path.open("rb") as file:
            file.seek(already)
            new = file.read()
        if whole_lines:
            new = new[: new.rfind(b"\n") + 1]
        self._read[path] = already + len(new)
        for line in new.decode(errors="replace").splitlines():
            print(f"{prefix}{line}", file=screen)
        screen.flush()


def _print_traffic(spec: ClusterSpec, sent: Sequence[int], elapsed: float) -> None:
    from rich.console import Console
    from rich.table import Table

    limit = format_rate(spec.rate)
    table = Table(title=f"What left each node in {elapsed:.1f} s, start included", title_justify="left")
    for name in ("node", "sent", "average rate", f"of its link ({limit})"):
        table.add_column(name, justify="right")
    for node, count in enumerate(sent):
        rate = count * 8 / elapsed
        share = "-" if spec.rate is None else f"{rate / spec.rate:.0%}"
        table.add_row(str(node), format_bytes(count), format_rate(rate), share)
    Console(highlight=False).print(table)


def _configure_clean(parser: argparse.ArgumentParser) -> _Run:
    parser.add_argument(
        "--all", action="store_true", help="remove clusters that are in use, too, and end what they run"
    )
    return _clean


def _clean(options: argparse.Namespace) -> None:
    removed = clean(everything=options.all)
    for name in removed:
        print(f"Removed {name}")
    if not removed:
        print("Nothing to remove.")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--results", type=Path, metavar="FILE", help="JSON lines to append to (default: mics-bench/EXPERIMENT.jsonl)")
    add("--fresh", action="store_true", help="measure everything again, also what the results file has")
    add("--rounds", type=int, metavar="N", help="how often each contender is measured (default: the experiment's)")
    add("--contenders", metavar="NAMES", help="only these, separated by commas, for example full-sharding,mics:node")
    add("--log-dir", type=Path, metavar="DIR", help="leave the logs of all ranks in this folder")
    add("--device", choices=DEVICES, help="what ranks compute on; cuda: this machine's cards (default: cpu)")


def _configure_run(parser: argparse.ArgumentParser) -> _Run:
    parser.add_argument("experiments", metavar="EXPERIMENT", nargs="+", help="its name (see list), or a YAML file")
    _add_run_options(parser)
    return _run


def _configure_headline(parser: argparse.ArgumentParser) -> _Run:
    _add_run_options(parser)
    return _headline


def _headline(options: argparse.Namespace) -> None:
    # A card takes a larger model.
    options.experiments = ["headline-cuda" if options.device == "cuda" else "headline"]
    _run(options)


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from lightning_mics.bench.experiments import load_experiment
    from lightning_mics.bench.report import print_report
    from lightning_mics.bench.runner import run_experiment, shortened

    contenders = options.contenders.split(",") if options.contenders else None
    experiments = [
        shortened(load_experiment(name), options.rounds, contenders, options.device) for name in options.experiments
    ]
    console = Console(highlight=False)
    for experiment in experiments:
        results = options.results or Path("mics-bench") / f"{experiment.name}.jsonl"
        console.print(f"[bold]{experiment.name}[/]: {experiment.about}")
        run_experiment(experiment, results, console, fresh=options.fresh, log_dir=options.log_dir)
        print_report(results, console)
        console.print(f"Results: {results}. Tables and figures: mics bench report {results}")


def _configure_report(parser: argparse.ArgumentParser) -> _Run:
    parser.add_argument("results", type=Path, nargs="+", help="files that mics bench run wrote")
    parser.add_argument(
        "--out", type=Path, default=Path("mics-bench/report"), metavar="DIR", help="(default: %(default)s)"
    )
    return _report


def _report(options: argparse.Namespace) -> None:
    from rich.console import Console

    from lightning_mics.bench.report import print_report, write_report

    console = Console(highlight=False)
    for path in options.results:
        print_report(path, console)
    written = write_report(options.results, options.out)
    console.print(f"Wrote {written[0]} and {len(written) - 1} figures.")


def _configure_list(parser: argparse.ArgumentParser) -> _Run:
    return _list


def _list(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from lightning_mics.bench.experiments import built_in_names, load_experiment

    table = Table("experiment", "what it shows")
    for name in built_in_names():
        table.add_row(name, load_experiment(name).about)
    Console(highlight=False).print(table)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], _Run]]] = {
    "cluster": (
        "run a torchrun script on an emulated cluster: nodes joined by slow links (needs root)",
        _configure_cluster,
    ),
    "headline": (
        "compare MiCS with its peers on an emulated cluster, in a few minutes (on CPUs needs root)",
        _configure_headline,
    ),
    "run": ("run experiments on emulated clusters, and go on where a run was stopped (needs root)", _configure_run),
    "list": ("show the experiments that come with the package", _configure_list),
    "report": ("turn results into tables and figures", _configure_report),
    "clean": ("remove what emulated clusters left behind when they were killed", _configure_clean),
}
