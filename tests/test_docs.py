"""What pages of the documentation tell people to write: snippets and commands run, tables of settings hold.

A block that cannot run here is preceded by ``<!-- not run: the reason -->``.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from models import Block, Regressor
from plan_examples import make_profile
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy

from lightning_mics import MiCSConfig, MiCSConfigError, MiCSStrategy
from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.cli import main
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import WorkerPool

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    "which.md",
    "guide/from-fsdp.md",
    "guide/data.md",
    *(f"symptoms/{page.name}" for page in sorted(DOCS.glob("symptoms/*.md"))),
]
NAMES = {
    "Block": Block,
    "MixedPrecision": MixedPrecision,
    "MixedPrecisionPolicy": MixedPrecisionPolicy,
    "MiCSConfig": MiCSConfig,
    "MiCSPlugin": MiCSPlugin,
    "MiCSStrategy": MiCSStrategy,
    "timedelta": timedelta,
    "torch": torch,
}
DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "mics_shard_size": 8}}


class Snippet(NamedTuple):
    """A block of code of a page; ``why_not`` is the reason for which it is not run."""

    language: str
    code: str
    why_not: str


def snippets(page: str) -> list[Snippet]:
    pattern = r"(?:<!-- not run: ([^>]+) -->\n)?```(\w+)\n(.*?)```"
    found = re.findall(pattern, (DOCS / page).read_text(), flags=re.DOTALL)
    return [Snippet(language, code, why_not) for why_not, language, code in found]


def tables(page: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields the rows of each table of a page, without the head, and the heading above it."""
    for section in re.split(r"^#+ ", (DOCS / page).read_text(), flags=re.MULTILINE)[1:]:
        for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
            rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
            yield section.splitlines()[0], rows


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


class MyModel(Regressor):
    """The model of the pages, which returns its loss."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


def run_python(page: str, folder: Path) -> None:
    """Runs the Python of a page, from its first line to its last, as a script on each rank would."""
    names = {"MyModel": MyModel, "dataset": torch.randn(16, 5), "rank": dist.get_rank(), "torch": torch}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for snippet in snippets(page):
            if snippet.language == "python" and not snippet.why_not:
                exec(snippet.code, names)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(
    page: str, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(snippet.language == "python" for snippet in snippets(page)):
        pool.run(run_python, page, tmp_path, world_size=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_mics.trace.planning.profile_of", lambda *_: make_profile())  # a trace takes seconds
    Path("ds_config.json").write_text(json.dumps(DS_CONFIG))
    for snippet in snippets(page):
        assert snippet.language in ("python", "sh", "text"), snippet
        if snippet.language == "sh" and not snippet.why_not:
            for line in snippet.code.splitlines():
                program, *words = shlex.split(line, comments=True)
                assert program == "mics" and main(words) == 0, capsys.readouterr().err


def settings_of(code: str) -> MiCSConfig:
    """Returns what is set by a call, or by variables."""
    if "(" in code:
        made = eval(code, dict(NAMES))
        return made if isinstance(made, MiCSConfig) else made.config
    with pytest.MonkeyPatch.context() as patch:
        for word in code.split():
            patch.setenv(*word.split("=", 1))
        return MiCSConfig.from_env()


def test_all_ways_in_are_told_the_same_in_a_situation() -> None:
    found = list(tables("which.md"))
    assert len({situation for situation, _ in found}) == 5
    for situation, rows in found:
        settings = [settings_of(code_in(cell)[0]) for _, cell in rows]
        assert len(rows) == 4 and all(one == settings[0] for one in settings), situation


MIGRATIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "FSDPStrategy": ([FSDPStrategy, FullyShardedDataParallel], [MiCSStrategy, FabricStrategy]),
    "ModelParallelStrategy": ([ModelParallelStrategy], [MiCSStrategy, FabricStrategy]),
    "Accelerate's FSDP2 plugin": ([FullyShardedDataParallelPlugin], [MiCSPlugin]),
}


def made_by(way: Any, arguments: str) -> tuple[Any, ...]:
    made = eval(f"way({arguments})", {**NAMES, "way": way})
    return tuple(
        getattr(made, name, None)
        for name in ("config", "full_checkpoint", "_save_distributed_checkpoint", "_timeout", "_process_group_backend")
    )


@pytest.mark.parametrize("title", MIGRATIONS)
def test_each_option_of_the_fsdps_becomes_what_the_table_says(title: str) -> None:
    theirs, ours = MIGRATIONS[title]
    rows = dict(tables("guide/from-fsdp.md"))[title]
    options = [(option, here) for there, here in rows for option in code_in(there) if "=" in option]
    known = {name for way in theirs for name in inspect.signature(way).parameters} - {"kwargs", "module"}
    assert {option.partition("=")[0] for option, _ in options} >= known
    for way in ours:
        for option, here in options:
            if here.startswith("refused"):
                with pytest.raises(MiCSConfigError, match=option.partition("=")[0]):
                    made_by(way, option)
            else:
                arguments = "" if here.startswith("done anyway") else code_in(here)[0]
                assert made_by(way, option) == made_by(way, arguments), option


def test_each_option_of_deepspeed_strategy_has_its_counterpart() -> None:
    rows = dict(tables("guide/migrating.md"))["DeepSpeedStrategy"]
    named = {option.partition("=")[0] for there, _ in rows for option in code_in(there)}
    assert named == set(inspect.signature(DeepSpeedStrategy).parameters)
    for _, here in rows:
        for code in code_in(here):
            if code.startswith("MiCSStrategy("):
                settings_of(code)
