"""Multi-process tests without a spawn per test: a persistent pool of gloo workers, and parity helpers.

A worker takes seconds to start and a tenth of a second to run another test, so one pool serves a whole test session and
every world size up to its own. Workers are forked from a server that has imported the heavy modules once.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# What forking must not repeat in every worker.
PRELOAD = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "lightning_mics.sharding",
)
# How long ranks may sit in a collective after another rank has failed.
_GRACE_SECONDS = 5.0


class WorkerError(RuntimeError):
    """A function failed on some ranks; the message holds their tracebacks."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank.

    Attributes:
        kind: Name of the exception's class, or ``"WorkerDied"`` or ``"WorkerHung"``.
        message: The exception's message.
        details: Its traceback, or what the worker printed last.
        bases: Names of the exception's classes, its own first.
    """

    kind: str
    message: str
    details: str = ""
    bases: tuple[str, ...] = ()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    log: Path


class WorkerPool:
    """A pool of gloo workers that runs functions in worlds of up to ``size`` ranks.

    Args:
        size: The largest world.
        preload: Further modules that workers should find imported, such as ``"lightning.pytorch"``.

    Example::

        with WorkerPool(4) as pool:
            ranks = pool.run(torch.distributed.get_rank, world_size=4)
    """

    def __init__(self, size: int = 8, preload: Sequence[str] = ()) -> None:
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, *preload])
        self._folder = Path(tempfile.mkdtemp(prefix="mics-pool-"))
        self._workers: list[_Worker | None] = [None] * size
        self._num_runs = 0
        self._num_starts = 0
        self._world: tuple[int, int] | None = None
        atexit.register(self.close)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Runs ``function(*args, **kwargs)`` on each rank of a world, with ``torch.distributed`` up.

        Args:
            function: A function that pickle finds by its name, in a module on the parent's path.
            *args: Its arguments.
            world_size: Number of ranks.
            timeout: Seconds after which the run counts as hung.
            **kwargs: Its keyword arguments.

        Returns:
            The results, by rank.

        Raises:
            WorkerError: If any rank failed, died or hung.
        """
        results = self.attempt(function, *args, world_size=world_size, timeout=timeout, **kwargs)
        failures = {rank: result for rank, result in enumerate(results) if isinstance(result, Failure)}
        if failures:
            name = getattr(function, "__name__", str(function))
            parts = [f"rank {rank}: {f.kind}: {f.message}\n{f.details}" for rank, f in failures.items()]
            raise WorkerError(f"{name} failed on {len(failures)} of {world_size} ranks\n" + "\n".join(parts))
        return results

    def attempt(
        self, function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Like :meth:`run`, but returns a :class:`Failure` in the place of each rank that failed."""
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size={world_size} does not fit the pool of {self.size} workers.")
        workers = [self._worker(rank) for rank in range(world_size)]
        world = (world_size, self._num_starts)
        if world != self._world:
            self._num_runs += 1
        self._world = world
        store = str(self._folder / f"store-{self._num_runs}")
        task = pickle.dumps((function, args, kwargs))
        for rank, worker in enumerate(workers):
            worker.log.write_text("")
            worker.pipe.send((rank, world_size, store, timeout, sys.path, task))
        results = self._collect(workers, timeout)
        if any(isinstance(result, Failure) for result in results):
            self._world = None  # a failed rank may have left its group in the middle of a collective
        return results

    def close(self) -> None:
        """Ends the workers and removes the pool's folder."""
        atexit.unregister(self.close)
        for rank in range(self.size):
            self._end(rank)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _worker(self, rank: int) -> _Worker:
        worker = self._workers[rank]
        if worker is not None and worker.process.is_alive():
            return worker
        self._end(rank)
        self._num_starts += 1
        ours, theirs = self._context.Pipe()
        log = self._folder / f"worker-{rank}.log"
        process = self._context.Process(target=_serve, args=(theirs, str(log)), daemon=True)
        process.start()
        theirs.close()
        worker = self._workers[rank] = _Worker(process, ours, log)
        return worker

    def _end(self, rank: int) -> None:
        worker, self._workers[rank] = self._workers[rank], None
        if worker is not None:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def _collect(self, workers: Sequence[_Worker], timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        ranks = {worker.pipe: rank for rank, worker in enumerate(workers)}
        while len(results) < len(workers):
            waiting = [pipe for pipe, rank in ranks.items() if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                result = results[ranks[pipe]] = self._receive(workers[ranks[pipe]])
                if isinstance(result, Failure):
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        for rank, worker in enumerate(workers):
            if rank not in results:
                os.kill(worker.process.pid, _STACK_SIGNAL)
                time.sleep(0.2)
                results[rank] = Failure("WorkerHung", "no answer in time", worker.log.read_text()[-4000:])
                self._end(rank)
        return [results[rank] for rank in range(len(workers))]

    def _receive(self, worker: _Worker) -> Any:
        try:
            return worker.pipe.recv()
        except EOFError:
            worker.process.join()
            printed = worker.log.read_text()[-4000:]
            return Failure("WorkerDied", f"exit code {worker.process.exitcode}", printed)


_STACK_SIGNAL = 10  # SIGUSR1, at which a worker writes its stack into its log
_pool: WorkerPool | None = None


def get_pool() -> WorkerPool:
    """Returns the pool of this process, started on first use."""
    global _pool
    if _pool is None:
        _pool = WorkerPool(8, preload=("lightning.pytorch", "transformers"))
    return _pool


def _serve(pipe: Connection, log: str) -> None:
    """A worker's life: run what comes through the pipe, until it closes."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.register(_STACK_SIGNAL, file=sys.stderr, all_threads=True)
    torch.set_num_threads(1)
    environ, store = dict(os.environ), ""
    while True:
        try:
            rank, world_size, wanted, timeout, path, task = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        sys.path[:] = path
        try:
            if wanted != store:
                _start_group(rank, world_size, wanted, timeout)
                store = wanted
            function, args, kwargs = pickle.loads(task)
            result = function(*args, **kwargs)
        except BaseException as error:
            store = ""
            bases = tuple(cls.__name__ for cls in type(error).__mro__)
            result = Failure(type(error).__name__, str(error), traceback.format_exc(), bases)
        _restore(environ)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pipe.send(result)
        except Exception as error:
            pipe.send(Failure(type(error).__name__, f"the result cannot be sent: {error}"))


def _start_group(rank: int, world_size: int, store: str, timeout: float) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )


def _restore(environ: Mapping[str, str]) -> None:
    """Undoes what tests leave behind in a process."""
    os.environ.clear()
    os.environ.update(environ)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)
    gc.collect()


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the whole parameters and buffers of a sharded model, on every rank. Collective over the partition."""

    def whole(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()

    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def relative_difference(actual: float, expected: float) -> float:
    """Returns ``|actual - expected| / |expected|``."""
    return abs(actual - expected) / max(abs(expected), 1e-30)


def weight_differences(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns each tensor's largest difference, as a share of the expected tensor's largest magnitude."""
    return {
        name: ((actual[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30)).item()
        for name, tensor in expected.items()
        if tensor.numel() and tensor.is_floating_point()
    }


def assert_parity(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Checks that weights agree.

    Args:
        actual: Whole tensors by name.
        expected: What they should be.
        tolerance: Largest difference allowed, as a share of the tensor's largest magnitude.

    Raises:
        AssertionError: Naming the tensor that differs most.
    """
    missing = sorted(expected.keys() - actual.keys())
    assert not missing, f"missing tensors: {missing}"
    differences = weight_differences(actual, expected)
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= tolerance, f"{worst} differs by {differences[worst]:.2e} of its largest magnitude"
