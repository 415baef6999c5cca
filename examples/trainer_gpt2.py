"""Pre-trains a GPT-2 with Lightning's Trainer.

On this machine's CPU, four processes standing for two nodes of two ranks:

    python examples/trainer_gpt2.py --accelerator cpu --devices 4 --node-size 2

On two nodes of eight GPUs, see examples/launch/. Later, go on with another shard size:

    python examples/trainer_gpt2.py --accelerator cpu --devices 4 --shard-size 4 --steps 60 \
        --ckpt-path runs/gpt2/last.ckpt
"""

from __future__ import annotations

import argparse
import os

import lightning.pytorch as pl
import torch
from data import LENGTH, VOCABULARY, byte_loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics import MiCSMonitor, MiCSStrategy


class GPT2(pl.LightningModule):
    """A plain LightningModule: nothing in it knows about sharding."""

    def __init__(self, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model = GPT2LMHeadModel(config)
        self.model.loss_type = "ForCausalLM"  # what it is anyway; unset, transformers remarks on it

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=os.environ.get("LOCAL_WORLD_SIZE", 4))  # as torchrun says
    parser.add_argument("--num-nodes", type=int, default=os.environ.get("GROUP_WORLD_SIZE", 1))
    parser.add_argument("--shard-size", type=int, default=2, help="ranks that share one replica of the model")
    parser.add_argument("--node-size", type=int, help="ranks on a node, if not --devices")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", default="runs/gpt2")
    parser.add_argument("--ckpt-path", help="a checkpoint to go on from, of any shard size")
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        strategy=MiCSStrategy(shard_size=options.shard_size, node_size=options.node_size),
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=options.precision,
        accumulate_grad_batches=4,
        gradient_clip_val=1.0,
        max_steps=options.steps,
        log_every_n_steps=10,
        logger=False,
        callbacks=[MiCSMonitor(), ModelCheckpoint(options.folder, save_last=True, save_top_k=0)],
    )
    trainer.fit(GPT2(), byte_loader(), ckpt_path=options.ckpt_path)
    if trainer.is_global_zero:
        print(trainer.strategy.layout)
        print(trainer.strategy.ledger)
        print(f"final loss {trainer.callback_metrics['loss']:.3f}; checkpoint in {options.folder}/last.ckpt")


if __name__ == "__main__":
    main()
