"""A user of one front-end does not pay for another."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
