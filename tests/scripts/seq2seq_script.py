"""Trains a T5 with the Seq2SeqTrainer, generating at evaluation; it knows nothing of MiCS."""

import argparse

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration, set_seed


class InOrder(Seq2SeqTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


parser = argparse.ArgumentParser()
parser.add_argument("--rows", type=int, default=2)
rows = parser.parse_args().rows
set_seed(3)
sizes = {"vocab_size": 37, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))
tokens = torch.randint(2, 37, (64, 6))
start = torch.zeros(1, dtype=torch.long)
data = [
    {"input_ids": row, "labels": row.flip(0), "decoder_input_ids": torch.cat([start, row.flip(0)[:-1]])}
    for row in tokens
]
arguments = Seq2SeqTrainingArguments(
    "out",
    per_device_train_batch_size=rows,
    per_device_eval_batch_size=rows,
    gradient_accumulation_steps=3,
    max_steps=2,
    save_steps=1,
    eval_steps=1,
    eval_strategy="steps",
    load_best_model_at_end=True,
    optim="sgd",
    learning_rate=0.1,
    predict_with_generate=True,
    generation_max_length=4,
    label_smoothing_factor=0.1,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
trainer = InOrder(model=model, args=arguments, train_dataset=data, eval_dataset=data[:16])
trainer.train()
outcome = trainer.predict(data[:16])
if trainer.args.process_index == 0:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("LOSSES", *losses, outcome.metrics["test_loss"], outcome.predictions.sum())
