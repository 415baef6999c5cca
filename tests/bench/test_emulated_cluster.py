"""Emulated clusters: what their links carry, and that nothing of them outlives the program that made them."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from process_tools import processes_naming

from lightning_mics.bench import cluster as cluster_module
from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.launch import NodeFailedError, rank_logs, run_on_cluster
from lightning_mics.bench.namespaces import EmulatorError, clean, missing_requirements
from lightning_mics.bench.spec import ClusterSpec
from lightning_mics.errors import MiCSConfigError

MISSING = missing_requirements()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

MIB = 1 << 20
COMMAND = [sys.executable, "-m", "lightning_mics.cli", "bench"]
GATHER = f"""
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
own = torch.zeros({8 * MIB}, dtype=torch.uint8)
parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
began = time.perf_counter()
dist.all_gather(parts, own)
print("seconds", time.perf_counter() - began)
dist.destroy_process_group()
"""
# Without torch, for a quick start; its child leaves the session and would outlive a careless end.
WAIT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]], start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


def spec(num_nodes: int = 2, rate: int | None = None) -> ClusterSpec:
    return ClusterSpec(num_nodes=num_nodes, node_size=1, rate=rate)


def namespaces(pid: int) -> list[str]:
    """Returns the namespaces of the clusters that process ``pid`` made."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"mics-{pid}-")]


def folders(pid: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"mics-{pid}-*"))


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert namespaces(os.getpid()) == []
    assert folders(os.getpid()) == []


@contextmanager
def waiting_command(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs ``mics bench cluster`` with a script that waits on two nodes; yields when it does."""
    script = tmp_path / "wait.py"
    script.write_text(WAIT)
    # A test run in the background of a shell ignores Ctrl-C, and would hand that down.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [*COMMAND, "cluster", "--nodes", "2", "--ranks", "1", str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    ) as process:
        try:
            assert process.stdout is not None
            started = {process.stdout.readline(), process.stdout.readline()}
            assert started == {"[node 0, rank 0] ready\n", "[node 1, rank 1] ready\n"}
            assert len(namespaces(process.pid)) == 3 and len(folders(process.pid)) == 1
            assert len(processes_naming(str(tmp_path))) >= 5
            yield process
        finally:
            process.terminate()


def test_a_gather_sends_its_bytes_and_no_faster_than_the_links(tmp_path: Path) -> None:
    script, rate = tmp_path / "gather.py", 100_000_000
    script.write_text(GATHER)
    with EmulatedCluster(spec(rate=rate)) as cluster:
        polls: list[int] = []
        run_on_cluster(cluster, [str(script)], log_dir=tmp_path / "logs", on_poll=lambda: polls.append(0))
        sent = cluster.sent_bytes()
        with pytest.raises(MiCSConfigError, match="holds logs already"):
            run_on_cluster(cluster, [str(script)], log_dir=tmp_path / "logs")
    assert sent == pytest.approx([8 * MIB] * 2, rel=0.03)
    assert len(polls) > 10
    for node in range(2):
        logs = rank_logs(tmp_path / "logs", node, 1)
        seconds = float(logs[node, "stdout"].read_text().split()[1])
        assert 8 * MIB * 8 / seconds <= rate * 1.3
        assert "hostname" not in logs[node, "stderr"].read_text()  # PyTorch finds names for the addresses


def test_programs_on_nodes(tmp_path: Path) -> None:
    code = "import os, socket; print(os.getpid(), socket.gethostname(), socket.gethostbyname('node2'))"
    with EmulatedCluster(spec(num_nodes=3)) as cluster:
        assert [node.address for node in cluster.nodes] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
        process = cluster.popen(1, [sys.executable, "-c", code], stdout=subprocess.PIPE)
        pid, *names = process.communicate()[0].decode().split()
        assert int(pid) < 100 and names == ["node1", "10.77.0.3"]
        failing = cluster.popen(
            2, ["sh", "-c", 'echo "$TMPDIR $WORD"; kill -9 $$'], environment={"WORD": "x"}, stdout=-1
        )
        assert failing.communicate()[0].decode().split() == [str(cluster.folder / "node2"), "x"]
        assert failing.returncode == 128 + 9
        waiting = cluster.popen(0, [sys.executable, "-c", WAIT, str(tmp_path)], stdout=subprocess.PIPE)
        assert waiting.stdout is not None and waiting.stdout.readline() == b"ready\n"
        cluster.end([waiting])
        waiting.stdout.close()
        assert waiting.returncode is not None and not processes_naming(str(tmp_path))
        assert cluster.sent_bytes() == [0, 0, 0]


def test_a_storage_server_has_links_of_its_own() -> None:
    serve = "import socket; s = socket.create_server(('', 5000)); print(flush=True); c = s.accept()[0]\n"
    serve += "while c.recv(1 << 20): pass"
    store = "import socket; socket.create_connection(('storage', 5000), 5).sendall(bytes(1 << 21))"
    with EmulatedCluster(ClusterSpec(num_nodes=2, node_size=1, rate=None, storage_rate=50_000_000)) as cluster:
        assert cluster.storage is not None
        server = cluster.popen(cluster.storage, [sys.executable, "-c", serve], stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline() == b"\n"
        start = time.monotonic()
        assert cluster.popen(1, [sys.executable, "-c", store]).wait() == 0
        server.communicate()
        assert time.monotonic() - start > 0.9 * (2 * MIB - 2**18) * 8 / 50e6  # what the bucket holds comes at once
        assert cluster.stored_bytes() == pytest.approx(2 * MIB, rel=0.03)
        assert cluster.sent_bytes() == [0, 0]
    assert cluster.storage is None


def test_two_clusters_use_the_same_addresses() -> None:
    serve = "import socket, sys; s = socket.create_server(('', 5000)); print(flush=True)\n"
    serve += "s.accept()[0].sendall(sys.argv[1].encode())"
    ask = "import socket; print(socket.create_connection(('10.77.0.1', 5000), 5).recv(9).decode())"
    with EmulatedCluster(spec()) as first, EmulatedCluster(spec()) as second:
        answers = []
        for cluster, word in ((first, "first"), (second, "second")):
            server = cluster.popen(0, [sys.executable, "-c", serve, word], stdout=subprocess.PIPE)
            assert server.stdout is not None and server.stdout.readline() == b"\n"
            asking = cluster.popen(1, [sys.executable, "-c", ask], stdout=subprocess.PIPE)
            answers.append(asking.communicate()[0].decode().strip())
            server.communicate()
        assert answers == ["first", "second"]


def test_what_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        assert namespaces(os.getpid())
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster_module, "_limit", interrupted)
    with pytest.raises(KeyboardInterrupt), EmulatedCluster(spec()):
        raise AssertionError("not reached")
    assert namespaces(os.getpid()) == []


def test_clean_spares_clusters_in_use_and_leaving_bears_their_loss(tmp_path: Path) -> None:
    with EmulatedCluster(spec()) as cluster:
        assert not [name for name in clean() if name in namespaces(os.getpid())]
        assert cluster.sent_bytes() == [0, 0]
        cluster.popen(0, [sys.executable, "-c", WAIT, str(tmp_path)], stdout=subprocess.DEVNULL)
        subprocess.run(["ip", "netns", "delete", cluster.nodes[0].namespace], check=True)
        with pytest.raises(EmulatorError, match="node0"):
            cluster.sent_bytes()
    assert not processes_naming(str(tmp_path))


@pytest.mark.parametrize(
    ("action", "title", "words"),
    [
        ("raise ValueError('my trouble')", r"Rank 1 on node 1 failed\.", "ValueError: my trouble"),
        ("os.kill(os.getpid(), 9)", r"Rank 1 on node 1 failed \(ended by SIGKILL\)", ""),
    ],
)
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, action: str, title: str, words: str) -> None:
    script = tmp_path / "fail.py"
    script.write_text(f"import os, time\nif os.environ['RANK'] == '1': {action}\ntime.sleep(600)")
    with EmulatedCluster(spec()) as cluster:
        with pytest.raises(NodeFailedError, match=title) as caught:
            run_on_cluster(cluster, [str(script)], log_dir=tmp_path / "logs", timeout=60)
        assert not processes_naming(str(script))
        assert words in str(caught.value) and f"Logs: {tmp_path / 'logs'}" in str(caught.value)


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with EmulatedCluster(spec()) as cluster:
        with pytest.raises(EmulatorError, match=r"After 0\.2 s the script still ran on node 0, 1"):
            run_on_cluster(cluster, ["-m", "this"], log_dir=tmp_path / "logs", timeout=0.2)
        assert not processes_naming(str(tmp_path))


def test_the_screen_of_a_run_and_of_a_failing_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nprint('hello', *sys.argv[1:])\nif os.environ['RANK'] in sys.argv: raise KeyError('k')"
    )
    command = [*COMMAND, "cluster", "--nodes", "2", "--ranks", "1", "--rate", "1gbit"]
    done = subprocess.run([*command, script, "--nodes", "9"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[node 1, rank 1] hello --nodes 9\n" in done.stdout
    assert re.search(r"│\s+1 │\s+[\d.]+ KiB │.*bit/s │\s+0% │", done.stdout) and "1 Gbit/s" in done.stdout
    failed = [*command, "--log-dir", tmp_path / "logs", script, "1"]
    done = subprocess.run(failed, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    summary = done.stderr.partition("mics: ")[2]
    assert summary.startswith("Rank 1 on node 1 failed.\n  Traceback") and "KeyError: 'k'" in summary
    assert f"Logs: {tmp_path / 'logs'}\n" in summary and (tmp_path / "logs" / "node1" / "torchrun.log").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_everything(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with waiting_command(tmp_path) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == code and "Traceback" not in errors
        assert not processes_naming(str(tmp_path))
        assert namespaces(process.pid) == [] and folders(process.pid) == []


def test_a_killed_runner_takes_its_processes_along_and_clean_removes_the_rest(tmp_path: Path) -> None:
    with waiting_command(tmp_path) as process:
        process.kill()
        process.wait()
        assert eventually(lambda: not processes_naming(str(tmp_path)), 10)
        done = subprocess.run([*COMMAND, "clean"], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        assert namespaces(process.pid) == [] and folders(process.pid) == []
