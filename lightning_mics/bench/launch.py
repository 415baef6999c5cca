"""Runs torchrun on every node of an emulated cluster."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from lightning_mics.bench.cluster import EmulatedCluster, Node
from lightning_mics.bench.loopback import LoopbackCluster
from lightning_mics.bench.namespaces import EmulatorError
from lightning_mics.errors import MiCSConfigError

_POLL = 0.05
_SHOWN_LINES = 25
_TRACEBACK = "Traceback (most recent call last)"

Cluster: TypeAlias = EmulatedCluster | LoopbackCluster


class NodeFailedError(EmulatorError):
    """A script failed on a node; the message has the end of the log that tells most."""


def run_on_cluster(
    cluster: Cluster,
    arguments: Sequence[str],
    *,
    log_dir: Path,
    environment: Mapping[str, str] | None = None,
    on_poll: Callable[[], None] | None = None,
    timeout: float | None = None,
) -> None:
    """Runs a script with ``node_size`` ranks on each node, and waits until all have ended.

    Each node runs torchrun, as one would start it by hand on a real cluster. When one node fails, the others are ended
    at once. However this function is left, nothing that it started still runs.

    Args:
        cluster: An emulated cluster, or one on loopback, within its ``with`` statement.
        arguments: A script and its arguments; or ``-m``, a module and its arguments.
        log_dir: Where to write logs: ``node0/torchrun.log`` and ``node0/ranks/.../stdout.log`` and so on. It must not
            hold logs already.
        environment: Variables to add to those of this process.
        on_poll: Called about twenty times a second meanwhile, and once at the end.
        timeout: Seconds after which to give up.

    Raises:
        NodeFailedError: If a node failed.
        EmulatorError: If ``timeout`` has passed.
        MiCSConfigError: If ``log_dir`` holds logs already.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        stack.callback(cluster.end, processes)
        for node in cluster.nodes:
            folder = _new_folder(log_dir, node.hostname)
            log = stack.enter_context(_torchrun_log(log_dir, node).open("wb"))
            command = [*_torchrun(cluster, node, folder / "ranks"), *arguments]
            variables = _variables(node, environment or {})
            processes.append(
                cluster.popen(node.index, command, environment=variables, stdout=log, stderr=subprocess.STDOUT)
            )
        _wait(cluster, processes, log_dir, on_poll, math.inf if timeout is None else timeout)


def _variables(node: Node, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of a node's torchrun; these two may also come from this process."""
    kept = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")}
    interfaces = {"GLOO_SOCKET_IFNAME": node.interface, "NCCL_SOCKET_IFNAME": node.interface}
    return {**interfaces, **kept, "CUDA_VISIBLE_DEVICES": "", **environment}


def _wait(
    cluster: Cluster,
    processes: Sequence[subprocess.Popen[bytes]],
    log_dir: Path,
    on_poll: Callable[[], None] | None,
    timeout: float,
) -> None:
    """Waits until all nodes have ended, or one has failed."""
    began = time.monotonic()
    while True:
        codes = [process.poll() for process in processes]
        if on_poll is not None:
            on_poll()
        if any(codes):
            raise NodeFailedError(_explain(cluster, log_dir, codes))
        if None not in codes:
            return
        if time.monotonic() - began > timeout:
            unfinished = ", ".join(str(node) for node, code in enumerate(codes) if code is None)
            raise EmulatorError(
                f"After {timeout:g} s the script still ran on node {unfinished}, and was ended. Logs: {log_dir}"
            )
        time.sleep(_POLL)


def _new_folder(log_dir: Path, name: str) -> Path:
    folder = log_dir / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise MiCSConfigError(f"The log folder {log_dir} holds logs already ({name}). Name a new one.") from error
    except OSError as error:
        raise MiCSConfigError(f"The log folder {log_dir} cannot be made ({error}). Name another one.") from error
    return folder


def _torchrun(cluster: Cluster, node: Node, ranks: Path) -> list[str | Path]:
    command: list[str | Path] = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", str(cluster.spec.num_nodes), "--node-rank", str(node.index)]
    command += ["--nproc-per-node", str(cluster.spec.node_size)]
    command += ["--master-addr", cluster.nodes[0].address, "--master-port", str(cluster.port)]
    return [*command, "--local-addr", node.address, "--redirects", "3", "--log-dir", ranks]


def rank_logs(log_dir: Path, node: int, node_size: int) -> dict[tuple[int, str], Path]:
    """Returns the logs of a node's ranks that exist so far, by rank and by ``stdout`` or ``stderr``."""
    # torchrun makes ranks/RUN/attempt_0/LOCAL_RANK/stdout.log.
    paths = sorted((log_dir / f"node{node}" / "ranks").glob("*/attempt_0/*/std*.log"))
    return {(node * node_size + int(path.parent.name), path.stem): path for path in paths}


def _explain(cluster: Cluster, log_dir: Path, codes: Sequence[int | None]) -> str:
    """Names the rank that failed first, with the end of its log."""
    size = cluster.spec.node_size
    logs = {node.index: rank_logs(log_dir, node.index, size) for node in cluster.nodes}
    errors = {rank: path for found in logs.values() for (rank, stream), path in found.items() if stream == "stderr"}
    failures = {}
    for node in cluster.nodes:
        for found in re.finditer(
            r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", _read(_torchrun_log(log_dir, node))
        ):
            failures[node.index * size + int(found[2])] = int(found[1])
    # Others fail because their peer is gone: a rank that a signal ended comes before them, and so does an older log.
    killed = [rank for rank, code in failures.items() if code < 0 and code != -signal.SIGTERM]
    raised = [rank for rank, path in errors.items() if _TRACEBACK in _read(path)]
    raised.sort(key=lambda rank: errors[rank].stat().st_mtime_ns)
    for rank in [*killed, *raised, *failures]:
        end = f" (ended by {signal.Signals(-failures[rank]).name})" if rank in killed else ""
        return f"Rank {rank} on node {rank // size} failed{end}.\n{_end_of(errors.get(rank))}Logs: {log_dir}"
    failed = next(node for node, code in zip(cluster.nodes, codes, strict=True) if code)
    return f"Node {failed.index} failed.\n{_end_of(_torchrun_log(log_dir, failed))}Logs: {log_dir}"


def _torchrun_log(log_dir: Path, node: Node) -> Path:
    return log_dir / node.hostname / "torchrun.log"


def _end_of(path: Path | None) -> str:
    lines = [] if path is None else _read(path).splitlines()
    start = next((number for number, line in enumerate(lines) if _TRACEBACK in line), 0)
    lines = lines[start:][-_SHOWN_LINES:]
    return "".join(f"  {line}\n" for line in lines)


def _read(path: Path) -> str:
    return path.read_text(errors="replace")
