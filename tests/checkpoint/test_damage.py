"""Damaged checkpoints are refused, on every rank."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import equal, load_anew, save_new
from lightning_tools import Net, make_optimizer

from lightning_mics import CheckpointError, consolidate, load_checkpoint
from lightning_mics.testing import Failure, WorkerPool


def truncate(path: Path) -> None:
    file = sorted(path.glob("*.distcp"))[0]
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    file = sorted(path.glob("*.distcp"))[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def drop_a_shard(path: Path) -> None:
    sorted(path.glob("*.distcp"))[0].unlink()


def drop_the_index(path: Path) -> None:
    (path / ".metadata").unlink()


def drop_the_rest(path: Path) -> None:
    (path / "meta.pt").unlink()


def spoil_the_manifest(path: Path) -> None:
    (path / "mics.json").write_text("{")


def come_from_the_future(path: Path) -> None:
    content = json.loads((path / "mics.json").read_text())
    (path / "mics.json").write_text(json.dumps({**content, "format": 99}))


def become_a_text_file(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    path.write_text("not a checkpoint")


def vanish(path: Path) -> None:
    become_a_text_file(path)
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, ("__0_0.distcp", "damaged", "bytes")),
        (flip_a_bit, (".distcp", "checksum")),
        (drop_a_shard, ("__0_0.distcp", "missing")),
        (drop_the_index, (".metadata", "half-written")),
        (drop_the_rest, ("meta.pt", "missing")),
        (spoil_the_manifest, ("mics.json", "damaged")),
        (come_from_the_future, ("newer", "Update")),
        (become_a_text_file, ("not a PyTorch checkpoint",)),
        (vanish, ("There is no checkpoint", "good.ckpt")),
    ],
)
def test_damaged_checkpoints_are_refused_on_every_rank(
    pool: WorkerPool, tmp_path: Path, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    path = tmp_path / "saved.ckpt"
    pool.run(save_new, str(tmp_path / "good.ckpt"), 1, world_size=2)
    pool.run(save_new, str(path), 1, world_size=2)
    damage(path)
    for failure in pool.attempt(load_anew, str(path), world_size=2):
        assert isinstance(failure, Failure) and failure.kind == "CheckpointError", failure
        for word in words:
            assert word in failure.message
    with pytest.raises(CheckpointError):
        consolidate(path, tmp_path / "whole.ckpt")


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit_in_a_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    content[largest.header_offset + 200] ^= 1  # behind the record's header and padding
    path.write_bytes(bytes(content))


def claim_another_volume(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x06\x07") + 4] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate_file, flip_a_bit_in_a_tensor, claim_another_volume])
def test_damaged_files_are_refused_on_every_rank(
    pool: WorkerPool, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "saved.ckpt"
    pool.run(save_new, str(path), 1, False, world_size=2)
    damage(path)
    for failure in pool.attempt(load_anew, str(path), world_size=2):
        assert isinstance(failure, Failure) and failure.kind == "CheckpointError", failure
        assert "saved.ckpt" in failure.message and "damaged" in failure.message
    with pytest.raises(CheckpointError, match="damaged"):
        consolidate(path, tmp_path / "whole.safetensors")


def test_a_truncated_shard_is_found_without_a_manifest(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    pool.run(save_new, str(path), 1, world_size=2)
    (path / "mics.json").unlink()
    assert pool.run(load_anew, str(path), False, world_size=2)[0][1]["seed"] == 1
    truncate(path)
    for failure in pool.attempt(load_anew, str(path), False, world_size=2):
        assert failure.kind == "CheckpointError" and "__0_0.distcp is damaged" in failure.message


# Single bytes.


def damages(whole: bytes, flips: int | None, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Yields a file's content with one bit flipped (in each byte where ``flips`` is ``None``), or cut short."""
    generator = random.Random(0)
    places = range(len(whole)) if flips is None else [generator.randrange(len(whole)) for _ in range(flips)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << generator.randrange(8)
        yield f"byte {place}", bytes(content)
    for length in [0, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(cuts - 2))]:
        yield f"cut to {length} bytes", whole[:length]


def load_alone(path: Path) -> dict[str, Any]:
    """Loads a checkpoint in this process; returns all that it holds by name."""
    model = Net()
    optimizer = make_optimizer("adamw", model.parameters())
    meta = load_checkpoint(path, model, optimizer)
    states = {
        f"{index}/{key}": value for index, state in enumerate(optimizer.state.values()) for key, value in state.items()
    }
    return {**model.state_dict(), **states, "seed": torch.tensor(meta["seed"])}


def consolidated(path: Path, out: Path) -> dict[str, Any]:
    out.unlink(missing_ok=True)
    content = torch.load(consolidate(path, out), weights_only=True)
    return {**content["state_dict"], "seed": torch.tensor(content["seed"])}


def refusals(saved: Path, file: Path, flips: int | None, cuts: int, must_raise: bool) -> tuple[int, int]:
    """Damages a file in many ways; returns how many, and how many of them were refused.

    What is not refused must change nothing: consolidating and loading must give what the whole file gives.
    """
    whole, out = file.read_bytes(), saved.with_name("out.ckpt")
    expected = consolidated(saved, out), load_alone(saved)
    total = refused = 0
    for what, content in damages(whole, flips, cuts):
        total += 1
        file.write_bytes(content)
        out.unlink(missing_ok=True)
        try:
            found = consolidated(saved, out), load_alone(saved)
        except CheckpointError:
            refused += 1
            assert not out.exists(), f"{file.name}, {what}: half of it was written"
            with pytest.raises(CheckpointError):
                load_alone(saved)
        else:
            assert not must_raise, f"{file.name}, {what}: nobody noticed"
            assert all(map(equal, found, expected)), f"{file.name}, {what}: something else was read"
    file.write_bytes(whole)
    return total, refused


def told(kinds: str, total: int, refused: int) -> str:
    return f"{total} damages ({kinds}): {refused} refused, {total - refused} without any effect"


@pytest.mark.parametrize("name", ["index.json", ".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp", "mics.json"])
def test_any_damaged_byte_is_a_checkpoint_error(saved: Path, name: str) -> None:
    assert refusals(saved, saved / name, 20, 6, must_raise=True) == (26, 26)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("name", "flips"),
    [
        ("index.json", 1000),
        (".metadata", 1000),
        ("meta.pt", None),
        ("__0_0.distcp", 1000),
        ("__1_0.distcp", 1000),
        ("mics.json", None),
    ],
)
def test_hundreds_of_damaged_bytes_are_checkpoint_errors(
    saved: Path, name: str, flips: int | None, record_property: Callable[[str, object], None]
) -> None:
    total, refused = refusals(saved, saved / name, flips, 100, must_raise=True)
    kinds = f"{flips} bits" if flips else "a bit of every byte"
    record_property("figures", told(f"{kinds}, 100 lengths", total, refused))


def damage_a_full_file(pool: WorkerPool, folder: Path, flips: int, cuts: int) -> tuple[int, int]:
    path = folder / "saved.ckpt"
    pool.run(save_new, str(path), 1, False, world_size=2)
    return refusals(path, path, flips, cuts, must_raise=False)


def test_any_damaged_byte_of_a_full_file_is_an_error_or_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    total, refused = damage_a_full_file(pool, tmp_path, 20, 6)
    assert total == 26 and refused > 6


@pytest.mark.campaign
def test_hundreds_of_damaged_bytes_of_a_full_file_are_errors_or_nothing(
    pool: WorkerPool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    total, refused = damage_a_full_file(pool, tmp_path, 1000, 100)
    record_property("figures", told("1000 bits, 100 lengths", total, refused))
