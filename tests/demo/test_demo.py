"""``mics demo`` as a newcomer runs it."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_tools import processes_naming
from script_tools import run_python

DEMO = ["-m", "lightning_mics.cli", "demo", "--steps", "3"]
COMMAND = [sys.executable, *DEMO]


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob("mics-demo-*"))


@pytest.mark.slow
def test_the_screen_from_start_to_end(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300, env=environment)
    screen = done.stdout
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in screen and "\r" not in screen
    for word in ("warning", "error", "traceback", "deprecated"):
        assert word not in screen.lower()
    assert "partition groups {0,1} {2,3}" in screen and "partition groups {0,1,2,3}" in screen
    first, last = re.search(r"first and last step\s+│ ([\d.]+) -> ([\d.]+)", screen).groups()
    assert float(last) < float(first)
    assert "optimizer states: 1/4 on each rank" in screen
    whole, most = re.search(r"optimizer states +│ ([\d.]+) MiB, ([\d.]+) MiB on the fullest rank", screen).groups()
    assert float(whole) / 4 <= float(most) < 1.2 * float(whole) / 4
    saved = re.search(r"3 │\s+2, saved │[^│]+│\s+([\d.]+)", screen)[1]
    loaded = re.search(r"3 │\s+4, loaded │[^│]+│\s+([\d.]+)", screen)[1]
    assert float(loaded) == pytest.approx(float(saved), rel=1e-5)
    assert not leftovers(tmp_path)


def test_ctrl_c_ends_the_processes_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    # A test run in the background of a shell ignores Ctrl-C, and would hand that down.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed, env=environment
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list_events(leftovers(tmp_path)):
        time.sleep(0.1)
    (folder,) = leftovers(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "nothing is left behind" in errors and "Traceback" not in errors
    assert not leftovers(tmp_path)
    assert not processes_naming(str(folder))


def list_events(folders: list[Path]) -> list[Path]:
    """Returns the logs of runs that have started their processes."""
    return [path for folder in folders for path in folder.glob("logs-*/*/*/*/stdout.log")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--steps", "0"], "--steps 0 must be at least 1"), (["--keep", "{full}"], "the folder is not empty")],
)
def test_bad_arguments_are_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "file").write_text("")
    arguments = [argument.format(full=tmp_path) for argument in arguments]
    done = run_python(tmp_path, *DEMO, *arguments, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
