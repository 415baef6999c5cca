"""A script as the public examples of Accelerate write them, with pretrained weights; it does not know MiCS."""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForSequenceClassification


def main():
    accelerator = Accelerator()
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3)
    accelerator.print("kind", type(model.bert.embeddings.word_embeddings.weight).__name__)
    model = model.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(3):
        tokens = torch.arange(12).view(2, 6) * (step + accelerator.process_index + 1) % 61
        loss = model(input_ids=tokens, labels=tokens[:, 0] % 3).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print("loss", accelerator.gather(loss.detach()).tolist())


if __name__ == "__main__":
    main()
