r"""Pre-trains a small GPT-2 in an Accelerate loop that knows nothing of MiCS.

The text is the source of Python's standard library, with bytes as tokens. From the project's folder:

    accelerate launch --config_file examples/accelerate/mics.yaml \
        -m lightning_mics.run examples/accelerate/gpt2_pretraining.py
"""

import argparse
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import LENGTH, VOCABULARY, TokenWindows, stdlib_text
from torch.utils.data import DataLoader, random_split
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup
from transformers.utils import logging

logging.disable_progress_bar()  # of save_pretrained


def make_loaders(batch_size):
    windows = TokenWindows(stdlib_text(200_000))
    train, held_out = random_split(windows, [0.9, 0.1], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(held_out, batch_size)


def make_model():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it is anyway; unset, transformers remarks on it
    return model


def evaluate(accelerator, model, loader):
    model.eval()
    losses = []
    for batch in loader:
        with torch.no_grad():
            loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch["input_ids"]))))
    return torch.cat(losses).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--folder", default="runs/gpt2_pretraining")
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader, test_loader = make_loaders(args.batch_size)
    model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)
    steps = args.epochs * math.ceil(len(loader) / args.accumulate)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, steps * accelerator.num_processes)
    scheduler = accelerator.prepare(scheduler)

    progress = tqdm(range(steps), disable=not accelerator.is_local_main_process)
    for epoch in range(args.epochs):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    progress.update(1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        loss = evaluate(accelerator, model, test_loader)
        if accelerator.is_local_main_process:
            progress.write(f"epoch {epoch + 1}: held-out loss {loss:.3f}")
    progress.close()

    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(args.folder, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
    accelerator.end_training()


if __name__ == "__main__":
    main()
