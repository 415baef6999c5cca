"""The fine-tuning of bert_classification.py with the Trainer of transformers.

Only one import differs from a script for a single process. From the project's folder:

    accelerate launch --config_file examples/accelerate/mics.yaml examples/accelerate/trainer_bert.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import MAX_TOKENS, PACKAGES, Snippets, bundled_model, labelled_snippets
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from lightning_mics.transformers import MiCSTrainer

logging.disable_progress_bar()  # of reading and writing files; on again for the training
logging.set_verbosity_error()  # from_pretrained remarks that the classifier on top is new, as it should be


def tokenized(snippets: Snippets, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Returns one row a piece; the Trainer pads rows to the longest of a batch."""
    rows = [tokenizer(text, truncation=True, max_length=MAX_TOKENS) for text, _ in snippets]
    return [{**row, "labels": label} for row, (_, label) in zip(rows, snippets, strict=True)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    guesses = prediction.predictions.argmax(axis=-1)
    return {"accuracy": float((guesses == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a hub name; the bundled MiniLM by default")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="pieces in a microbatch of one rank")
    parser.add_argument("--accumulate", type=int, default=4, help="microbatches in an optimizer step")
    parser.add_argument("--folder", default="runs/trainer_bert", help="where to save")
    options = parser.parse_args()

    set_seed(0)
    name = options.model or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(PACKAGES))
    # This loss is a mean over the microbatch. The Trainer concludes otherwise from the signature of BERT's forward, and
    # would scale it by the numbers of processes and of accumulated microbatches.
    model.accepts_loss_kwargs = False
    pieces, held_out = labelled_snippets()
    arguments = TrainingArguments(
        options.folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=10,
        gradient_accumulation_steps=options.accumulate,  # windows: the replicas meet once in each
        learning_rate=3e-4,
        warmup_steps=options.steps // 10,
        max_grad_norm=1.0,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
    )
    trainer = MiCSTrainer(
        model=model,
        args=arguments,
        train_dataset=tokenized(pieces, tokenizer),
        eval_dataset=tokenized(held_out, tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.accelerator.print(trainer.accelerator.layout or "one process, nothing to shard")
    logging.enable_progress_bar()
    trainer.train()
    metrics = trainer.evaluate()
    logging.disable_progress_bar()
    trainer.save_model(f"{options.folder}/model")  # every rank calls it; from_pretrained loads it
    trainer.accelerator.print(
        f"accuracy on held-out files {metrics['eval_accuracy']:.3f} (chance is {1 / len(PACKAGES):.2f})"
    )


if __name__ == "__main__":
    main()
