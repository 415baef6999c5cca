"""The pool: it starts workers, gives them tasks and collects what comes of them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from lightning_mics.testing.worker import Failure, Task, failure_of, serve

# What forking must not repeat in every worker. Optimizers import Dynamo at their first step.
PRELOAD = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "lightning_mics.sharding",
)
_START_SECONDS = 120.0
_STACK_SECONDS = 15.0
_PRINTED_CHARACTERS = 8000


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
    """A pool of workers that runs functions in worlds of up to ``size`` ranks.

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
        # A process that has asked the driver for devices must not fork; the fork server's imports ask.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        atexit.register(self.close)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world_size: int = 2,
        timeout: float = 60.0,
        backend: str = "gloo",
        **kwargs: Any,
    ) -> list[Any]:
        """Runs ``function(*args, **kwargs)`` on each rank of a world, with ``torch.distributed`` up.

        Args:
            function: A function that pickle finds by its name, in a module on the parent's path.
            *args: Its arguments.
            world_size: Number of ranks.
            timeout: Seconds after which the run counts as hung; the start of workers is not counted.
            backend: ``"gloo"``; or ``"nccl"`` and ``"cpu:gloo,cuda:nccl"``, where ranks take cards in turn. They may
                share one: each then is a host of its own to NCCL. The function finds its card by
                :func:`worker_device`.
            **kwargs: Its keyword arguments.

        Returns:
            The results, by rank.

        Raises:
            WorkerError: If any rank failed, died or hung.
        """
        outcomes = self.attempt(function, *args, world_size=world_size, timeout=timeout, backend=backend, **kwargs)
        failures = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
        if failures:
            raise WorkerError(getattr(function, "__name__", str(function)), world_size, failures)
        return outcomes

    def attempt(
        self,
        function: Callable[..., Any],
        *args: Any,
        world_size: int = 2,
        timeout: float = 60.0,
        backend: str = "gloo",
        **kwargs: Any,
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
                worker.send(Task(rank, world_size, backend, store, timeout, list(sys.path), call))
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


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, context: ForkServerContext, folder: Path, rank: int) -> None:
        self.pipe, theirs = context.Pipe()
        self._log = folder / f"worker-{rank}.log"
        # Not a daemon process: those may have no children, such as the workers of a DataLoader.
        self.process = context.Process(target=serve, args=(theirs, str(self._log)), name=f"mics-worker-{rank}")
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

    def send(self, task: Task) -> None:
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
            outcome = failure_of(error, "the result cannot be unpickled: ")
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
