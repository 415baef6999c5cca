"""Files from strangers run no code: a payload in each place that is pickled, at each door."""

from __future__ import annotations

import io
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import make_old
from torch import nn
from torch.distributed import checkpoint as dcp

from lightning_mics import CheckpointError, consolidate, load_checkpoint, save_checkpoint
from lightning_mics.checkpoint import load_raw, load_rest, read_file, read_weights
from lightning_mics.checkpoint.manifest import parse

ran: list[str] = []


def run_code() -> None:
    ran.append("code ran")


class Evil:
    def __reduce__(self) -> Any:
        return run_code, ()


@pytest.fixture(autouse=True)
def nothing_runs() -> Any:
    ran.clear()
    yield
    assert not ran


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def sign(path: Path) -> None:
    """Makes a manifest right for what lies there by now, as a stranger would."""
    manifest = parse((path / "mics.json").read_bytes(), "")
    for name in list(manifest.files):
        content = (path / name).read_bytes()
        manifest.files[name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (path / "mics.json").write_text(manifest.to_text())


def evil_index(path: Path) -> None:
    index = pickle.loads((path / ".metadata").read_bytes())
    index.storage_meta = Evil()
    (path / ".metadata").write_bytes(pickle.dumps(index))
    for name in ("mics.json", "index.json"):
        (path / name).unlink()
    torch.save({}, path / "meta.pt")  # no longer one of ours


def evil_rest(path: Path) -> None:
    torch.save({"step": Evil()}, path / "meta.pt")
    sign(path)


def evil_shard(path: Path) -> None:
    content = json.loads((path / "index.json").read_text())
    place = next(place for place in content["places"] if place[0].endswith(".lr"))
    buffer, shard = io.BytesIO(), path / place[2]
    torch.save(Evil(), buffer)
    place[3:] = [shard.stat().st_size, buffer.tell()]
    shard.write_bytes(shard.read_bytes() + buffer.getvalue())
    (path / "index.json").write_text(json.dumps(content))
    sign(path)


def evil_file(path: Path) -> None:
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "x": Evil()}, path)


DOORS: dict[str, Callable[[Path], Any]] = {
    "load": lambda path: load_checkpoint(path, *build()),
    "consolidate": lambda path: consolidate(path, path.parent / "whole.ckpt", force=True),
    "load_rest": load_rest,
    "read_weights": read_weights,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("payload", [evil_index, evil_rest, evil_shard, evil_file])
def test_nothing_runs_and_what_was_refused_is_said(tmp_path: Path, payload: Callable[[Path], None], door: str) -> None:
    path, (model, optimizer) = tmp_path / "strange.ckpt", build()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    if payload is not evil_file:
        save_checkpoint(path, model, optimizer, {"step": 1})
    payload(path)
    if payload is evil_file and door == "read_weights":
        return  # of folders only
    if (payload, door) in ((evil_shard, "load_rest"), (evil_shard, "read_weights")):
        DOORS[door](path)  # reads other parts
        return
    with pytest.raises(CheckpointError, match=r"run_code.* can run code.*weights_only=False"):
        DOORS[door](path)


@pytest.mark.parametrize("old", [False, True], ids=["archive", "before 1.6"])
def test_raw_files_and_registered_objects(tmp_path: Path, old: bool) -> None:
    torch.save({"weight": Evil()}, tmp_path / "raw.pt", _use_new_zipfile_serialization=not old)
    for read in (lambda path: load_raw(path, nn.Linear(2, 2)), lambda path: read_file(path, None)):
        with pytest.raises(CheckpointError, match=r"run_code.* can run code.*weights_only=False"):
            read(tmp_path / "raw.pt")


def test_a_weights_file_of_a_stranger_becomes_no_safetensors(tmp_path: Path) -> None:
    evil_file(tmp_path / "strange.ckpt")
    with pytest.raises(CheckpointError, match="can run code"):
        consolidate(tmp_path / "strange.ckpt", tmp_path / "out.safetensors")


def test_files_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "strange.ckpt"
    save_checkpoint(path, nn.Linear(2, 2))
    (tmp_path / "secret").write_bytes(b"x" * 4096)
    (path / "index.json").write_text((path / "index.json").read_text().replace("__0_0.distcp", "../secret"))
    sign(path)
    with pytest.raises(CheckpointError, match=r"names the file '../secret', which is none of its own"):
        load_checkpoint(path, nn.Linear(2, 2))


def test_those_who_trust_a_file_get_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "own.ckpt"
    save_checkpoint(path, nn.Linear(2, 2), meta={"when": Moment()})
    assert isinstance(load_checkpoint(path, nn.Linear(2, 2), weights_only=False)["when"], Moment)


class Moment:
    pass


@pytest.mark.parametrize("of", ["an older version", "DCP"])
def test_others_indexes_are_read_without_running_anything(tmp_path: Path, of: str) -> None:
    path, (model, optimizer), (fresh, state) = tmp_path / "old.ckpt", build(), build()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(path, model, optimizer, {"step": 3})
    (path / "index.json").unlink()
    if of == "DCP":
        (path / "mics.json").unlink()
        torch.save({"step": 3}, path / "meta.pt")
    else:
        content = json.loads((path / "mics.json").read_text())
        del content["files"]["index.json"]
        (path / "mics.json").write_text(json.dumps(content))
        make_old(path)
    assert load_checkpoint(path, fresh, state, weights_only=None if of == "DCP" else False)["step"] == 3
    assert all(map(torch.equal, fresh.parameters(), model.parameters()))
    assert all(
        torch.equal(state.state[b]["momentum_buffer"], optimizer.state[a]["momentum_buffer"])
        for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )


def test_dcp_reads_what_we_write(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path / "ours.ckpt", model)
    state = {"state_dict": nn.Linear(2, 2).state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "ours.ckpt", no_dist=True)
    assert torch.equal(state["state_dict"]["weight"], model.weight)
    assert os.listdir(tmp_path) == ["ours.ckpt"]
