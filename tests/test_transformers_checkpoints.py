"""Checkpoints of the Trainer of transformers: whole under their names, checked, and never half resumed from."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate_tools import forget_accelerate
from checkpoint_tools import equal, held_up
from models import build
from test_transformers import ROWS, make_trainer, train_alone
from torch import Tensor, nn
from transformers import TrainerCallback
from works import works

from lightning_mics import CheckpointError
from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.accelerate import trainer as trainers
from lightning_mics.accelerate.resuming import find_checkpoint
from lightning_mics.checkpoint import describe_checkpoint, list_checkpoints, verify_checkpoint
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences
from lightning_mics.transformers import MiCSTrainer

SAVING = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}


def trainer_in(folder: str, steps: int, model: nn.Module | None = None, behind: bool = False, **settings: Any) -> Any:
    forget_accelerate()
    model = build("gpt2", 3) if model is None else model
    settings = {**SAVING, "optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": steps, **settings}
    plugin = MiCSPlugin(shard_size=2, async_checkpoint=behind)
    return make_trainer(MiCSTrainer, folder, model, ROWS, plugin=plugin, **settings)


def train(folder: str, steps: int, resume: str | bool | None = None, **settings: Any) -> dict[str, Tensor]:
    trainer = trainer_in(folder, steps, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return full_state_dict(trainer.model)


@pytest.fixture
def run(pool: WorkerPool, tmp_path: Path) -> Path:
    pool.run(train, str(tmp_path / "run"), 2, world_size=2, timeout=120)
    return tmp_path / "run"


def contents(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def flip(file: Path, generator: random.Random) -> bool:
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return bool(file.write_bytes(bytes(content)))


def cut(file: Path, generator: random.Random) -> bool:
    content = file.read_bytes()
    file.write_bytes(content[: generator.randrange(len(content))])
    return True


def drop(file: Path, generator: random.Random) -> bool:
    file.unlink()
    return True


def swap(file: Path, generator: random.Random) -> bool:
    other = Path(str(file).replace("checkpoint-2", "checkpoint-1"))
    if not other.is_file() or other.read_bytes() == file.read_bytes():
        return False
    return bool(shutil.copyfile(other, file))


def damage_everything(run: Path, ways: dict[Callable[[Path, random.Random], bool], int]) -> dict[str, int]:
    """Damages each file of the newest checkpoint in each way; every time the one before it must be found."""
    newest, before, kept = run / "checkpoint-2", run / "checkpoint-1", run.with_name("kept")
    shutil.copytree(newest, kept)
    generator, counts = random.Random(0), {}
    for way, times in ways.items():
        for name in contents(kept) * times:
            if not way(newest / name, generator):
                continue
            counts[way.__name__] = counts.get(way.__name__, 0) + 1
            with pytest.raises(CheckpointError):
                find_checkpoint(str(run), str(newest), None)
            assert find_checkpoint(str(run), True, None) == str(before), f"{way.__name__} of {name}"
            shutil.copyfile(kept / name, newest / name)
    assert find_checkpoint(str(run), True, None) == str(newest)
    return counts


@works("Savers", "Checkpoints of MiCSTrainer: any damage is an error")
def test_any_damage_of_any_file_is_an_error(run: Path) -> None:
    assert set(contents(run / "checkpoint-2")) >= {
        *("mics.json", "model.safetensors", "config.json", "scheduler.pt", "trainer_state.json", "training_args.bin"),
        *("rng_state_0.pth", "rng_state_1.pth", "optimizer_mics/mics.json", "optimizer_mics/__0_0.distcp"),
    }
    counts = damage_everything(run, {flip: 2, cut: 1, drop: 1, swap: 1})
    assert counts["flip"] > 20 and counts["swap"] > 5


@pytest.mark.campaign
def test_hundreds_of_damages_are_errors(run: Path, record_property: Callable[[str, object], None]) -> None:
    counts = damage_everything(run, {flip: 40, cut: 10, drop: 1, swap: 1})
    record_property("figures", f"{sum(counts.values())} damages ({counts}): none was silent")


def resume_in_words(folder: str, resume: str | bool, steps: int = 3, **settings: Any) -> str:
    try:
        train(folder, steps, resume, **settings)
    except CheckpointError as error:
        return str(error)
    return ""


def test_what_is_not_whole_is_passed_over_or_refused_on_all_ranks(pool: WorkerPool, run: Path, caplog: Any) -> None:
    (run / "checkpoint-7").mkdir()  # as an earlier version left it when it was killed
    shutil.copyfile(run / "checkpoint-1" / "model.safetensors", run / "checkpoint-7" / "model.safetensors")
    flip(run / "checkpoint-2" / "model.safetensors", random.Random(0))
    for said in pool.run(resume_in_words, str(run), str(run / "checkpoint-2"), world_size=2):
        assert "model.safetensors is damaged" in said
    for said in pool.run(resume_in_words, str(run), str(run / "checkpoint-7"), world_size=2):
        assert "trainer_state.json is missing" in said and "from_pretrained" in said
    for said in pool.run(resume_in_words, str(run), str(run / "checkpoint-1"), optim="sgd", world_size=2):
        assert "holds states of another optimizer" in said and "SGD has dampening" in said
    assert find_checkpoint(str(run), True, None) == str(run / "checkpoint-1")
    assert "passing over checkpoint-7 (" in caplog.text and "; checkpoint-2 (" in caplog.text
    (run / "checkpoint-2" / "notes.txt").write_text("of somebody")
    assert pool.run(resume_in_words, str(run), True, 2, world_size=2) == ["", ""]
    assert (run / "checkpoint-2" / "notes.txt").read_text() == "of somebody"
    assert find_checkpoint(str(run), str(run / "checkpoint-2"), None)  # it was saved anew


def train_and_fail(folder: str, moment: str) -> list[str]:
    """Fails in the second checkpoint; returns what lies in the folder afterwards."""
    trainer = trainer_in(folder, 2)
    owner: Any = torch if moment == "torch.save" else type(trainer.state)
    name = moment.rpartition(".")[2]
    original = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2 and dist.get_rank() == 0:
            raise OSError("no space left")
        return original(*args, **kwargs)

    setattr(owner, name, fail)
    try:
        trainer.train()
    except CheckpointError as error:
        assert "no space left" in str(error) and "checkpoint-2" in str(error)
        return sorted(os.listdir(folder))
    finally:
        setattr(owner, name, original)
    return ["nothing was raised"]


@pytest.mark.parametrize("moment", ["torch.save", "TrainerState.save_to_json"])
def test_a_failed_save_leaves_the_checkpoint_before_it(pool: WorkerPool, tmp_path: Path, moment: str) -> None:
    for left in pool.run(train_and_fail, str(tmp_path), moment, world_size=2):
        assert left == ["checkpoint-1"]


class GoOn(TrainerCallback):
    """Lets the checkpoint in flight be written after the third step; notes whether it was there until then."""

    def __init__(self, folder: str, go_on: threading.Event) -> None:
        self.path, self.go_on = Path(folder) / "checkpoint-2", go_on
        self.was_there: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            dist.barrier()
            self.was_there.append(self.path.exists())
            self.go_on.set()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.was_there.append(self.path.exists())


def save_behind(folder: str) -> tuple[list[bool], bool]:
    """Trains on while a checkpoint is written, and anew from it; returns when it was there, and whether both agree."""
    said: list[str] = []
    trainers.inform, original = said.append, trainers.inform
    with held_up() as go_on:
        trainer = trainer_in(folder, 4, behind=True, save_steps=2)
        noted = GoOn(folder, go_on)
        trainer.add_callback(noted)
        trainer.train()
        was_there = [*noted.was_there, Path(folder, "checkpoint-4").exists()]
    trainers.inform = original
    assert said == ["async_checkpoint=True: on_save of GoOn is called before the checkpoint is there."]
    whole = full_state_dict(trainer.model)
    return was_there, equal(train(folder, 4, f"{folder}/checkpoint-2", save_strategy="no"), whole)


@works("Savers", "Checkpoints of MiCSTrainer that are written while training goes on")
def test_training_goes_on_while_a_checkpoint_is_written(pool: WorkerPool, tmp_path: Path) -> None:
    for was_there, equals in pool.run(save_behind, str(tmp_path), world_size=2, timeout=120):
        assert was_there == [False, False, True, True]  # saved, a step later, saved the next, at the end
        assert equals
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]


def fail_behind(folder: str) -> str:
    with held_up("No space left" if dist.get_rank() == 0 else None) as go_on:
        go_on.set()
        try:
            trainer_in(folder, 1, behind=True).train()
        except CheckpointError as error:
            return str(error)
    return ""


def test_a_failure_while_training_goes_on_is_raised_on_all_ranks(pool: WorkerPool, tmp_path: Path) -> None:
    for said in pool.run(fail_behind, str(tmp_path), world_size=2):
        assert f"Saving {tmp_path}/checkpoint-1 failed" in said and "No space left" in said
    assert os.listdir(tmp_path) == []


def die_while_saving(folder: str, moment: int, behind: bool) -> None:
    trainer, passed, first = trainer_in(folder, 2, behind=behind), 0, Path(folder, "checkpoint-1")
    for owner, name in ((torch, "save"), (os, "fsync"), (os, "rename"), (dist, "all_gather_object")):
        original = getattr(owner, name)

        def watched(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            nonlocal passed
            passed += trainer.state.global_step == 2 and first.exists()
            if passed == moment:
                os._exit(1)
            return original(*args, **kwargs)

        setattr(owner, name, watched)
    trainer.train()
    os._exit(2)


def kill_at(pool: WorkerPool, folder: Path, moments: list[int], behind: bool) -> list[str]:
    """Kills a job in its second checkpoint; returns from which one can be resumed each time."""
    found = []
    for moment in moments:
        run = folder / str(moment)
        pool.attempt(die_while_saving, str(run), moment, behind, world_size=2)
        found.append(Path(str(find_checkpoint(str(run), True, None))).name)
        assert sorted(path.name for path in run.glob("checkpoint-*"))[-1] == found[-1], "half of it has the name"
    return found


BEHIND = pytest.mark.parametrize("behind", [False, True], ids=["waited for", "in the background"])


@BEHIND
def test_a_killed_save_leaves_the_checkpoint_before_it(pool: WorkerPool, tmp_path: Path, behind: bool) -> None:
    assert kill_at(pool, tmp_path, [3, 70 if behind else 100], behind) == ["checkpoint-1", "checkpoint-1"]


@pytest.mark.campaign
@BEHIND
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(
    pool: WorkerPool, tmp_path: Path, behind: bool, record_property: Callable[[str, object], None]
) -> None:
    found = kill_at(pool, tmp_path, list(range(1, 181, 4)), behind)
    record_property("figures", f"{len(found)} crashes: {found.count('checkpoint-1')} left the earlier checkpoint")


def test_other_names_are_an_error(pool: WorkerPool, run: Path) -> None:
    from safetensors.torch import load_file, save_file

    plain = run / "plain"  # of transformers alone
    shutil.copytree(run / "checkpoint-1", plain)
    (plain / "mics.json").unlink()
    for said in pool.run(resume_in_words, str(run), str(plain), world_size=2):
        assert "lacks its manifest" in said and "weights_only=False" in said
    shutil.rmtree(plain / "optimizer_mics")
    for said in pool.run(resume_in_words, str(run), str(plain), world_size=2):
        assert "it has no optimizer.pt" in said and "from_pretrained" in said
    torch.save({"state": {}, "param_groups": []}, plain / "optimizer.pt")
    weights = load_file(plain / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in weights.items()}, plain / "model.safetensors")
    for said in pool.run(resume_in_words, str(run), str(plain), world_size=2):
        assert "does not fit the model" in said and "Missing in the checkpoint" in said


def go_on_from_others(folder: str) -> tuple[float, float]:
    """Goes on from a checkpoint of transformers alone; returns how far that is from going on there."""
    settings = {**SAVING, "optim": "adamw_torch", "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    together = train_alone(f"{folder}/alone{dist.get_rank()}", False, ROWS * 2, max_steps=4, **settings)
    forget_accelerate()
    worst = []
    for model in (build("gpt2", 9), _on_meta()):
        trainer = trainer_in(f"{folder}/ours", 4, model, **{**settings, "save_strategy": "no"})
        trainer.train(resume_from_checkpoint=f"{folder}/alone0/checkpoint-2")
        worst.append(max(weight_differences(full_state_dict(trainer.model), together[2]).values()))
    return worst[0], worst[1]


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return build("gpt2", 9)


@works("Savers", "Resuming from a checkpoint of transformers' own Trainer")
def test_checkpoints_of_transformers_alone_are_gone_on_with(pool: WorkerPool, tmp_path: Path) -> None:
    for worst in pool.run(go_on_from_others, str(tmp_path), world_size=2, timeout=120):
        assert max(worst) <= 1e-4  # Adam enlarges rounding


def rotate(folder: str, **settings: Any) -> tuple[list[str], str | None]:
    trainer = trainer_in(folder, 4, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, **settings)
    trainer.train()
    return sorted(os.listdir(folder)), trainer.state.best_model_checkpoint


@BEHIND
def test_rotation_the_best_and_weights_alone(pool: WorkerPool, tmp_path: Path, caplog: Any, behind: bool) -> None:
    settings = {"behind": behind, "save_total_limit": 2, "save_only_model": True, "greater_is_better": True}
    for kept, best in pool.run(rotate, str(tmp_path), metric_for_best_model="loss", world_size=2, **settings):
        assert kept == ["checkpoint-1", "checkpoint-4"]  # the worst is the best, and the last
        assert best == str(tmp_path / "checkpoint-1")
        state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == best
    pool.run(train, str(tmp_path), 5, True, world_size=2)
    find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-4"), None)
    assert "checkpoint-4 was saved without the optimizer" in caplog.text


def test_the_command_knows_them(run: Path) -> None:
    (listed,) = [one for one in list_checkpoints(run) if one.path.endswith("checkpoint-2")]
    assert (listed.kind, listed.step, listed.world_size, listed.shard_size) == ("folder", 2, 2, 2)
    assert not any(verify_checkpoint(run / "checkpoint-2").values())
    with pytest.raises(CheckpointError, match="MiCSTrainer"):
        describe_checkpoint(run / "checkpoint-2")
