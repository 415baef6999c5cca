"""The transformers Trainer under MiCS against one process that sees the global batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate_tools import forget_accelerate, lora
from models import VOCABULARY, build, microbatch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging
from works import works

from lightning_mics import CheckpointError, Hop
from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.testing import WorkerPool, full_state_dict, relative_difference, weight_differences
from lightning_mics.transformers import MiCSTrainer

ROWS, STEPS, WORLD = 2, 4, 4
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, num_rows: int) -> None:
        self.rows = microbatch("gpt2", 0, num_rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": (self.rows[index] * 5 + 2) % VOCABULARY}


class Norms(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


def in_order(trainer_class: Any) -> Any:
    return type("InOrder", (trainer_class,), {"_get_train_sampler": lambda self, data=None: SequentialSampler(data)})


def make_trainer(trainer_class: Any, folder: str, model: nn.Module, rows: int, **settings: Any) -> Any:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plugin = {"mics_plugin": settings.pop("plugin")} if "plugin" in settings else {}
    defaults = {
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.5,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(folder, **{**defaults, **settings})
    # An epoch is six microsteps: its last window is incomplete.
    data = Rows(6 * WORLD * ROWS)
    callbacks = [Norms()]
    return in_order(trainer_class)(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks, **plugin
    )


def outcome(trainer: Any) -> tuple[list[float], list[float], dict[str, Tensor]]:
    norms = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Norms))
    return norms.losses, norms.norms, full_state_dict(trainer.model)


def make_model(with_lora: bool, seed: int = 0) -> nn.Module:
    model = build("gpt2", seed)
    return lora(model) if with_lora else model


def train_alone(
    folder: str, with_lora: bool, rows: int = ROWS * WORLD, **settings: Any
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    forget_accelerate()
    kept = {name: os.environ.pop(name) for name in LAUNCHED}
    try:
        trainer = make_trainer(Trainer, folder, make_model(with_lora), rows, **settings)
        trainer.train()
        return outcome(trainer)
    finally:
        os.environ.update(kept)
        forget_accelerate()


def compare(folder: str, shard: int, with_lora: bool) -> tuple[float, float, float, set[tuple[int, int]]]:
    forget_accelerate()
    plugin = MiCSPlugin(shard_size=shard, node_size=2)
    model = make_model(with_lora, dist.get_rank())
    trainer = make_trainer(MiCSTrainer, folder, model, ROWS, plugin=plugin)
    trainer.train()
    losses, norms, weights = outcome(trainer)
    ledger = trainer.accelerator.ledger(trainer.model)
    calls = {
        (ledger.total(Hop.PARTITION_REDUCE, unit).calls, ledger.total(Hop.REPLICATION_REDUCE, unit).calls)
        for unit in ledger.units()
    }
    their_losses, their_norms, their_weights = train_alone(folder, with_lora)
    return (
        max(map(relative_difference, losses, their_losses)),
        max(map(relative_difference, norms, their_norms)),
        max(weight_differences(weights, their_weights).values()),
        calls - {(0, 0)},
    )


@pytest.mark.parametrize(("shard", "with_lora"), [(2, False), (4, False), (2, True)])
def test_training_equals_one_process(pool: WorkerPool, tmp_path: Path, shard: int, with_lora: bool) -> None:
    for loss, norm, weight, calls in pool.run(compare, str(tmp_path), shard, with_lora, world_size=WORLD, timeout=120):
        assert loss <= 1e-5 and norm <= 1e-5 and weight <= 1e-5
        # Windows of 4 and 2 microsteps, twice; between replicas one all-reduce each.
        assert calls == {(12, STEPS if shard < WORLD else 0)}


def train_and_save(folder: str, shard: int, with_lora: bool, resume: str | None) -> tuple[dict[str, Tensor], float]:
    forget_accelerate()
    trainer = make_trainer(
        MiCSTrainer,
        folder,
        make_model(with_lora, seed=1),
        ROWS * WORLD // dist.get_world_size(),
        plugin=MiCSPlugin(shard_size=shard, node_size=2),
        optim="adamw_torch",
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{folder}/final")
    return full_state_dict(trainer.model), trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_checkpoint_is_resumed_on_another_shard_size(pool: WorkerPool, tmp_path: Path, with_lora: bool) -> None:
    whole = pool.run(train_and_save, str(tmp_path / "a"), 2, with_lora, None, world_size=4, timeout=120)[0]
    resume = str(tmp_path / "a" / "checkpoint-2")
    for world, shard in ((4, 4), (2, 2)):
        folder = str(tmp_path / f"{world}-{shard}")
        weights, loss = pool.run(train_and_save, folder, shard, with_lora, resume, world_size=world, timeout=120)[0]
        assert max(weight_differences(weights, whole[0]).values()) <= 1e-4  # Adam enlarges rounding
        assert relative_difference(loss, whole[1]) <= 1e-4


@works("Savers", "MiCSTrainer.save_model, read by from_pretrained")
def test_a_saved_model_opens_with_from_pretrained(pool: WorkerPool, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    weights = pool.run(train_and_save, str(tmp_path), 2, False, None, world_size=4, timeout=120)[0][0]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "final")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def compare_smoothed(folder: str, shards: tuple[int, ...]) -> float:
    """Compares training with smoothed labels, which a causal model shifts by one, with one process."""
    world, worst = dist.get_world_size(), 0.0
    for accumulate in (1, 3):
        settings = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": accumulate, "max_steps": 2}
        outcomes = []
        for shard in shards:
            forget_accelerate()
            plugin = MiCSPlugin(shard_size=shard)
            trainer = make_trainer(MiCSTrainer, folder, build("gpt2", 0), ROWS, plugin=plugin, **settings)
            trainer.train()
            outcomes.append(outcome(trainer))
        losses, norms, weights = train_alone(folder, False, ROWS * world, **settings)
        for ours in outcomes:
            worst = max(worst, *map(relative_difference, ours[0], losses), *map(relative_difference, ours[1], norms))
            worst = max(worst, *weight_differences(ours[2], weights).values())
    return worst


@works("Scripts", "Label smoothing of the Trainer")
@pytest.mark.parametrize(("world", "shards"), [(2, (1, 2)), (4, (1, 2, 4))])
def test_smoothed_labels_are_shifted(pool: WorkerPool, tmp_path: Path, world: int, shards: tuple[int, ...]) -> None:
    assert max(pool.run(compare_smoothed, str(tmp_path), shards, world_size=world, timeout=120)) <= 1e-5


def load_best_adapter(folder: str, shard: int) -> bool:
    """Returns whether the weights of the best checkpoint, not of the last, are there in the end."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = build("gpt2", 0)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = get_peft_model(adapted, config, adapter_name="mine")
    adapted.add_adapter("other", config)
    forget_accelerate()
    settings = {"max_steps": 2, "learning_rate": 50.0, "max_grad_norm": 0.0}  # the first step ruins it
    strategy = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        MiCSTrainer,
        folder,
        adapted,
        ROWS,
        plugin=MiCSPlugin(shard_size=shard),
        load_best_model_at_end=True,
        greater_is_better=True,  # so that the worst is the best
        metric_for_best_model="loss",
        **settings,
        **strategy,
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(losses, key=lambda step: losses[step])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    return relative_difference(trainer.evaluate()["eval_loss"], losses[best]) <= 1e-5


@works("Savers", "`load_best_model_at_end` with a named adapter")
def test_the_best_of_a_named_adapter_is_loaded(pool: WorkerPool, tmp_path: Path) -> None:
    assert all(pool.run(load_best_adapter, str(tmp_path), 2, world_size=2, timeout=120))


def evaluate_then_train(folder: str) -> tuple[float, float]:
    forget_accelerate()
    trainer = make_trainer(MiCSTrainer, folder, build("gpt2", 5), ROWS, plugin=MiCSPlugin(shard_size=2))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.predict(Rows(8))
    return before, trainer.evaluate()["eval_loss"]


def test_evaluation_may_come_first(pool: WorkerPool, tmp_path: Path) -> None:
    for before, after in pool.run(evaluate_then_train, str(tmp_path), world_size=4):
        assert after < before


def write_to_a_url(folder: str) -> list[str]:
    says = "memory://out is a URL, and the Trainer of transformers writes to file"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=says):
        patch.chdir(folder)
        make_trainer(MiCSTrainer, "memory://out", build("gpt2", 1), 2)
    return os.listdir(folder)


def test_urls_are_refused_before_anything_is_written(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(write_to_a_url, str(tmp_path), world_size=1) == [[]]
