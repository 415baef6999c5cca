"""Processes that end with who started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = """
import os, sys, time
from lightning_mics.processes import end_with_launcher
open(sys.argv[1], "w").write(str(os.getpid()))
while os.getppid() == int(sys.argv[2]):  # its launcher ends meanwhile
    time.sleep(0.01)
print(os.getppid(), flush=True)
end_with_launcher()
print("still there", flush=True)
"""
LAUNCHER = "import os, subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:], str(os.getpid())])"


def test_a_worker_whose_launcher_is_gone_already_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, "-c", WORKER, str(tmp_path / "pid")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n", 1)
    if told[0] != "1":
        pytest.skip("another process than the first one takes orphans over here")
    assert told[1] == ""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
