"""What the emulated cluster says and decides without making one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from lightning_mics.bench import namespaces
from lightning_mics.bench.cluster import EmulatedCluster
from lightning_mics.bench.namespaces import EmulatorError
from lightning_mics.bench.spec import ClusterSpec, format_rate, parse_rate
from lightning_mics.cli import main
from lightning_mics.errors import MiCSConfigError
from lightning_mics.processes import start_time


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100mbit", 100_000_000),
        ("2.5gbit", 2_500_000_000),
        (" 64 KBIT ", 64_000),
        ("5000", 5000),
        ("5000bit", 5000),
        ("none", None),
    ],
)
def test_rates(text: str, rate: int | None) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "10mbps", "-1mbit", "1mbit/s", "mbit", "1e6"])
def test_what_is_not_a_rate(text: str) -> None:
    with pytest.raises(MiCSConfigError, match=r"Write it with kbit, mbit or gbit \(100mbit\)"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0", "999", "101gbit"])
def test_rates_out_of_range(text: str) -> None:
    with pytest.raises(MiCSConfigError, match=r"must be from 1 kbit/s to 100 Gbit/s\. Try 100mbit"):
        parse_rate(text)


def test_rates_for_people() -> None:
    written = [format_rate(rate) for rate in (None, 100_000_000, 2.5e9, 64_000, 1)]
    assert written == ["unlimited", "100 Mbit/s", "2.5 Gbit/s", "64 kbit/s", "1 bit/s"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_nodes": 0}, "num_nodes=0 must be from 1 to 32. Try num_nodes=2"),
        ({"num_nodes": 33}, "num_nodes=33 must be"),
        ({"node_size": 0}, "node_size=0 must be at least 1"),
        ({"rate": 0}, "A rate of 0 bit/s must be"),
        ({"mtu": 68}, "mtu=68 must be from 576 to 65535 bytes. Try mtu=9000"),
    ],
)
def test_specs_that_cannot_work(change: dict[str, int], words: str) -> None:
    settings: dict[str, Any] = {"num_nodes": 2, "node_size": 2, "rate": None, **change}
    with pytest.raises(MiCSConfigError, match=words):
        ClusterSpec(**settings)


def test_clean_tells_dead_owners_from_living_ones() -> None:
    pid, start = os.getpid(), start_time(os.getpid())
    assert start is not None
    living, reused, dead = f"mics-{pid}-{start}-0", f"mics-{pid}-{start - 1}-0", f"mics-{2**22 + 1}-5-3"
    for part in ("node0", "node12", "switch", "files-ab_12"):
        assert not namespaces._is_to_remove(f"{living}-{part}", everything=False)
        for key in (reused, dead):
            assert namespaces._is_to_remove(f"{key}-{part}", everything=False)
        assert namespaces._is_to_remove(f"{living}-{part}", everything=True)


@pytest.mark.parametrize(
    "name",
    ["z0", "mics-demo-x", "mics-1-2-node0", "mics-1-2-3", "mics-1-2-3-node", "mics-1-2-3-node0x", "xmics-1-2-3-node0"],
)
def test_clean_leaves_what_is_not_ours(name: str) -> None:
    assert not namespaces._is_to_remove(name, everything=True)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "platform", "linux")
    words = "ip, tc, unshare, mount, not found on PATH. Install with: apt install iproute2 util-linux mount"
    assert words in (namespaces.missing_requirements() or "")
    with (
        pytest.raises(EmulatorError, match="not found on PATH"),
        EmulatedCluster(ClusterSpec(num_nodes=2, node_size=1, rate=None)),
    ):
        pass
    assert main(["bench", "cluster", __file__]) == 2
    assert main(["bench", "clean"]) == 2
    assert capsys.readouterr().err.count(words) == 2


def test_other_users_and_systems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "_PACKAGES", {})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root, and this is user 1000" in (namespaces.missing_requirements() or "")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "needs Linux, and this is darwin" in (namespaces.missing_requirements() or "")


def test_what_the_kernel_refuses_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "_missing_tools", lambda: None)
    monkeypatch.setattr(namespaces, "UNSHARE", ["sh", "-c", "echo Operation not permitted >&2; exit 1"])
    message = namespaces.missing_requirements() or ""
    assert "refuses one of them: Operation not permitted." in message and "--privileged" in message


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--rate", "fast", __file__], "The rate 'fast' is not"),
        (["--nodes", "0", __file__], "num_nodes=0 must be"),
        (["nowhere.py"], "There is no file nowhere.py"),
    ):
        assert main(["bench", "cluster", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_words_after_the_script_belong_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("lightning_mics.bench.cli._run_command", lambda options: seen.append(options))
    main(["bench", "cluster", "--nodes", "3", "-m", "pkg.module", "--nodes", "7", "-m", "x"])
    assert (seen[0].nodes, seen[0].module, seen[0].script) == (3, True, "pkg.module")
    assert seen[0].arguments == ["--nodes", "7", "-m", "x"]


def test_help_and_clean_do_without_torch() -> None:
    code = (
        "import sys, contextlib\n"
        "from lightning_mics.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['bench', 'cluster', '--help'])\n"
        "import lightning_mics.bench.cluster\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
