"""CUDA's multi-process service, with which several ranks compute on one card side by side."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_mics.bench.namespaces import signals_later, temporary_folder
from lightning_mics.errors import MiCSError

_CONTROL = "nvidia-cuda-mps-control"
_STARTED = "started"
_PATIENCE = 20.0  # seconds; the daemon gives its servers ten
# The shell waits for its input to end, which it also does when the process that writes it is killed.
_KEEP = f"""
{_CONTROL} -d </dev/null 2>&1 && echo {_STARTED} || exit 1
read -r nothing
echo quit | {_CONTROL} >/dev/null 2>&1
rm -r "$1"
"""


class ServiceError(MiCSError):
    """The multi-process service is not there, or does not work."""


@contextmanager
def process_service() -> Iterator[dict[str, str]]:
    """Runs CUDA's multi-process service within a ``with`` statement.

    Its daemon is an ordinary program with a temporary folder of its own; nothing of a card is changed. It ends with the
    ``with`` statement, and with this process, even if that is killed.

    Yields:
        Variables that lead programs to it.

    Raises:
        ServiceError: On entering, if it is not installed or does not start.
    """
    if shutil.which(_CONTROL) is None:
        raise ServiceError(f"{_CONTROL} is not found on PATH; it comes with NVIDIA's driver")
    with signals_later():
        folder = temporary_folder()
    try:
        keeper = _start_keeper(folder, _variables(folder))
        try:
            _wait_until_started(keeper)
            yield _variables(folder)
        finally:
            with signals_later():
                _end(keeper)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _variables(folder: Path) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}


def _start_keeper(folder: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    for path in variables.values():
        Path(path).mkdir()
    # The service must know cards by the numbers that its clients use.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.Popen(
        ["sh", "-c", _KEEP, "sh", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, **variables},
        start_new_session=True,  # Ctrl-C in a terminal reaches this process only
    )


def _wait_until_started(keeper: subprocess.Popen[str]) -> None:
    assert keeper.stdout is not None
    said = []
    for line in keeper.stdout:
        if line.strip() == _STARTED:
            return
        said.append(line.strip())
    raise ServiceError(f"{_CONTROL} does not start: {' '.join(said) or 'it gives no reason'}")


def _end(keeper: subprocess.Popen[str]) -> None:
    assert keeper.stdin is not None and keeper.stdout is not None
    keeper.stdin.close()
    try:
        keeper.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()
    keeper.stdout.close()
