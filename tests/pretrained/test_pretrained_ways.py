"""Pretrained weights through every way in: trained as weights that were loaded whole are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate_tools import forget_accelerate, make_accelerator
from lightning.fabric import Fabric
from lightning_tools import where
from peft import LoraConfig, get_peft_model
from pretrained_tools import Reads, class_of_kind, inputs, saved
from safetensors.torch import load_file
from script_tools import LAUNCH, run_python
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from works import works

from lightning_mics import MiCSConfig, MiCSStrategy, mics_shard
from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.accelerate.launch_file import LaunchSettings, write_launch_file
from lightning_mics.core._torch import is_unread
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.pretrained.huggingface import reading_on_demand
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict
from lightning_mics.transformers import MiCSTrainer

WORLD, STEPS = 4, 3
Make = Callable[[], Any]


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in inputs("gpt2")["input_ids"].repeat(16, 1)]


def loss_of(model: Any) -> Tensor:
    tokens = inputs("gpt2")["input_ids"]
    return model(input_ids=tokens, labels=tokens).loss


class Module(pl.LightningModule):
    def __init__(self, make: Make, early: bool) -> None:
        super().__init__()
        self.make, self.model = make, make() if early else None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.model)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def by_trainer(make: Make, folder: str, early: bool = False) -> nn.Module:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(strategy=MiCSStrategy(shard_size=2), max_steps=STEPS, **quiet, **where())
    with trainer.init_module():
        module = Module(make, early)
    trainer.fit(module, DataLoader(rows(), batch_size=2))  # type: ignore[arg-type]
    return module.model


def by_init_module(make: Make, folder: str) -> nn.Module:
    return by_trainer(make, folder, early=True)


def take_steps(model: nn.Module, optimizer: Any, backward: Callable[[Tensor], object]) -> None:
    for _ in range(STEPS):
        backward(loss_of(model))
        optimizer.step()
        optimizer.zero_grad()


def by_fabric(make: Make, folder: str) -> nn.Module:
    fabric = Fabric(strategy=FabricStrategy(shard_size=2), **where())
    fabric.launch()
    with fabric.init_module():
        model = make()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    take_steps(wrapped, optimizer, fabric.backward)
    return model


def by_accelerate(make: Make, folder: str, adapt: Callable[[Any], Any] = lambda model: model) -> nn.Module:
    accelerator = make_accelerator(settings={"shard_size": 2})
    model = adapt(make()).to(accelerator.device)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    take_steps(model, optimizer, accelerator.backward)
    return model


def by_lora(make: Make, folder: str) -> nn.Module:
    def adapt(model: Any) -> Any:
        torch.manual_seed(8)
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        return get_peft_model(model, config)

    return by_accelerate(make, folder, adapt)


def by_transformers(make: Make, folder: str) -> nn.Module:
    forget_accelerate()
    arguments = TrainingArguments(
        folder, max_steps=STEPS, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, optim="sgd"
    )
    plugin = MiCSPlugin(shard_size=2)
    trainer = MiCSTrainer(model=make(), args=arguments, train_dataset=rows(), mics_plugin=plugin)  # type: ignore[arg-type]
    trainer.train()
    return trainer.model


def by_hand(make: Make, folder: str) -> nn.Module:
    with reading_on_demand():
        model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mics_shard(model, MiCSConfig(shard_size=2, optimizer_shard_size="world"), device_type="cpu", optimizer=optimizer)
    take_steps(model, optimizer, Tensor.backward)
    return model


WAYS = {
    "Trainer, configure_model": by_trainer,
    "Trainer, init_module": by_init_module,
    "Fabric, init_module": by_fabric,
    "Accelerate": by_accelerate,
    "Accelerate with LoRA": by_lora,
    "MiCSTrainer": by_transformers,
    "a bare loop": by_hand,
}


def train(way: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Trains what is read in part, and what was loaded whole."""
    cls = class_of_kind("gpt2")
    whole = [0]

    def read_in_part() -> Any:
        model = cls.from_pretrained(folder)
        assert all(map(is_unread, model.parameters()))
        whole[0] = sum(param.nbytes for param in model.parameters())
        return model

    def loaded_whole() -> Any:
        model = cls(cls.config_class.from_pretrained(folder))
        model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
        return model.eval()

    with Reads() as reads:
        found = full_state_dict(WAYS[way](read_in_part, folder))
    return found, full_state_dict(WAYS[way](loaded_whole, folder)), reads.bytes / whole[0]


@works("Model kinds", "Pretrained weights, of which each rank reads its own rows")
@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_in_part_trains_as_what_was_loaded_whole(pool: WorkerPool, tmp_path: Path, way: str) -> None:
    folder = saved(tmp_path, "gpt2")
    for found, expected, share in pool.run(train, way, str(folder), world_size=WORLD, timeout=120):
        assert_parity(found, expected, 1e-6)
        assert share < 0.8, "more than a rank's rows was read"


@pytest.mark.slow
def test_a_script_that_does_not_know_it(tmp_path: Path) -> None:
    folder, screens = saved(tmp_path, "bert"), []
    script = Path(__file__).parents[1] / "scripts" / "pretrained_script.py"
    for efficient in ("true", "false"):
        file = write_launch_file(
            tmp_path / f"{efficient}.yaml", LaunchSettings(shard_size=2, num_processes=4, cpu=True)
        )
        file.write_text(file.read_text().replace("efficient_loading: true", f"efficient_loading: {efficient}"))
        done = run_python(tmp_path, *LAUNCH, file, "-m", "lightning_mics.run", script, folder, timeout=120)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        screens.append(done.stdout)
    kinds = [next(line for line in screen.splitlines() if line.startswith("kind")) for screen in screens]
    assert kinds == ["kind Unread", "kind Parameter"]
    losses = [next(line for line in screen.splitlines() if line.startswith("loss")) for screen in screens]
    assert losses[0] == losses[1]
