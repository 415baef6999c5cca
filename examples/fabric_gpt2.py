"""Trains a GPT-2 in a Fabric loop, saves it and loads it again.

python examples/fabric_gpt2.py --accelerator cpu --devices 4 --node-size 2
"""

from __future__ import annotations

import argparse
import os

import torch
from data import LENGTH, VOCABULARY, byte_loader
from lightning.fabric import Fabric
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics.fabric import MiCSStrategy

ACCUMULATE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=os.environ.get("LOCAL_WORLD_SIZE", 4))  # as torchrun says
    parser.add_argument("--num-nodes", type=int, default=os.environ.get("GROUP_WORLD_SIZE", 1))
    parser.add_argument("--shard-size", type=int, default=2, help="ranks that share one replica of the model")
    parser.add_argument("--node-size", type=int, help="ranks on a node, if not --devices")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", default="runs/fabric.ckpt")
    options = parser.parse_args()

    strategy = MiCSStrategy(shard_size=options.shard_size, node_size=options.node_size)
    fabric = Fabric(
        accelerator=options.accelerator,
        strategy=strategy,
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=options.precision,
    )
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it is anyway; unset, transformers remarks on it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(byte_loader())

    for index, batch in enumerate(loader):
        is_last = (index + 1) % ACCUMULATE == 0
        # All but the last microstep leave out the all-reduce between replicas.
        with fabric.no_backward_sync(model, enabled=not is_last):
            loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
            fabric.backward(loss / ACCUMULATE)
        if is_last:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            step = (index + 1) // ACCUMULATE
            if step == 1 or step % 10 == 0:
                fabric.print(f"step {step}: loss {fabric.all_reduce(loss.detach()):.3f}")
            if step == options.steps:
                break

    state = {"model": model, "optimizer": optimizer, "step": options.steps}
    fabric.save(options.checkpoint, state)
    fabric.load(options.checkpoint, state)
    fabric.print(fabric.strategy.ledger(model))
    fabric.print(f"saved and loaded {options.checkpoint}")


if __name__ == "__main__":
    main()
