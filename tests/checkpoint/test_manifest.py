"""The manifest: what it says of itself, and of what was written."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import equal, load_anew, make_old, save_new
from torch import nn

from lightning_mics import CheckpointError, consolidate, load_checkpoint, save_checkpoint
from lightning_mics.checkpoint import save
from lightning_mics.checkpoint.manifest import parse
from lightning_mics.cli import main
from lightning_mics.testing import WorkerPool


def rewrite(path: Path, **changes: Any) -> None:
    content = {**json.loads((path / "mics.json").read_text()), **changes}
    (path / "mics.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_no_bit_of_it_can_change(saved: Path) -> None:
    whole = (saved / "mics.json").read_bytes()
    assert parse(whole, "").world_size == 2
    generator = random.Random(0)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << generator.randrange(8)
        with pytest.raises(CheckpointError):
            parse(bytes(content), "", trusted=True)
        with pytest.raises(CheckpointError):
            parse(whole[:place], "", trusted=True)
    assert parse(json.dumps(json.loads(whole)).encode(), "") == parse(whole, "")  # laid out in another way


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (make_old, ("older lightning-mics", "weights_only=False")),
        (lambda path: (path / "mics.json").unlink(), ("mics.json is missing", "weights_only=False")),
    ],
)
def test_one_that_cannot_be_checked_needs_trust(
    pool: WorkerPool, tmp_path: Path, change: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    path, out = tmp_path / "saved.ckpt", tmp_path / "whole.ckpt"
    content = pool.run(save_new, str(path), 1, world_size=2)[0]
    change(path)
    for failure in pool.attempt(load_anew, str(path), world_size=2):
        assert failure.kind == "CheckpointError" and all(word in failure.message for word in words)
    with pytest.raises(CheckpointError, match=words[0]):
        consolidate(path, out)
    assert equal(pool.run(load_anew, str(path), False, world_size=2)[0][0], content)
    assert main(["consolidate", str(path), str(out), "--trust"]) == 0 and out.is_file()


@pytest.mark.parametrize("changes", [{"format": 1}, {"format": 1, "digest": None}, {"digest": None}, {"world_size": 3}])
def test_one_that_was_changed_is_damaged_also_for_those_who_trust_it(saved: Path, changes: dict[str, Any]) -> None:
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError, match=r"mics\.json is damaged"):
        load_checkpoint(saved, nn.Linear(1, 1), weights_only=False)


def lose(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def shorten(folder: Path) -> None:
    (folder / "meta.pt").write_bytes(b"")


@pytest.mark.parametrize("harm", [lose, shorten, shutil.rmtree])
def test_what_vanishes_before_the_end_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    path, model, write = tmp_path / "last", nn.Linear(4, 4), save._write
    save_checkpoint(path, model, meta={"step": 1})

    def write_and_harm(folder: Path, *args: Any) -> Any:
        written = write(folder, *args)
        harm(folder)
        return written

    monkeypatch.setattr(save, "_write", write_and_harm)
    with pytest.raises(CheckpointError, match=r"(__0_0\.distcp|meta\.pt|\.metadata)"):
        save_checkpoint(path, model, meta={"step": 2})
    assert load_checkpoint(path, model) == {"step": 1}


@pytest.mark.parametrize("names", [("step0", "step1"), ("last", "last")])
def test_a_thread_may_consolidate_while_the_loop_saves(tmp_path: Path, names: tuple[str, str]) -> None:
    read, written = (tmp_path / name for name in names)
    models = [nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))) for _ in range(2)]
    save_checkpoint(read, models[0])
    done, errors = threading.Event(), []

    def export() -> None:
        while not done.is_set():
            try:
                consolidate(read, tmp_path / "out.safetensors", force=True)
            except CheckpointError as error:
                errors.append(error)

    thread = threading.Thread(target=export)
    thread.start()
    for step in range(10):
        save_checkpoint(written, models[step % 2])
    done.set()
    thread.join()
    assert names[0] == names[1] or not errors
    load_checkpoint(written, models[0])
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert {entry.name for entry in tmp_path.iterdir()} == {*names, "out.safetensors"}
