"""Checkpoints of bare loops: what is written, what is refused, what consolidating makes of them."""

from __future__ import annotations

import dataclasses
import sys
import threading
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoint_tools import PLAIN, equal, everything, load_anew, save_new, trained
from lightning_tools import Net, cross_entropy
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from lightning_mics import CheckpointError, MiCSConfig, consolidate, load_checkpoint, mics_shard, save_checkpoint
from lightning_mics.checkpoint import load_into, optimizer_state
from lightning_mics.testing import WorkerPool


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_round_trip(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    path = str(tmp_path / "saved")
    saved = pool.run(save_new, path, 1, sharded, world_size=4)[0]
    for loaded, meta in pool.run(load_anew, path, world_size=4):
        assert equal(loaded, saved)
        assert meta["seed"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def save_where_a_copy_is_finished(path: str) -> dict[str, Tensor]:
    """Saves with a writer that tells a copy of the index where everything is, as that of torch 2.11 does."""
    finish = dcp.FileSystemWriter.finish

    def of_a_copy(writer: Any, metadata: Any, results: Any) -> None:
        finish(writer, dataclasses.replace(metadata), results)

    with mock.patch.object(dcp.FileSystemWriter, "finish", of_a_copy):
        return save_new(path, 1, True)


def test_the_index_says_where_everything_is(pool: WorkerPool, tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    saved = pool.run(save_where_a_copy_is_finished, path, world_size=2)[0]
    assert all(equal(loaded, saved) for loaded, _ in pool.run(load_anew, path, world_size=2))


def written() -> int:
    """Returns how many bytes the kernel has seen this process write."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["wchar"])


def save_large(path: str) -> tuple[int, int, int]:
    """Returns the bytes of the model, for how many shards this rank planned, and the bytes that it wrote."""
    torch.manual_seed(0)
    model = mics_shard(nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), PLAIN)
    planned, create = [], DefaultSavePlanner.create_local_plan

    def watched(self: DefaultSavePlanner) -> SavePlan:
        planned.append(create(self))
        return planned[-1]

    DefaultSavePlanner.create_local_plan = watched
    before = written()
    try:
        save_checkpoint(path, model)
    finally:
        DefaultSavePlanner.create_local_plan = create
    model_bytes = sum(param.numel() * param.element_size() for param in model.parameters())
    return model_bytes, len(planned[0].items), written() - before


def test_each_shard_is_written_once_and_replicas_share_the_writing(pool: WorkerPool, tmp_path: Path) -> None:
    (model_bytes, *_), planned, counted = zip(*pool.run(save_large, str(tmp_path / "saved"), world_size=4), strict=True)
    assert sum(planned) == 16 * 2  # two shards of each tensor: what replicas share is not even planned twice
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "saved").glob("*.distcp")}
    assert len(sizes) == 4
    overhead = 16 * 2 * 4096  # each tensor is a small archive of its own
    assert model_bytes < sum(sizes.values()) < model_bytes + overhead
    assert max(sizes.values()) < 0.6 * sum(sizes.values()) / 2
    assert model_bytes < sum(counted) < 1.05 * model_bytes, "more than one replica's worth went to the file system"


class Branches(nn.Module):
    """Has tied, frozen, uneven and never used parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.uneven = nn.Linear(5, 7)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return cross_entropy(self.net(tokens), tokens) + self.uneven(tokens[:, :5].float()).square().mean()


def step_branches(config: MiCSConfig, optimizer: str, path: str, save: bool) -> dict[str, Tensor]:
    torch.manual_seed(8 if save else 9)
    model = mics_shard(Branches(), config)
    decayed = [param for name, param in model.named_parameters() if "weight" in name]
    others = [param for name, param in model.named_parameters() if "weight" not in name]
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    settings: dict[str, Any] = {"momentum": 0.9} if optimizer == "momentum" else {}
    inner = kind([{"params": decayed, "lr": 0.01}, {"params": others, "lr": 0.02}], **settings)
    if save:
        model(torch.arange(10).view(2, 5)).backward()
        inner.step()
        save_checkpoint(path, model, inner)
    else:
        load_checkpoint(path, model, inner)
        assert [group["lr"] for group in inner.param_groups] == [0.01, 0.02]
    states = optimizer_state(model, inner)["state"]
    assert not any(name.startswith(("unused", "frozen")) for name in states)
    return everything(model, inner)


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "sgd"])
def test_tied_frozen_uneven_and_unused_parameters(pool: WorkerPool, tmp_path: Path, optimizer: str) -> None:
    path = str(tmp_path / "saved")
    saved = pool.run(step_branches, PLAIN, optimizer, path, True, world_size=4)[0]
    for world_size, shard_size in ((4, 4), (2, 1), (1, 1)):
        config = MiCSConfig(shard_size=shard_size)
        for loaded in pool.run(step_branches, config, optimizer, path, False, world_size=world_size):
            assert equal(loaded, saved)


def save_before_the_first_step(path: str) -> tuple[int, int]:
    model, optimizer = trained(seed=1, steps=0)
    save_checkpoint(path, model, optimizer)
    model, optimizer = trained(seed=2, steps=0)
    load_checkpoint(path, model, optimizer)
    return len(optimizer.state), len(optimizer.param_groups[0]["params"])


def test_an_optimizer_without_states(pool: WorkerPool, tmp_path: Path) -> None:
    for num_states, _ in pool.run(save_before_the_first_step, str(tmp_path / "saved"), world_size=2):
        assert num_states == 0


# What is refused.


def save_with_own_buffer(path: str) -> None:
    model, _ = trained(1)
    model.register_buffer("seen", torch.full((2,), dist.get_rank()))
    save_checkpoint(path, model)


def test_of_buffers_that_differ_rank_0_counts(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    pool.run(save_with_own_buffer, str(path), world_size=4)
    whole = torch.load(consolidate(path, tmp_path / "whole.ckpt"), weights_only=True)
    assert whole["state_dict"]["seen"].tolist() == [0, 0]


def load_into_another_model(path: str) -> None:
    model = mics_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), PLAIN)
    load_checkpoint(path, model)


def load_with_other_groups(path: str) -> None:
    model, _ = trained(1, steps=0)
    params = list(model.parameters())
    load_checkpoint(path, model, torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}]))


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_checkpoints_that_do_not_fit_are_refused(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    path = str(tmp_path / "saved.ckpt")
    pool.run(save_new, path, 1, sharded, world_size=2)
    for failure in pool.attempt(load_into_another_model, path, world_size=2):
        assert failure.kind == "CheckpointError"
        assert "0.bias" in failure.message and "blocks.0.down.bias" in failure.message
    for failure in pool.attempt(load_with_other_groups, path, world_size=2):
        assert failure.kind == "CheckpointError"
        assert "1 parameter group(s)" in failure.message and "has 2" in failure.message


def three_layers(trained: tuple[int, ...]) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    return model, torch.optim.AdamW([param for place in trained for param in model[place].parameters()])


@pytest.mark.parametrize("form", ["sharded", "full", "consolidated"])
@pytest.mark.parametrize(("before", "after"), [((1, 2), (0, 1, 2)), ((0, 1, 2), (2, 1)), ((0, 1), (1, 0))])
def test_optimizer_states_go_to_parameters_by_name(
    tmp_path: Path, form: str, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    path = tmp_path / "saved.ckpt"
    model, optimizer = three_layers(before)
    model(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    saved = {place: optimizer.state[model[place].weight]["exp_avg"] for place in before}
    save_checkpoint(path, model, optimizer, sharded=form != "full")
    if form == "consolidated":
        path = consolidate(path, tmp_path / "whole.ckpt")
    model, optimizer = three_layers(after)
    load_checkpoint(path, model, optimizer)
    for place in after:
        state = optimizer.state.get(model[place].weight, {})
        assert torch.equal(state["exp_avg"], saved[place]) if place in saved else not state


def save_several(path: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "zyxwvutsrqponmlkjihgfedcba"})
    for name, part in model.items():
        nn.init.constant_(part.weight, ord(name))
    save_checkpoint(path, model)


def test_of_several_models_that_fit_every_rank_takes_the_first_by_name(tmp_path: Path) -> None:
    save_several(str(tmp_path / "saved.ckpt"))
    model = nn.Linear(2, 2)
    load_into(tmp_path / "saved.ckpt", model, strict=False)
    assert float(model.weight[0, 0]) == ord("a")


def test_saving_does_not_destroy_a_foreign_folder(pool: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for failure in pool.attempt(save_new, str(tmp_path / "thesis"), 1, world_size=2):
        assert failure.kind == "CheckpointError" and "other files" in failure.message
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


# What modules keep beside parameters and buffers.


class Stateful(nn.Module):
    """Has an extra state that is a dictionary, and hands out copies of a count, as metrics do."""

    def __init__(self, tag: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tag = {"tag": tag, "deep": {"list": [tag, "x"]}}
        self.count = torch.tensor(tag)

    def get_extra_state(self) -> dict[str, Any]:
        return self.tag

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.tag = state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}count"] = self.count.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.count = state_dict.get(f"{prefix}count", self.count)
        super()._load_from_state_dict(state_dict, prefix, *args)


def keep_states(path: str, sharded: bool) -> tuple[dict[str, Any], int, dict[str, Any]]:
    def build(tag: int) -> nn.Module:
        return mics_shard(nn.Sequential(Stateful(tag), nn.Linear(4, 1)), PLAIN)

    save_checkpoint(path, build(5), meta={"step": 3}, sharded=sharded)
    model = build(6)
    meta = load_checkpoint(path, model)
    return model[0].tag, int(model[0].count), meta


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_extra_states_and_counts_come_back(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    path = tmp_path / "saved.ckpt"
    for tag, count, meta in pool.run(keep_states, str(path), sharded, world_size=2):
        assert (tag, count, meta) == ({"tag": 5, "deep": {"list": [5, "x"]}}, 5, {"step": 3})
    whole = torch.load(consolidate(path, tmp_path / "whole.ckpt"), weights_only=True)
    assert whole["state_dict"]["0._extra_state"]["tag"] == 5 and int(whole["state_dict"]["0.count"]) == 5


def save_without_optimizer(path: str) -> None:
    model, optimizer = trained(1)
    save_checkpoint(path, model, sharded=False)
    load_checkpoint(path, model, optimizer)


def test_a_full_file_without_optimizer_states_says_so(pool: WorkerPool, tmp_path: Path) -> None:
    for failure in pool.attempt(save_without_optimizer, str(tmp_path / "saved.ckpt"), world_size=2):
        assert failure.kind == "CheckpointError" and "holds no states for 'optimizer_0'" in failure.message


def test_names_as_long_as_a_folder_takes(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / ("n" * 240 + ".ckpt")
    saved = pool.run(save_new, str(path), 1, world_size=2)[0]
    assert equal(pool.run(load_anew, str(path), world_size=2)[0][0], saved)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# Consolidating.


@pytest.mark.parametrize("force", [True, False])
def test_consolidating_destroys_nothing_of_others(saved: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"chapter\.txt"):
        consolidate(saved, tmp_path / "thesis", force=force)
    for around in (tmp_path, saved):
        with pytest.raises(CheckpointError, match="holds the checkpoint"):
            consolidate(saved, around if around.suffix else around / "..", force=force)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work" and (saved / ".metadata").exists()


def test_consolidating_replaces_by_force_only(saved: Path, tmp_path: Path) -> None:
    out = consolidate(saved, tmp_path / "weights.SAFETENSORS")
    before = out.stat().st_ino
    with pytest.raises(CheckpointError, match="--force"):
        consolidate(saved, out)
    assert consolidate(saved, out, force=True).stat().st_ino != before


@pytest.mark.parametrize("name", ["x.safetensors", "folder/x.ckpt"])
def test_what_cannot_be_written_is_said(saved: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        consolidate(saved, tmp_path / "file" / name)


def save_a_lock(path: str, sharded: bool) -> None:
    model, optimizer = trained(2)
    save_checkpoint(path, model, optimizer, {"lock": threading.Lock()}, sharded=sharded)


@pytest.mark.parametrize("sharded", [True, False])
def test_of_what_cannot_be_pickled_the_disk_is_not_blamed(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    for failure in pool.attempt(save_a_lock, str(tmp_path / "it"), sharded, world_size=4):
        assert failure.kind == "CheckpointError" and "_thread.lock" in failure.message, failure
        assert failure.message.endswith("Leave out what cannot be written, or convert it.")
        assert failure.message.count("(on rank") == 1
    assert not list(tmp_path.iterdir())


def save_with_an_unknown_class(path: str) -> None:
    model, optimizer = trained(1)
    module = types.ModuleType("gone")
    exec("class Setting: pass", module.__dict__)
    module.Setting.__module__ = "gone"
    sys.modules["gone"] = module
    save_checkpoint(path, model, optimizer, {"setting": module.Setting()})


def test_weights_need_no_classes_of_the_training_script(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    pool.run(save_with_an_unknown_class, str(path), world_size=2)
    assert consolidate(path, tmp_path / "weights.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"meta.pt holds an object whose class cannot be imported .*PYTHONPATH"):
        consolidate(path, tmp_path / "whole.ckpt", weights_only=False)


def consolidate_on_one_rank(path: str) -> bool:
    if dist.get_rank() == 1:
        consolidate(path, f"{path}.safetensors")
    return True


def test_one_rank_of_a_running_job_may_consolidate(pool: WorkerPool, saved: Path) -> None:
    assert pool.run(consolidate_on_one_rank, str(saved), world_size=2) == [True, True]
    assert Path(f"{saved}.safetensors").is_file()
