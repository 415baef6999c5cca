"""What each of the demo's processes runs; started by torchrun."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics import Hop, MiCSStrategy
from lightning_mics.demo.data import VOCABULARY, Windows
from lightning_mics.processes import end_with_launcher

LENGTH, BATCH, ACCUMULATE = 64, 8, 4
VALIDATION_BATCHES = 8


class DemoModel(pl.LightningModule):
    """A small GPT-2, as any user of Lightning would write it.

    Args:
        total_steps: Optimizer steps over which the learning rate falls.
    """

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self.total_steps = total_steps
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
        )
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs the mean loss over all ranks."""
        loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        self.log("validation_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Returns AdamW with a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=self.total_steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Report(pl.Callback):
    """Writes events, one JSON line each, for the process that draws the screen.

    Args:
        path: The file; only rank 0 writes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._losses: list[Tensor] = []
        self._step = 0

    def write(self, trainer: pl.Trainer, kind: str, **facts: Any) -> None:
        """Appends an event."""
        if trainer.is_global_zero:
            with self._path.open("a") as file:
                file.write(json.dumps({"kind": kind, **facts}) + "\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes where training starts."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports the mean loss of each accumulation window over all ranks."""
        self._losses.append(outputs["loss"].detach() * ACCUMULATE)  # Lightning has divided it for the sum
        if trainer.global_step != self._step:
            loss = trainer.strategy.reduce(torch.stack(self._losses).mean())
            self._step = trainer.global_step
            self._losses.clear()
            self.write(trainer, "step", step=self._step, loss=float(loss))


def main() -> None:
    """Trains from the start or from a checkpoint, and saves one."""
    options = _parse()
    end_with_launcher()
    pl.seed_everything(options.seed)
    tokens = torch.load(options.folder / "tokens.pt")
    held_out = LENGTH * BATCH * VALIDATION_BATCHES * 4
    train = DataLoader(Windows(tokens[:-held_out], LENGTH), BATCH, shuffle=True, drop_last=True)
    validation = DataLoader(Windows(tokens[-held_out:], LENGTH), BATCH)
    model = DemoModel(options.total_steps)
    strategy = MiCSStrategy(
        shard_size=options.shard_size, optimizer_shard_size=options.optimizer_shard_size, node_size=2
    )
    report = Report(options.folder / "events.jsonl")
    trainer = _trainer(strategy, report, options.until)

    def validate(when: str, checkpoint: Path | None = None) -> None:
        metrics = trainer.validate(model, validation, ckpt_path=checkpoint, verbose=False)
        report.write(trainer, "validation", when=when, loss=metrics[0]["validation_loss"])

    validate("start", options.resume)
    ledger = strategy.ledger
    ledger.reset()
    trainer.fit(model, train, ckpt_path=options.resume)
    report.write(
        trainer,
        "traffic",
        **{hop.name: [ledger.total(hop).intra_bytes, ledger.total(hop).inter_bytes] for hop in Hop},
        full_sharding=ledger.full_sharding_inter_bytes(),
        parameters=sum(param.numel() for param in model.parameters()),
        states=_largest_states(trainer),
    )
    if options.save is not None:
        trainer.save_checkpoint(options.save)
    validate("end")


def _largest_states(trainer: pl.Trainer) -> tuple[int, int]:
    """Returns the bytes of optimizer states on the rank with the most, and those of a whole replica."""
    states = [value for each in trainer.optimizers[0].state.values() for value in each.values() if value.ndim]
    held = torch.tensor(sum(value.to_local().nbytes for value in states))
    torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
    return int(held), sum(value.numel() * value.element_size() for value in states)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shard-size", type=int, required=True)
    parser.add_argument("--optimizer-shard-size", choices=["partition", "world"], default="partition")
    parser.add_argument("--until", type=int, required=True, help="the optimizer step to stop at")
    parser.add_argument("--total-steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def _trainer(strategy: MiCSStrategy, report: Report, steps: int) -> pl.Trainer:
    return pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=4,
        plugins=[TorchElasticEnvironment()],
        max_steps=steps,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=1.0,
        callbacks=[report],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


if __name__ == "__main__":
    main()
