"""``mics checkpoint``: what there is, what is in one, whether it is right, and how two differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_tools import save_new, trained

from lightning_mics import CheckpointError, save_checkpoint
from lightning_mics.checkpoint import compare_checkpoints, describe_checkpoint, list_checkpoints, verify_checkpoint
from lightning_mics.checkpoint.content import flatten
from lightning_mics.cli import main
from lightning_mics.testing import WorkerPool

META = {"step": 7, "loops": {"epoch": 1, "done": [1, 2]}, "ema": [torch.ones(3)]}


def save_twice(folder: str) -> None:
    model, optimizer = trained(1)
    for name in ("sharded.ckpt", "full.ckpt"):
        save_checkpoint(f"{folder}/{name}", model, optimizer, META, sharded=name == "sharded.ckpt")


@pytest.fixture
def both(pool: WorkerPool, tmp_path: Path) -> Path:
    pool.run(save_twice, str(tmp_path), world_size=2)
    return tmp_path


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_sharded_and_a_full_checkpoint_hold_the_same(both: Path) -> None:
    found = compare_checkpoints(both / "sharded.ckpt", both / "full.ckpt")
    assert found.differences == []
    described = describe_checkpoint(both / "sharded.ckpt")
    assert found.equal_tensors == len(described.tensors) and found.equal_values == len(described.values)
    assert described.tensors == describe_checkpoint(both / "full.ckpt").tensors
    assert described.tensors["state_dict.embedding.weight"].shape == (19, 8)
    assert described.tensors["optimizer_0.state.blocks.0.up.bias.exp_avg"].dtype == "float32"
    assert described.tensors["ema.0"].numel == 3
    assert (described.values["step"], described.values["loops.epoch"]) == ("7", "1")
    assert (described.listed.step, described.listed.world_size, described.listed.shard_size) == (7, 2, 2)


def write(path: Path, **changes: object) -> Path:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.int64), "c": torch.tensor([1, 2.0])}
    torch.save({"state_dict": {**weights, **changes}, "epoch": changes.get("a") is not None}, path)
    return path


def test_differences_are_named_with_their_size(tmp_path: Path) -> None:
    first = write(tmp_path / "first.ckpt", c=torch.tensor([1, float("nan")]))
    other = torch.arange(6.0).view(2, 3)
    other[1, 1:] += torch.tensor([0.5, -2.0])
    changed = {"a": other, "b": torch.zeros(3, dtype=torch.int64), "d": torch.ones(1), "c": torch.tensor([1.0, 2.0])}
    found = compare_checkpoints(first, write(tmp_path / "second.ckpt", **changed))
    by_name = {difference.name: difference for difference in found.differences}
    assert list(by_name) == ["state_dict.a", "state_dict.c", "epoch", "state_dict.b", "state_dict.d"]
    assert (by_name["state_dict.a"].largest, by_name["state_dict.a"].count) == (2.0, 2)
    assert by_name["state_dict.c"].largest == float("inf")
    assert (by_name["state_dict.b"].first, by_name["state_dict.b"].second) == ("int64 [2]", "int64 [3]")
    assert (by_name["state_dict.d"].first, by_name["epoch"].second) == (None, "True")


def test_a_type_is_a_difference_and_nan_is_itself(tmp_path: Path) -> None:
    nan = torch.tensor([1, float("nan")])
    first = write(tmp_path / "first.ckpt", c=nan)
    assert not compare_checkpoints(first, write(tmp_path / "same.ckpt", c=nan.clone())).differences
    (difference,) = compare_checkpoints(first, write(tmp_path / "half.ckpt", c=nan.half())).differences
    assert (difference.largest, difference.second) == (0.0, "float16 [2]")


def test_what_is_not_whole_is_listed_as_such(both: Path, tmp_path: Path) -> None:
    for name in ("cut", "lost", "spoilt"):
        shutil.copytree(both / "sharded.ckpt", both / "sub" / name)
    shard = both / "sub" / "cut" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    (both / "sub" / "lost" / "__1_0.distcp").unlink()
    spoil(both / "sub" / "spoilt" / "mics.json")
    (both / "last.ckpt").symlink_to("gone.ckpt")
    (both / ".x.ckpt.mics-incomplete-elsewhere-1-1-1.0").mkdir()
    problems = {Path(listed.path).name: listed.problem for listed in list_checkpoints(both)}
    assert problems.pop("sharded.ckpt") is None and problems.pop("full.ckpt") is None
    for name, word in {"cut": "bytes instead of", "lost": "__1_0.distcp", "spoilt": "damaged"}.items():
        assert word in problems.pop(name)
    assert "gone.ckpt" in problems.pop("last.ckpt")
    assert list(problems.values()) == ["being written"]


def test_every_damaged_file_is_found(both: Path) -> None:
    assert set(verify_checkpoint(both / "sharded.ckpt").values()) == {None}
    assert verify_checkpoint(both / "full.ckpt") == {"full.ckpt": None}
    for name in ("__0_0.distcp", "meta.pt"):
        spoil(both / "sharded.ckpt" / name)
    found = verify_checkpoint(both / "sharded.ckpt")
    assert {name for name, problem in found.items() if problem} == {"__0_0.distcp", "meta.pt"}
    spoil(both / "full.ckpt")
    with pytest.raises(CheckpointError, match="damaged"):
        compare_checkpoints(both / "full.ckpt", both / "full.ckpt")


def test_the_commands(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharded, full = str(both / "sharded.ckpt"), str(both / "full.ckpt")

    def run(*words: str) -> tuple[int, str]:
        code = main(["checkpoint", *words])
        output = capsys.readouterr()
        return code, output.out + output.err

    code, screen = run("ls", str(both))
    assert code == 0 and "sharded.ckpt" in screen and "whole" in screen
    code, screen = run("ls", str(both), "--json")
    assert [(listed["step"], listed["problem"]) for listed in json.loads(screen)] == [(7, None)] * 2
    code, screen = run("show", sharded, "--tensors")
    assert code == 0 and "shard size 2" in screen and "19 x 8" in screen and "loops.epoch" in screen
    assert json.loads(run("show", full, "--json")[1])["tensors"]["ema.0"] == {"dtype": "float32", "shape": [3]}
    assert run("verify", sharded) == (0, f"{sharded} is whole: all 5 file(s) are as they were written.\n")
    code, screen = run("diff", sharded, full)
    assert code == 0 and "No differences" in screen
    spoil(both / "sharded.ckpt" / "__1_0.distcp")
    code, screen = run("verify", sharded, "--json")
    assert code == 1 and json.loads(screen)["whole"] is False
    code, screen = run("diff", sharded, full)
    assert code == 2 and "damaged" in screen
    code, screen = run("show", str(both / "none"))
    assert code == 2 and "There is no checkpoint" in screen


def test_a_step_more_is_a_difference(pool: WorkerPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        pool.run(save_new, str(tmp_path / f"{seed}.ckpt"), seed, world_size=2)
    assert main(["checkpoint", "diff", str(tmp_path / "1.ckpt"), str(tmp_path / "2.ckpt")]) == 1
    screen = capsys.readouterr().out
    assert "state_dict" in screen and "--all lists them" in screen


def test_leaves_have_dotted_names() -> None:
    nested = {"a": {"b": [1, 2]}, "c": [{"d": 3}, 4], "e": {}, 5: None}
    assert flatten(nested) == {"a.b": [1, 2], "c.0.d": 3, "c.1": 4, "e": {}, "5": None}
