"""``mics doctor`` on ranks of one machine: what it prints, and that it ends whatever its ranks do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from script_tools import run_python

from lightning_mics.cli import main

# What a rank does in the place of measuring, by the word that the script is given.
SCRIPT = """
import os, sys, time
from lightning_mics.doctor import examination
deed, *words = sys.argv[1:]
if deed == "missing":
    os.environ["WORLD_SIZE"] = "3"
if deed == "hangs" and os.environ["RANK"] == "1":
    examination.compute_rates = lambda *_: time.sleep(600)
if deed == "fails" and os.environ["RANK"] == "1":
    def compute_rates(*_):
        raise OSError("no such card")
    examination.compute_rates = compute_rates
from lightning_mics.cli import main
sys.exit(main(["doctor", *words]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_healthy_ranks(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    words = ("well", "--checkpoint-folder", folder, "--json", "told.json")
    done = run_python(tmp_path, script, *words, ranks=2, environment={"COLUMNS": "80"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Verdict: all is well" in done.stdout and done.stdout.count("Verdict") == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    told = json.loads((tmp_path / "told.json").read_text())
    assert {check["verdict"] for check in told["checks"]} == {"ok"}
    names = [check["name"] for check in told["checks"]]
    assert names == ["ranks", "places", "versions", "environment", "compute", *names[5:]]
    assert len(told["compute"]) == 2 and not folder.exists() and not list(tmp_path.glob(".mics-doctor*"))


@pytest.mark.parametrize(
    ("deed", "found"),
    [
        ("missing", "nothing was heard of rank 2 of 3"),
        ("hangs", "rank 1 on {} computes"),
        ("fails", "rank 1 on {}: OSError while it computes: no such card"),
    ],
)
def test_it_ends_and_names_the_rank(script: Path, tmp_path: Path, deed: str, found: str) -> None:
    done = run_python(tmp_path, script, deed, "--limit", 2, "--json", ranks=2)
    assert done.returncode == 1, done.stdout + done.stderr
    told = json.loads(done.stdout)
    ranks = next(check for check in told["checks"] if check["name"] == "ranks")
    host = told["facts"]["0"]["host"].partition(".")[0]
    assert found.format(host) in ranks["found"]
    assert [check["name"] for check in told["checks"] if check["verdict"] == "broken"] == ["ranks"]


def test_alone_it_says_how_to_ask_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor"]) == 0
    assert "torchrun --nnodes 4 --nproc-per-node 8" in capsys.readouterr().out
    assert main(["doctor", "--limit", "0"]) == main(["doctor", "--checkpoint-folder", "s3://bucket"]) == 2
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor"]) == 2
    assert "Start mics doctor by torchrun" in capsys.readouterr().err
