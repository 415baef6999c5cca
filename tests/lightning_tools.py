"""What tests of the Lightning adapters share: a cluster environment for pool workers, a module and its data."""

from __future__ import annotations

import os

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_mics.testing import worker_device

VOCABULARY, WIDTH, SEQUENCE, BATCH = 19, 8, 5, 2


class PoolEnvironment(ClusterEnvironment):
    """Tells Lightning that the worker pool has started all processes."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self) -> int:
        return dist.get_rank() // int(os.environ["LOCAL_WORLD_SIZE"])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(self.norm(hidden))))


class Net(nn.Module):
    """A small language model with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class LanguageModel(pl.LightningModule):
    """A plain LightningModule, as a user would write it; records the losses of its steps."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net = Net()
        self.optimizer = optimizer
        self.losses: list[float] = []

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> object:
        optimizer = make_optimizer(self.optimizer, self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make_scheduler(optimizer), "interval": "step"}}


def make_optimizer(name: str, parameters: object) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)


def dataset(num_batches: int, world_size: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_batches * world_size * BATCH, SEQUENCE)
    tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
    return TensorDataset(tokens, (tokens * 7 + 3) % VOCABULARY)


def loader(num_batches: int, world_size: int, seed: int = 0) -> DataLoader:
    """Each rank reads ``num_batches`` batches of ``BATCH`` rows; together they read the rows in order."""
    rows = dataset(num_batches, world_size, seed)
    return DataLoader(rows, batch_size=BATCH, sampler=DistributedSampler(rows, shuffle=False))


def where() -> dict[str, object]:
    """Returns what a Trainer or a Fabric is to be told of the worker pool."""
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return {
        "accelerator": "gpu" if worker_device().type == "cuda" else "cpu",
        "devices": devices,
        "num_nodes": dist.get_world_size() // devices,
        "plugins": [PoolEnvironment()],
    }


def make_trainer(**settings: object) -> pl.Trainer:
    defaults = {
        **where(),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**defaults, **settings})


def train_alone(
    net: nn.Module,
    num_batches: int,
    world_size: int,
    *,
    accumulate: int = 1,
    optimizer: str = "sgd",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    epochs: int = 1,
) -> list[float]:
    """Trains on the global batch in one process, as Lightning would; returns the loss of each microstep."""
    inner = make_optimizer(optimizer, net.parameters())
    scheduler = make_scheduler(inner)
    rows = dataset(num_batches, world_size).tensors
    losses = []
    for _ in range(epochs):
        for index in range(num_batches):
            part = slice(index * world_size * BATCH, (index + 1) * world_size * BATCH)
            loss = cross_entropy(net(rows[0][part]), rows[1][part])
            (loss / accumulate).backward()
            losses.append(loss.item())
            if (index + 1) % accumulate == 0 or index + 1 == num_batches:
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
                if clip_value is not None:
                    nn.utils.clip_grad_value_(net.parameters(), clip_value)
                inner.step()
                inner.zero_grad()
                scheduler.step()
    return losses


def mean_over_ranks(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=worker_device())
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).tolist()
