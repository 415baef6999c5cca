"""Trains sentence embeddings with the trainer of sentence-transformers; it knows nothing of MiCS."""

import json
import sys

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import CosineSimilarityLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import set_seed

set_seed(2)
words = [f"w{index}" for index in range(60)]


def sentence():
    return " ".join(words[index] for index in torch.randint(0, 60, (8,)))


data = Dataset.from_list(
    [{"sentence1": sentence(), "sentence2": sentence(), "score": float(index % 5) / 5} for index in range(64)]
)
encoder = Transformer(sys.argv[1])
width = encoder.auto_model.config.hidden_size
model = SentenceTransformer(modules=[encoder, Pooling(width)], device="cpu")
arguments = SentenceTransformerTrainingArguments(
    "out",
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=3,
    max_steps=2,
    save_steps=1,
    eval_steps=1,
    eval_strategy="steps",
    load_best_model_at_end=True,
    learning_rate=0.01,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments,
    train_dataset=data,
    eval_dataset=data.select(range(16)),
    loss=CosineSimilarityLoss(model),
)
trainer.train()
model.save_pretrained("final")
trainer.accelerator.wait_for_everyone()
if trainer.args.process_index == 0:
    read = SentenceTransformer("final", device="cpu")
    with open("after.json", "w") as file:
        json.dump(read.encode(["w1 w2 w3", "w4 w5"]).flatten().tolist(), file)
