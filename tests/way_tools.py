"""One model, trained through every way in, and in one process that sees the global batch.

Models return ``{"loss": ...}`` of ``rows``, a mean over the rows. So it does not matter which rank sees which of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from accelerate_tools import forget_accelerate, make_accelerator
from lightning.fabric import Fabric
from lightning_tools import make_trainer, where
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_mics import MiCSConfig, MiCSStrategy, clip_grad_norm_, defer_replication_sync, mics_shard
from lightning_mics.core.runtime import is_sharded
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import full_state_dict

ROWS, WIDTH, STEPS, CLIP = 2, 6, 3, 0.5
Optimize = Callable[[Any], torch.optim.Optimizer]


class Rows(Dataset[dict[str, Tensor]]):
    """The rows of a whole run, in the order of the microsteps."""

    def __init__(self, num_microsteps: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = torch.randn(num_microsteps * dist.get_world_size() * ROWS, WIDTH, generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"rows": self.rows[index]}

    def of_rank(self, microstep: int, rank: int | None = None) -> Tensor:
        size = ROWS * dist.get_world_size()
        rows = self.rows[microstep * size : (microstep + 1) * size]
        return rows if rank is None else rows[rank * ROWS : (rank + 1) * ROWS]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, eps=1e-3)


def alone(model: nn.Module, optimize: Optimize, accumulate: int) -> dict[str, Tensor]:
    optimizer, data = optimize(model.parameters()), Rows(STEPS * accumulate)
    for step in range(STEPS):
        for index in range(accumulate):
            (model(rows=data.of_rank(step * accumulate + index))["loss"] / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy(model.state_dict())


def bare(model: nn.Module, optimize: Optimize, accumulate: int, settings: dict[str, Any]) -> nn.Module:
    if not is_sharded(model):
        mics_shard(model, MiCSConfig(**settings))
    optimizer, data = optimize(model.parameters()), Rows(STEPS * accumulate)
    for step in range(STEPS):
        for index in range(accumulate):
            with defer_replication_sync(model, enabled=index + 1 < accumulate):
                loss = model(rows=data.of_rank(step * accumulate + index, dist.get_rank()))["loss"]
                (loss / accumulate).backward()
        clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model


def fabric(model: nn.Module, optimize: Optimize, accumulate: int, settings: dict[str, Any]) -> nn.Module:
    runner = Fabric(**{**where(), "strategy": FabricStrategy(**settings)})
    runner.launch()
    wrapped, optimizer = runner.setup(model, optimize(model.parameters()))
    data = Rows(STEPS * accumulate)
    for step in range(STEPS):
        for index in range(accumulate):
            with runner.no_backward_sync(wrapped, enabled=index + 1 < accumulate):
                loss = wrapped(rows=data.of_rank(step * accumulate + index, dist.get_rank()))["loss"]
                runner.backward(loss / accumulate)
        runner.clip_gradients(wrapped, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model


def accelerate(model: nn.Module, optimize: Optimize, accumulate: int, settings: dict[str, Any]) -> nn.Module:
    accelerator = make_accelerator(accumulate, settings)
    loader = DataLoader(Rows(STEPS * accumulate), batch_size=ROWS)
    model, optimizer, loader = accelerator.prepare(model, optimize(model.parameters()), loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return model


class Lit(pl.LightningModule):
    """A LightningModule around a model."""

    def __init__(self, model: nn.Module, optimize: Optimize) -> None:
        super().__init__()
        self.model, self._optimize = model, optimize

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch)["loss"]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimize(self.parameters())


def trainer(model: nn.Module, optimize: Optimize, accumulate: int, settings: dict[str, Any]) -> nn.Module:
    data = Rows(STEPS * accumulate)
    loader = DataLoader(data, batch_size=ROWS, sampler=DistributedSampler(data, shuffle=False))
    fitted = make_trainer(strategy=MiCSStrategy(**settings), accumulate_grad_batches=accumulate, gradient_clip_val=CLIP)
    fitted.fit(Lit(model, optimize), loader)
    return model


def mics_trainer(model: nn.Module, optimize: Optimize, accumulate: int, settings: dict[str, Any]) -> nn.Module:
    import tempfile

    from transformers import TrainingArguments
    from transformers.utils import logging

    from lightning_mics.accelerate import MiCSPlugin
    from lightning_mics.transformers import MiCSTrainer

    class InOrder(MiCSTrainer):
        def _get_train_sampler(self, data: Any = None) -> Any:
            return SequentialSampler(data)

    logging.set_verbosity_error()
    forget_accelerate()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=accumulate,
            max_steps=STEPS,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
        )
        made = InOrder(
            model=model,
            args=arguments,
            train_dataset=Rows(STEPS * accumulate),
            mics_plugin=MiCSPlugin(**settings),
            optimizers=(optimize(model.parameters()), None),
        )
        made.train()
    return model


WAYS = {function.__name__: function for function in (bare, fabric, accelerate, trainer, mics_trainer)}


def differences(
    make: Callable[[], nn.Module],
    way: str,
    settings: dict[str, Any],
    *,
    optimize: Optimize = sgd,
    accumulate: int = 1,
    before: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> float:
    """Returns how far weights are from those of one process, as a share of each tensor's largest magnitude.

    Magnitudes count as a hundredth at least: biases of keys, whose gradients are nothing but rounding, stay near zero.

    Args:
        make: Makes the model.
        way: How it is trained.
        settings: Those of ``MiCSConfig``.
        optimize: Makes the optimizer.
        accumulate: Microsteps in a window.
        before: What is done to the model before it is set up.
    """
    torch.manual_seed(0)
    expected = alone(make(), optimize, accumulate)
    torch.manual_seed(dist.get_rank())
    trained = WAYS[way](before(make()), optimize, accumulate, settings)
    found = full_state_dict(trained)
    return max(
        ((found[name] - value).abs().max() / value.abs().max().clamp(min=0.01)).item()
        for name, value in expected.items()
        if value.numel()
    )
