"""Scripts and commands that tests run: in processes forked from a server with the heavy modules, or in fresh ones.

A fresh interpreter spends seconds on imports. A process that is forked from the server finds them done, and is
otherwise one of its own: with its own arguments, environment, folder and screen, and gone when the program ends, so
that nothing that it changed stays. Launchers keep their own code up to the point where they would start interpreters.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.run

from lightning_mics.testing import PRELOAD

# What the fork server of a test session imports once. Nothing here may import ``transformers.trainer``:
# ``lightning_mics.run`` waits for a script to do so.
HEAVY = (
    *PRELOAD,
    "lightning.pytorch",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "lightning_mics.accelerate",
    "torch.distributed.run",
)
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")


def run_python(
    folder: Path,
    *words: object,
    ranks: int | None = None,
    environment: dict[str, str] | None = None,
    real: bool = False,
    timeout: float = 240.0,
) -> subprocess.CompletedProcess[str]:
    """Runs ``python WORDS`` in a folder, on CPUs.

    Args:
        folder: The working directory.
        *words: A script or ``-m`` and a module, and the arguments.
        ranks: How many processes Lightning starts for the script. They are forked, with the variables of torchrun.
        environment: Variables beside those of the test session.
        real: Whether to start interpreters rather than fork.
        timeout: Seconds after which the program is ended.
    """
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),  # torchrun leaves its logs there
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        **(environment or {}),
    }
    command = list(map(str, words))
    if real:
        return subprocess.run(
            [sys.executable, *command], cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout
        )
    return _run_forked(folder, command, ranks, variables, timeout)


def _run_forked(
    folder: Path, command: list[str], ranks: int | None, variables: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as screens:
        out, err = Path(screens, "stdout"), Path(screens, "stderr")
        arguments = (command, str(folder), variables, (str(out), str(err)), ranks, store.port)
        process = context.Process(target=_program, args=arguments)
        process.start()
        process.join(timeout)
        with suppress(ProcessLookupError):  # what is left of its session
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        done = subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())
        process.close()
    return done


def _program(
    command: list[str], folder: str, variables: dict[str, str], screen: tuple[str, str], ranks: int | None, port: int
) -> None:
    """The life of a forked process that stands for an interpreter."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None
    torch.set_num_threads(1)
    for descriptor, path in zip((1, 2), screen, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))

    def start_ranks(options: Namespace) -> None:
        """Stands for torchrun's ``run``, which ``accelerate launch`` calls."""
        script = [*(["-m"] if options.module else []), options.training_script, *options.training_script_args]
        if _fork_ranks(script, int(options.nproc_per_node), port) != 0:
            raise SystemExit(1)

    torch.distributed.run.run = start_ranks
    if ranks is None:
        _interpret(command)
    os._exit(_fork_ranks(command, ranks, port))


def _fork_ranks(command: list[str], count: int, port: int) -> int:
    """Runs a command on ranks that are forked from this process; returns 0 or 1. The first failure ends the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    running = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(_variables(rank, count, port))
            _interpret(command)
        running[pid] = rank
    failed = False
    while running:
        pid, status = os.wait()
        del running[pid]
        if status != 0 and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    return int(failed)


def _variables(rank: int, count: int, port: int) -> dict[str, str]:
    """Returns what torchrun tells a rank. Its store is the test session's, as it is the agent's of torchrun."""
    values: dict[str, Any] = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    values |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "ROLE_RANK": rank, "ROLE_WORLD_SIZE": count}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    values |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    return {name: str(value) for name, value in values.items()}


def _interpret(command: list[str]) -> None:
    """Does what ``python COMMAND`` does, and ends this process."""
    code: Any = 0
    try:
        if command[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ending:
        code = ending.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
