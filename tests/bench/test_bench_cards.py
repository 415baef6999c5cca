"""Benchmarks on cards, as far as they go without one: the service, the site, ranks that are hosts, loopback."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from process_tools import processes_naming
from rich.console import Console

from lightning_mics.bench import runner
from lightning_mics.bench import site as site_module
from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.conditions import own_conditions, shared_conditions
from lightning_mics.bench.contenders import parse_contender, reason_to_skip
from lightning_mics.bench.experiments import Experiment, load_experiment, parse_experiment
from lightning_mics.bench.launch import NodeFailedError, run_on_cluster
from lightning_mics.bench.loopback import LoopbackCluster
from lightning_mics.bench.records import append, read_results
from lightning_mics.bench.report import print_report
from lightning_mics.bench.sharing import ServiceError, process_service
from lightning_mics.bench.site import Cards, Site, open_site
from lightning_mics.bench.spec import ClusterSpec
from lightning_mics.cli import main

# Starts a process that stays, as the daemon does, and ends it when told to quit.
CONTROL = """#!/bin/sh
echo "$@ ${CUDA_VISIBLE_DEVICES-unset}" >> "$FAKE_LOG"
if [ "$1" = -d ]; then
    test -z "$FAKE_TROUBLE" || { echo "$FAKE_TROUBLE"; exit 1; }
    mkdir -p "$CUDA_MPS_LOG_DIRECTORY"
    sh -c 'sleep 600; : "$CUDA_MPS_PIPE_DIRECTORY"' "fake-daemon-of-$FAKE_LOG" </dev/null >/dev/null 2>&1 &
    echo $! > "$CUDA_MPS_PIPE_DIRECTORY/pid"
else
    read -r word
    echo "$word" >> "$FAKE_LOG"
    test "$word" = quit && kill "$(cat "$CUDA_MPS_PIPE_DIRECTORY/pid")"
fi
"""
HOLD = """
import time
from lightning_mics.bench.sharing import process_service
from lightning_mics.processes import exit_on_signals
exit_on_signals()
with process_service() as variables:
    print(variables["CUDA_MPS_PIPE_DIRECTORY"], flush=True)
    time.sleep(600)
"""
H200 = {"device": "cuda", "card": "NVIDIA H200", "cards": 1, "sharing": "MPS", "links": "loopback"}


@pytest.fixture
def daemon_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a stand-in for the service's program on PATH; returns where it notes what it was told."""
    control = tmp_path / "bin" / "nvidia-cuda-mps-control"
    control.parent.mkdir()
    control.write_text(CONTROL)
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{control.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def is_running(daemon_log: Path, expected: bool = False) -> bool:
    """Says whether the stand-in runs; it takes a moment to start or to end."""
    deadline = time.monotonic() + 5
    while (found := bool(processes_naming(f"fake-daemon-of-{daemon_log}"))) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert list(Path(tempfile.gettempdir()).glob(f"mics-{os.getpid()}-*")) == []


# --- the service ------------------------------------------------------------------------------------------------------


def test_the_service_lives_as_long_as_its_with_statement(daemon_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with process_service() as variables:
        assert set(variables) == {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"}
        assert all(Path(folder).is_dir() for folder in variables.values())
        assert is_running(daemon_log, True)
    assert not is_running(daemon_log) and not Path(variables["CUDA_MPS_PIPE_DIRECTORY"]).parent.exists()
    with pytest.raises(KeyError), process_service():
        raise KeyError("mine")
    assert not is_running(daemon_log)
    assert daemon_log.read_text().split("\n")[:3] == ["-d unset", " unset", "quit"]


def test_a_service_that_does_not_start_says_why(daemon_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "Cannot find MPS on this card")
    with pytest.raises(ServiceError, match=r"does not start: Cannot find MPS on this card"), process_service():
        raise AssertionError("not reached")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServiceError, match="not found on PATH"), process_service():
        raise AssertionError("not reached")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_service_ends_with_its_program_however_that_ends(daemon_log: Path, number: signal.Signals) -> None:
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=heed
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        try:
            assert is_running(daemon_log, True) and folder.is_dir()
            process.send_signal(number)
            process.wait(20)
        finally:
            process.kill()
    assert not is_running(daemon_log)
    deadline = time.monotonic() + 5
    while folder.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not folder.parent.exists()


# --- the site ---------------------------------------------------------------------------------------------------------


@contextmanager
def site_with(
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    world_size: int,
    missing: str | None,
    works: bool = True,
) -> Iterator[Site]:
    """Opens the site of a machine that has these cards."""

    def probe(service: dict[str, str]) -> Cards:
        if service and not works:
            raise ServiceError("a program cannot compute on this machine's cards: error 805")
        return Cards(names, {"NCCL": "2.28.9"})

    monkeypatch.setattr(site_module, "probe", probe)
    monkeypatch.setattr(site_module, "missing_requirements", lambda: missing)
    with open_site("cuda", world_size) as site:
        yield site


def test_ranks_share_cards_through_the_service(daemon_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with site_with(monkeypatch, ["NVIDIA H200"], 4, missing="There is no ip.") as site:
        assert is_running(daemon_log, True)
        assert site.hardware == H200 and site.is_loopback
        assert site.environment["CUDA_MPS_PIPE_DIRECTORY"] and site.environment["CUDA_VISIBLE_DEVICES"] == "0"
        assert site.environment["NCCL_NET"] == "Socket" and site.versions == {"NCCL": "2.28.9"}
        text = " ".join(site.notes)
        assert "1 card (NVIDIA H200), shared by ranks (MPS)" in text and "There is no ip. All ranks" in text
    assert not is_running(daemon_log)


def test_without_the_service_ranks_take_turns_and_the_site_says_so(
    daemon_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site_with(monkeypatch, ["NVIDIA H200"], 4, missing=None, works=False) as site:
        assert not is_running(daemon_log)  # it was of no use
        assert site.hardware["sharing"] == "time slices" and site.hardware["links"] == "shaped"
        assert not site.is_loopback and "CUDA_MPS_PIPE_DIRECTORY" not in site.environment
        assert "error 805" in site.notes[1] and "these times mean little" in site.notes[1]
    monkeypatch.setenv("PATH", "/nowhere")
    with site_with(monkeypatch, ["NVIDIA H200"], 4, missing=None) as site:
        assert "not found on PATH" in site.notes[1]


def test_a_rank_with_a_card_of_its_own_needs_no_service(daemon_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with site_with(monkeypatch, ["NVIDIA H100"] * 4, 4, missing=None) as site:
        assert not is_running(daemon_log) and len(site.notes) == 1
        assert (site.hardware["sharing"], site.hardware["cards"]) == ("none", 4)
        assert site.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_without_a_card_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert main(["bench", "headline", "--device", "cuda"]) == 2
    assert "needs an NVIDIA card, and PyTorch sees none" in capsys.readouterr().err


# --- cases ------------------------------------------------------------------------------------------------------------


def small(**changes: Any) -> Experiment:
    values = {"nodes": [2], "ranks": 1, "layers": 1, "width": 64, "rounds": 1, "steps": 1, "rate": ["100mbit"]}
    return parse_experiment({**values, **changes}, default_name="small")


def test_cases_on_cards_are_never_those_of_other_links_or_of_cpus() -> None:
    asked = small(rate=["1gbit", "2gbit"])
    cpu, loopback = asked.cases(), asked.cases(H200)
    shaped = asked.cases({**H200, "links": "shaped"})
    assert len({*cpu, *loopback, *shaped}) == 5 and [case.rate for case in loopback] == [None]
    everything = [cpu[0], loopback[0], shaped[0]]
    assert "CPUs" not in shared_conditions(cpu[:1]) and "loopback" not in shared_conditions(cpu[:1])
    words = shared_conditions(loopback, short=True)
    assert "all links loopback, NCCL on NVIDIA H200, shared by 2 ranks (MPS)" in words
    assert [own_conditions(case, everything) for case in everything] == [
        "1 Gbit/s a node, CPUs",
        "all links loopback, NCCL on NVIDIA H200, shared by 2 ranks (MPS)",
        "1 Gbit/s a node, NCCL on NVIDIA H200, shared by 2 ranks (MPS)",
    ]


def test_older_results_are_those_of_cpus(tmp_path: Path) -> None:
    (case,), path = small().cases(), tmp_path / "results.jsonl"
    contender = parse_contender("ddp", case.topology)
    assert contender is not None
    append(path, runner.Measurement(case, contender, 0).record({}, "ok"))
    content = json.loads(path.read_text())
    del content["case"]["hardware"]
    path.write_text(json.dumps(content) + "\n")
    assert read_results(path)[0].case == case


def test_the_headline_for_cards_is_another_experiment() -> None:
    loaded = load_experiment("headline-cuda")
    assert loaded.device == "cuda" and loaded.most_ranks == 4
    assert runner.shortened(small(), None, None, "cuda").device == "cuda"
    (case,) = loaded.cases(H200)
    zero = parse_contender("deepspeed-zero3", case.topology)
    assert zero is not None and "on CPUs only" in str(reason_to_skip(case, zero))


# --- loopback ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_that_are_hosts_train_over_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of a run on one card, but for the card: gloo on CPUs takes NCCL's place."""

    @contextmanager
    def on_loopback(device: str, world_size: int) -> Iterator[Site]:
        yield Site(hardware={**H200, "device": "cpu"}, environment={"MARK": "x"}, versions={"NCCL": "9"}, notes=("!",))

    monkeypatch.setattr(runner, "open_site", on_loopback)
    monkeypatch.setattr(runner, "EmulatedCluster", None)
    names = ["full-sharding", "mesh-2d-no-sync", "mics:4:hierarchical"]
    asked = small(ranks=2, contenders=names, accumulation=[2])
    results, console = tmp_path / "results.jsonl", Console(file=io.StringIO(), width=300)
    runner.run_experiment(asked, results, console)
    records = read_results(results)
    assert [(each.contender.name, each.status) for each in records] == [
        (name.partition(":")[0], "ok") for name in names
    ], [each.error for each in records]
    for each in records:
        assert each.losses == pytest.approx(records[0].losses, abs=1e-4) and each.sent_bytes == []
        assert len(each.step_seconds) == 1 and each.run["versions"]["NCCL"] == "9"
    # Two stages over pretended hosts: MiCS knows which ranks make a node.
    assert records[-1].ledger_bytes == pytest.approx(records[-1].minimum_bytes, rel=0.03)
    print_report(results, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "all links loopback, NCCL on NVIDIA H200, shared by 4 ranks (MPS)" in text and "device memory" in text


def test_a_rank_that_fails_on_loopback_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import os, time\nif os.environ['RANK'] == '1': raise ValueError('my trouble')\ntime.sleep(600)")
    with LoopbackCluster(ClusterSpec(num_nodes=2, node_size=1, rate=None)) as cluster:
        with pytest.raises(NodeFailedError, match=r"Rank 1 on node 1 failed[^$]*my trouble"):
            run_on_cluster(cluster, [str(script)], log_dir=tmp_path / "logs", timeout=60)
        assert not processes_naming(str(script))
    assert cluster.nodes == ()


def test_nodes_may_see_the_memory_that_is_shared(tmp_path: Path) -> None:
    if site_module.missing_requirements() is not None:
        pytest.skip("no emulated clusters here")
    spec = ClusterSpec(num_nodes=1, node_size=1, rate=None)
    shared = Path(tempfile.mkstemp(dir="/dev/shm")[1])
    try:
        for is_seen in (True, False):
            with EmulatedCluster(spec, shared_memory=is_seen) as cluster:
                process = cluster.popen(0, ["test", "-e", str(shared)])
                assert process.wait(20) == (0 if is_seen else 1)
    finally:
        shared.unlink()
