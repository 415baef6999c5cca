"""A user of one front-end does not pay for another."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_mics

HEAVY = ("lightning", "lightning.pytorch", "pytorch_lightning", "accelerate", "transformers")


def imported_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import lightning_mics", set()),
        ("from lightning_mics import MiCSConfig, mics_shard, save_checkpoint", set()),
        ("import lightning_mics.accelerate", set()),
        ("from lightning_mics.accelerate import MiCSPlugin", set()),
        ("from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin", {"accelerate"}),
        ("import lightning_mics.transformers", {"accelerate", "transformers"}),
        ("import lightning_mics.cli", set()),
    ],
)
def test_what_an_import_brings_along(statement: str, allowed: set[str]) -> None:
    assert imported_by(statement) <= allowed


MOVED_ARE_ONE = """
import importlib
import sys

sys.path.insert(0, sys.argv[1])
from lightning_mics._moved import MOVED

for old, new in MOVED.items():
    modules = [importlib.import_module(f"lightning_mics.{name}") for name in (old, new)]
    assert modules[0] is modules[1] and modules[0].__spec__.name.endswith(new), old
from lightning.pytorch.strategies import StrategyRegistry
from lightning_mics import MiCSStrategy

assert StrategyRegistry["mics"]["strategy"] is MiCSStrategy
assert sys.modules["lightning_mics"].__file__.startswith(sys.argv[1])
"""


def test_a_moved_module_is_one_under_both_names(tmp_path: Path) -> None:
    # A copy has no folders of old names, which Python would take for packages.
    shutil.copytree(Path(lightning_mics.__file__).parent, tmp_path / "lightning_mics")
    command = [sys.executable, "-c", MOVED_ARE_ONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
