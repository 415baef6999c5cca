"""Multi-process tests without a spawn per test: a persistent pool of gloo workers, and parity helpers.

A worker takes seconds to start and a tenth of a second to run another test, so one pool serves a whole test session and
every world size up to its own. Workers are forked from a server that has imported the heavy modules once.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from io import TextIOWrapper
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics.core._torch import forget_dtensor_meshes

# What forking must not repeat in every worker. Optimizers import Dynamo at their first step.
PRELOAD = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "lightning_mics.sharding",
)
_START_SECONDS = 120.0
_STACK_SECONDS = 5.0
_PRINTED_CHARACTERS = 8000


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank.

    Attributes:
        kind: Name of the exception's class; ``"WorkerDied"`` for a process that ended without an answer,
            ``"WorkerHung"`` for one that was ended because it gave none in time.
        message: The exception's message.
        details: The exception's traceback.
        bases: Names of the exception's class and its base classes.
        exitcode: Exit code of a worker that died, negative for a signal.
        printed: What the worker wrote to its output last; the Python stacks of its threads if it hung.
    """

    kind: str
    message: str
    details: str = ""
    bases: tuple[str, ...] = ()
    exitcode: int | None = None
    printed: str = ""

    def __str__(self) -> str:
        printed = f"--- output ---\n{self.printed}" if self.printed else ""
        return "\n".join(filter(None, (f"{self.kind}: {self.message}", self.details, printed)))


class WorkerError(RuntimeError):
    """A function failed on some ranks; the message holds their tracebacks.

    Attributes:
        failures: What went wrong, by rank.
    """

    def __init__(self, name: str, world_size: int, failures: Mapping[int, Failure]) -> None:
        parts = [f"===== rank {rank}: {failure}" for rank, failure in failures.items()]
        super().__init__("\n".join([f"{name} failed on {len(failures)} of {world_size} ranks", *parts]))
        self.failures = dict(failures)


class WorkerPool:
    """A pool of gloo workers that runs functions in worlds of up to ``size`` ranks.

    Workers start when they are first needed and stay. Each run gets process groups of its own (a ``FileStore``, no
    ports), seed 0, and the environment variables, default dtype and working directory that the workers began with;
    ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE`` and ``LOCAL_WORLD_SIZE`` are those of a launch on one machine. Workers end
    with their parent, however it ends; only a parent that is killed leaves the pool's temporary folder behind.

    Args:
        size: The largest world.
        preload: Further modules that workers should find imported, such as ``"lightning.pytorch"``. Only the first
            pool of a process can choose them.
        grace: Seconds that ranks may go on after another rank has failed, before they count as hung.

    Example::

        with WorkerPool(4) as pool:
            ranks = pool.run(torch.distributed.get_rank, world_size=4)
    """

    def __init__(self, size: int = 8, preload: Sequence[str] = (), grace: float = 5.0) -> None:
        self.size = size
        self.grace = grace
        self.closed = False
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*preload, *PRELOAD])
        self._folder = Path(tempfile.mkdtemp(prefix="mics-pool-"))
        self._workers: dict[int, _Worker] = {}
        self._num_runs = 0
        self._owner = os.getpid()
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
            timeout: Seconds after which the run counts as hung; the start of workers is not counted.
            **kwargs: Its keyword arguments.

        Returns:
            The results, by rank.

        Raises:
            WorkerError: If any rank failed, died or hung.
        """
        outcomes = self.attempt(function, *args, world_size=world_size, timeout=timeout, **kwargs)
        failures = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
        if failures:
            raise WorkerError(getattr(function, "__name__", str(function)), world_size, failures)
        return outcomes

    def attempt(
        self, function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Like :meth:`run`, but returns a :class:`Failure` in the place of each rank that failed."""
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size={world_size} does not fit the pool: choose 1 to {self.size}.")
        if self.closed:
            raise ValueError("The pool is closed.")
        call = pickle.dumps((function, args, kwargs))
        try:
            workers = self._started(world_size)
            self._num_runs += 1
            store = str(self._folder / f"store-{self._num_runs}")
            for rank, worker in enumerate(workers):
                worker.send(_Task(rank, world_size, store, timeout, list(sys.path), call))
            outcomes = self._collect(workers, timeout)
        except BaseException:
            self._end(range(world_size))  # an interrupted run must not go on, nor answer the next one
            raise
        if any(isinstance(outcome, Failure) for outcome in outcomes):
            self._end(range(world_size))  # who failed may have left others in the middle of a collective
        return outcomes

    def close(self) -> None:
        """Ends the workers and removes the pool's folder."""
        if self.closed or os.getpid() != self._owner:
            return
        self.closed = True
        atexit.unregister(self.close)
        self._end(list(self._workers))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _started(self, world_size: int) -> list[_Worker]:
        for rank in range(world_size):
            if rank in self._workers and self._workers[rank].has_died():
                self._end([rank])
            if rank not in self._workers:
                self._workers[rank] = _Worker(self._context, self._folder, rank)
        workers = [self._workers[rank] for rank in range(world_size)]
        for worker in workers:
            worker.wait_until_started()
        return workers

    def _end(self, ranks: Sequence[int]) -> None:
        ending = [self._workers.pop(rank) for rank in ranks if rank in self._workers]
        for worker in ending:
            worker.kill()
        for worker in ending:
            worker.forget()

    def _collect(self, workers: Sequence[_Worker], timeout: float) -> list[Any]:
        outcomes: dict[int, Any] = {}
        ranks = {worker.pipe: rank for rank, worker in enumerate(workers)}
        deadline, reason = time.monotonic() + timeout, f"no answer after {timeout:g} s"
        while len(outcomes) < len(workers):
            waiting = [pipe for pipe, rank in ranks.items() if rank not in outcomes]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = ranks[pipe]  # type: ignore[index]
                outcomes[rank] = workers[rank].receive()
                grace_ends = time.monotonic() + self.grace
                if isinstance(outcomes[rank], Failure) and grace_ends < deadline:
                    deadline, reason = grace_ends, f"no answer {self.grace:g} s after rank {rank} failed"
        hung = {rank: worker for rank, worker in enumerate(workers) if rank not in outcomes}
        for worker in hung.values():
            worker.request_stacks()
        for rank, worker in hung.items():
            worker.process.join(_STACK_SECONDS)
            outcomes[rank] = Failure("WorkerHung", reason, printed=worker.printed())
        return [outcomes[rank] for rank in range(len(workers))]


_pool: WorkerPool | None = None


def get_pool(preload: Sequence[str] = ()) -> WorkerPool:
    """Returns the pool of this process, made on first use, with ``preload`` imported in its workers."""
    global _pool
    if _pool is None or _pool.closed:
        _pool = WorkerPool(preload=preload)
    return _pool


@dataclass(frozen=True)
class _Task:
    rank: int
    world_size: int
    store: str
    timeout: float
    path: list[str]
    call: bytes


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, context: ForkServerContext, folder: Path, rank: int) -> None:
        self.pipe, theirs = context.Pipe()
        self._log = folder / f"worker-{rank}.log"
        # Not a daemon process: those may have no children, such as the workers of a DataLoader.
        self.process = context.Process(target=_serve, args=(theirs, str(self._log)), name=f"mics-worker-{rank}")
        self.process.start()
        theirs.close()
        self._started = False

    def wait_until_started(self) -> None:
        if self._started:
            return
        if not self.pipe.poll(_START_SECONDS):
            raise RuntimeError(f"{self.process.name} did not start in {_START_SECONDS:g} s.")
        try:
            self._started = bool(self.pipe.recv_bytes())
        except (EOFError, OSError):
            raise RuntimeError(f"{self.process.name} did not start; its standard error says why.") from None

    def has_died(self) -> bool:
        # Between tasks a worker has nothing to say, so only the end of its pipe can be there to read. The process
        # object learns of a death later, from the fork server.
        return self._started and self.pipe.poll()

    def send(self, task: _Task) -> None:
        self._log.write_text("")
        with suppress(OSError):  # a worker that has died is found by receive()
            self.pipe.send_bytes(pickle.dumps(task))

    def receive(self) -> Any:
        try:
            outcome = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join()
            exitcode = self.process.exitcode
            outcome = Failure("WorkerDied", f"exit code {exitcode}", exitcode=exitcode)
        except Exception as error:
            outcome = _failure(error, "the result cannot be unpickled: ")
        return replace(outcome, printed=self.printed()) if isinstance(outcome, Failure) else outcome

    def printed(self) -> str:
        return self._log.read_text(errors="replace")[-_PRINTED_CHARACTERS:]

    def request_stacks(self) -> None:
        """Makes the worker write its stacks into its log and die."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """Kills the worker with the processes that it has started."""
        if self.process.is_alive() and self.process.pid is not None:
            with suppress(ProcessLookupError):  # it has no session of its own yet
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()

    def forget(self) -> None:
        self.process.join()
        self.process.close()
        self.pipe.close()


def _serve(pipe: Connection, log: str) -> None:
    """A worker's life: run what comes through the pipe, until it closes."""
    os.setsid()  # out of reach of Ctrl-C; the parent ends the worker and its children as one group
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    for stream in (sys.stdout, sys.stderr):
        cast(TextIOWrapper, stream).reconfigure(line_buffering=True)  # a worker that hangs flushes no more
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, chain=True)  # write all stacks, then die as SIGUSR1 does by default
    os.environ["OMP_NUM_THREADS"] = "1"
    environ, folder = dict(os.environ), os.getcwd()
    tasks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_feed, args=(pipe, tasks), daemon=True).start()
    gc.freeze()  # collections after each run then skip the imported modules, and leave their pages shared
    pipe.send_bytes(b"started")
    while True:
        task = pickle.loads(tasks.get())
        os.chdir(folder)
        _restore({**environ, **_launch_variables(task)})
        pipe.send_bytes(_perform(task))
        gc.collect()


def _feed(pipe: Connection, tasks: SimpleQueue[bytes]) -> None:
    """Hands on tasks; ends the worker at once, also in the middle of a collective, when the parent is gone."""
    # The pool's folder stays then: without it the FileStore of another worker would wait, holding the GIL.
    try:
        while True:
            tasks.put(pipe.recv_bytes())
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)


def _perform(task: _Task) -> bytes:
    """Returns the pickled result of a task or, in its place, a Failure."""
    sys.path[:] = task.path
    try:
        _start_group(task)
        function, args, kwargs = pickle.loads(task.call)
        return pickle.dumps(function(*args, **kwargs))
    except BaseException as error:
        return pickle.dumps(_failure(error))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _failure(error: BaseException, prefix: str = "") -> Failure:
    bases = tuple(cls.__name__ for cls in type(error).__mro__)
    details = "".join(traceback.format_exception(error))
    return Failure(type(error).__name__, f"{prefix}{error}", details, bases)


def _start_group(task: _Task) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_dtensor_meshes()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(task.store, task.world_size),
        rank=task.rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=2 * task.timeout),  # the pool's own timeout comes first and shows the stacks
    )


def _launch_variables(task: _Task) -> dict[str, str]:
    rank, world_size = str(task.rank), str(task.world_size)
    return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}


def _restore(environ: Mapping[str, str]) -> None:
    """Undoes what tests leave behind in a process."""
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the whole parameters and buffers of a sharded model, on every rank. Collective over the partition.

    Returns:
        Tensors on the CPU that share no memory with the model, under the names of ``model.state_dict()``.
    """

    def whole(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):  # offloaded shards travel through the mesh's device
            tensor = cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()
        return tensor.detach().cpu().clone()

    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def shard_batch(batch: Any, rank: int, world_size: int, *, strided: bool = False) -> Any:
    """Returns a rank's equal share of a global batch.

    Args:
        batch: A tensor, or tensors in mappings, lists and tuples; split along the first dimension.
        rank: The rank, from 0.
        world_size: Number of shares.
        strided: Take every ``world_size``-th row, as ``DistributedSampler`` does, instead of adjacent rows.

    Raises:
        ValueError: If the rows cannot be shared equally.
    """
    if isinstance(batch, Tensor):
        if len(batch) % world_size:
            raise ValueError(f"{len(batch)} rows cannot be shared equally by {world_size} ranks.")
        return batch[rank::world_size] if strided else batch.tensor_split(world_size)[rank]
    if isinstance(batch, Mapping):
        return {key: shard_batch(part, rank, world_size, strided=strided) for key, part in batch.items()}
    return type(batch)(shard_batch(part, rank, world_size, strided=strided) for part in batch)


def relative_difference(actual: float, expected: float) -> float:
    """Returns ``|actual - expected| / |expected|``; see :func:`weight_differences` for when it is infinite."""
    return _share(abs(actual - expected), abs(expected))


def weight_differences(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns each tensor's largest difference, as a share of the expected tensor's largest magnitude.

    Infinity, which no bound lets pass, stands for NaN on either side and for any difference from zeros.
    """

    def difference(ours: Tensor, theirs: Tensor) -> float:
        if not theirs.numel():
            return 0.0
        ours, theirs = ours.double(), theirs.double()
        return _share((ours - theirs).abs().max().item(), theirs.abs().max().item())

    return {name: difference(actual[name], tensor) for name, tensor in expected.items()}


def _share(difference: float, magnitude: float) -> float:
    if difference == 0:
        return 0.0
    share = difference / magnitude if magnitude else math.inf
    return math.inf if math.isnan(share) else share


def assert_parity(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Checks that weights or gradients agree.

    Args:
        actual: Whole tensors by name.
        expected: What they should be.
        tolerance: Largest difference allowed, as a share of the tensor's largest magnitude.

    Raises:
        AssertionError: Naming the tensor that differs most, or those that are missing, unexpected or misshapen.
    """
    missing, unexpected = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    assert not missing and not unexpected, f"missing tensors: {missing}; unexpected: {unexpected}"
    shapes = {name: (tuple(actual[name].shape), tuple(tensor.shape)) for name, tensor in expected.items()}
    misshapen = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    assert not misshapen, f"shapes (actual, expected): {misshapen}"
    differences = weight_differences(actual, expected)
    beyond = [name for name, difference in differences.items() if not difference <= tolerance]
    worst = max(beyond, key=differences.__getitem__, default="")
    assert not beyond, (
        f"{len(beyond)} of {len(differences)} tensors differ by more than {tolerance:g} of their largest magnitude; "
        f"the worst is {worst}: {differences[worst]:.2e}"
    )
