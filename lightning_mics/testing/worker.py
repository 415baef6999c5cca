"""A worker's life: it runs what comes through its pipe, one task after another."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from io import TextIOWrapper
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import cast

import torch
import torch.distributed as dist

from lightning_mics.core._torch import forget_dtensor_meshes

_CARD = "LIGHTNING_MICS_WORKER_CARD"


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


@dataclass(frozen=True)
class Task:
    """What a worker is to run: a pickled function and its arguments, as one rank of a world."""

    rank: int
    world_size: int
    backend: str
    store: str
    timeout: float
    path: list[str]
    call: bytes


def serve(pipe: Connection, log: str) -> None:
    """Runs what comes through the pipe, until it closes."""
    os.setsid()  # out of reach of Ctrl-C; the parent ends the worker and its children as one group
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    for stream in (sys.stdout, sys.stderr):
        cast(TextIOWrapper, stream).reconfigure(line_buffering=True)  # a worker that hangs flushes no more
    faulthandler.enable()
    os.environ["OMP_NUM_THREADS"] = "1"
    environ, folder = dict(os.environ), os.getcwd()
    tasks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_feed, args=(pipe, tasks), daemon=True).start()
    gc.freeze()  # collections after each run then skip the imported modules, and leave their pages shared
    pipe.send_bytes(b"started")
    while True:
        task = pickle.loads(tasks.get())
        os.chdir(folder)
        _restore({**environ, **launch_variables(task)})
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


def _perform(task: Task) -> bytes:
    """Returns the pickled result of a task or, in its place, a Failure."""
    sys.path[:] = task.path
    try:
        _start_group(task)
        function, args, kwargs = pickle.loads(task.call)
        return pickle.dumps(function(*args, **kwargs))
    except BaseException as error:
        return pickle.dumps(failure_of(error))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def failure_of(error: BaseException, prefix: str = "") -> Failure:
    """Returns an exception as what can be sent."""
    bases = tuple(cls.__name__ for cls in type(error).__mro__)
    details = "".join(traceback.format_exception(error))
    return Failure(type(error).__name__, f"{prefix}{error}", details, bases)


def _start_group(task: Task) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_dtensor_meshes()
    device = worker_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        task.backend,
        store=dist.FileStore(task.store, task.world_size),
        rank=task.rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=2 * task.timeout),  # the pool's own timeout comes first and shows the stacks
    )


def worker_device() -> torch.device:
    """Returns where this worker's tensors belong: on its card if the world has NCCL, or else in host memory."""
    index = os.environ.get(_CARD)
    return torch.device("cpu") if index is None else torch.device("cuda", int(index))


def launch_variables(task: Task) -> dict[str, str]:
    """Returns what a launcher would tell the rank, and what NCCL must be told where ranks share a card."""
    rank, world_size = str(task.rank), str(task.world_size)
    variables = {"RANK": rank, "WORLD_SIZE": world_size}
    if "nccl" not in task.backend:
        return {**variables, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    num_cards = max(1, torch.cuda.device_count())
    card = str(task.rank % num_cards)
    if task.world_size <= num_cards:
        return {**variables, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size, _CARD: card}
    return {**variables, "LOCAL_RANK": card, "LOCAL_WORLD_SIZE": "1", _CARD: card, **pretended_host(task.rank)}


def pretended_host(rank: int) -> dict[str, str]:
    """Returns the variables by which NCCL takes a rank for the only one of its host.

    Ranks may share a card then, which NCCL refuses on one host. They talk through sockets of the loopback interface.
    """
    return {
        "NCCL_HOSTID": f"host{rank}",
        "NCCL_NET": "Socket",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
    }


def _restore(environ: Mapping[str, str]) -> None:
    """Undoes what tests leave behind in a process."""
    # Write all stacks, then die as SIGUSR1 does by default. Who puts all handlers back, as Lightning's Trainer does,
    # knows only those of Python.
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.register(signal.SIGUSR1, chain=True)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)
