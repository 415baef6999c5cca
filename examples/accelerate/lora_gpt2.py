"""Adapts a small GPT-2 with LoRA: base weights stay frozen, only the adapters' gradients travel.

By default the base is a new model, which learns little by adapters; --model names a better one, such as the folder
that gpt2_pretraining.py writes. From the project's folder:

    accelerate launch --config_file examples/accelerate/mics.yaml examples/accelerate/lora_gpt2.py
"""

from __future__ import annotations

import argparse
import warnings
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import set_seed, tqdm
from common import LENGTH, VOCABULARY, byte_loader
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics import Hop
from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin

# peft 0.21 asks a model for something that transformers 5 renames; nothing that a user of either could change.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def base_model(folder: str | None) -> GPT2LMHeadModel:
    if folder is None:
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
    else:
        model = GPT2LMHeadModel.from_pretrained(folder)
    model.loss_type = "ForCausalLM"  # what it is anyway; unset, transformers remarks on it
    return model


def num_bytes(model: nn.Module, trainable: bool) -> int:
    return sum(param.nbytes for param in model.parameters() if param.requires_grad or not trainable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a GPT-2 over bytes to start from; a new one by default")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/lora_gpt2"), help="where to save the adapters")
    options = parser.parse_args()

    accelerator = MiCSAccelerator(mics_plugin=MiCSPlugin(), gradient_accumulation_steps=options.accumulate)
    accelerator.print(accelerator.layout or "one process, nothing to shard")
    set_seed(0)
    adapters = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(base_model(options.model), adapters)
    whole, trained = num_bytes(model, trainable=False), num_bytes(model, trainable=True)
    accelerator.print(f"{trained / whole:.1%} of the parameters are trained")
    optimizer = torch.optim.AdamW((param for param in model.parameters() if param.requires_grad), lr=5e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, byte_loader(options.batch_size))

    losses = []
    num_microsteps = options.steps * options.accumulate
    for batch in tqdm(islice(loader, num_microsteps), total=num_microsteps, unit="microstep"):
        with accelerator.accumulate(model):
            loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    first, last = sum(losses[: options.accumulate]), sum(losses[-options.accumulate :])
    accelerator.print(f"loss {first / options.accumulate:.3f} at first, loss {last / options.accumulate:.3f} at last")
    if accelerator.layout is not None:
        reduced = accelerator.ledger(model).total(Hop.PARTITION_REDUCE).message_bytes // num_microsteps
        accelerator.print(f"reduced in a microstep: {reduced} B; adapters {trained} B, whole model {whole} B")
        accelerator.print(accelerator.ledger(model))
    accelerator.unwrap_model(model).save_pretrained(options.folder, save_embedding_layers=False)  # on every rank
    accelerator.print(f"saved the adapters to {options.folder}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
