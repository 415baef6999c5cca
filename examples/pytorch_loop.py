"""Trains a model of PyTorch's own layers in a bare loop; no framework.

torchrun --standalone --nproc-per-node 4 examples/pytorch_loop.py --node-size 2
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from data import LENGTH, VOCABULARY, TokenWindows, stdlib_text
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_mics import (
    MiCSConfig,
    clip_grad_norm_,
    communication_ledger,
    defer_replication_sync,
    load_checkpoint,
    mics_shard,
    save_checkpoint,
)

ACCUMULATE = 4


class LanguageModel(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self, width: int = 128, layers: int = 4, length: int = LENGTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)
        hidden = self.embedding(tokens) + self.positions[:length]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask)
        logits = self.head(self.norm(hidden))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard-size", type=int, default=2)
    parser.add_argument("--node-size", type=int, help="ranks on a node, if the launcher's variables do not tell")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", default="runs/loop")
    options = parser.parse_args()

    dist.init_process_group()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    torch.manual_seed(0)

    model = mics_shard(LanguageModel(), MiCSConfig(shard_size=options.shard_size, node_size=options.node_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    windows = TokenWindows(stdlib_text(500_000))
    loader = iter(DataLoader(windows, batch_size=8, sampler=DistributedSampler(windows), drop_last=True))

    for step in range(1, options.steps + 1):
        for microstep in range(ACCUMULATE):
            tokens = next(loader)["input_ids"].to(device)
            # All but the last microstep leave out the all-reduce between replicas.
            with defer_replication_sync(model, enabled=microstep + 1 < ACCUMULATE):
                loss = model(tokens) / ACCUMULATE
                loss.backward()
        norm = clip_grad_norm_(model, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and (step == 1 or step % 10 == 0):
            print(f"step {step}: loss {loss.item() * ACCUMULATE:.3f}, gradient norm {norm.item():.2f}")

    save_checkpoint(options.checkpoint, model, optimizer, {"step": options.steps})
    meta = load_checkpoint(options.checkpoint, model, optimizer)
    if dist.get_rank() == 0:
        print(communication_ledger(model))
        print(f"saved and loaded {options.checkpoint}, step {meta['step']}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
