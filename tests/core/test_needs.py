"""A PyTorch that lacks a name that this package needs is refused in one sentence, where it is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_mics.core._needs import SUPPORTED_TORCH, require, require_in_source

FSDP = "torch.distributed.fsdp._fully_shard"
REMOVED = {
    "a method": (f"import {FSDP}._fsdp_param as home; del home.FSDPParam.to_sharded_dtensor", "to_sharded_dtensor"),
    "a class": (f"import {FSDP}._fsdp_api as home; del home.AllGather", "AllGather"),
    "a module": (
        f"import {FSDP} as home; del home._fsdp_state; sys.modules['{FSDP}._fsdp_state'] = None",
        "_fsdp_state",
    ),
    "an operator": ("import torch as home; del home._amp_foreach_non_finite_check_and_unscale_", "_amp_foreach"),
}


def import_without(*removals: str) -> list[str]:
    """Returns the last line of what each process prints that imports the package after something was removed."""
    code = "import sys, torch, torch.distributed.fsdp\n{}\nfrom lightning_mics import mics_shard"
    started = [
        subprocess.Popen([sys.executable, "-c", code.format(removal)], stderr=subprocess.PIPE, text=True)
        for removal in removals
    ]
    printed = [process.communicate(timeout=120)[1] for process in started]
    return [lines.strip().splitlines()[-1] if lines else "" for lines in printed]


def test_the_import_says_what_is_gone() -> None:
    said = import_without(*(removal for removal, _ in REMOVED.values()))
    for line, (_, name) in zip(said, REMOVED.values(), strict=True):
        assert line.startswith("ImportError: lightning-mics does not run with torch " + torch.__version__)
        assert name in line and line.endswith(f"install torch{SUPPORTED_TORCH}.")


class Owner:
    annotated: int

    def __init__(self) -> None:
        self.given = 1


def test_names_of_objects_and_of_sources_are_found() -> None:
    require(Owner, "annotated", "given", "__init__")
    with pytest.raises(ImportError, match=r"\(test_needs.Owner.missing\)"):
        require(Owner, "missing")
    require_in_source("torch.distributed._tools.fsdp2_mem_tracker", "FSDPMemTracker")
    for module in ("torch.distributed._tools.fsdp2_mem_tracker", "torch.distributed.nowhere"):
        with pytest.raises(ImportError, match=rf"\({re.escape(module)}.NoSuchName\)"):
            require_in_source(module, "NoSuchName")


def test_the_range_is_that_of_the_package() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.findall(r'"torch([<>][^"]*)"', project) == [SUPPORTED_TORCH]
