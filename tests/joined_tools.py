"""What tests of data that differs between ranks share: streams of known rows, and one process that sees all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from models import build, loss_of, microbatch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

LENGTHS = (10, 7, 7, 3)
# How to end, ranks of a partition, and the lengths of four ranks' streams.
ENDS = [
    *((how, shard_size, LENGTHS) for how in ("shortest", "longest") for shard_size in (2, 4)),
    ("longest", 2, (0, 4, 2, 0)),  # a rank without any data takes part
]
MODEL = "uneven"


def rows_of(rank: int, index: int, epoch: int = 0) -> Tensor:
    """Returns the one row of a rank's microstep."""
    return microbatch(MODEL, 1000 * epoch + 100 * rank + index, 1)


class Stream(IterableDataset[Tensor]):
    """A rank's rows, of which nobody knows how many there will be; an epoch brings other ones, and has a state."""

    def __init__(self, rank: int, length: int) -> None:
        self._rank, self._length = rank, length
        self._epoch, self._index, self._resumed = -1, 0, False

    def __iter__(self) -> Iterator[Tensor]:
        if not self._resumed:
            self._epoch, self._index = self._epoch + 1, 0
        self._resumed = False
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while first + step * self._index < self._length:
            self._index += 1
            yield rows_of(self._rank, first + step * (self._index - 1), self._epoch)[0]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._index, self._resumed = state["epoch"], state["index"], True


def stateful(data: Any, num_workers: int = 0, **options: Any) -> Any:
    """Returns a loader of single rows that resumes; its workers are forked, as those of a script are on Linux."""
    context = "fork" if num_workers else None
    return StatefulDataLoader(data, batch_size=1, num_workers=num_workers, multiprocessing_context=context, **options)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def num_steps(lengths: tuple[int, ...], how: str) -> int:
    return min(lengths) if how == "shortest" else max(lengths)


def train_alone(
    lengths: tuple[int, ...], how: str, accumulate: int, epochs: int = 1, model: Any = None
) -> tuple[nn.Module, list[float]]:
    """Trains on what all ranks have in each microstep; returns the model and its losses."""
    model, losses = build(MODEL) if model is None else model, []
    optimizer = make_optimizer(model)
    for epoch in range(epochs):
        total = num_steps(lengths, how)
        for index in range(total):
            present = [rank for rank, length in enumerate(lengths) if index < length]
            loss = loss_of(MODEL, model, torch.cat([rows_of(rank, index, epoch) for rank in present]))
            (loss / accumulate).backward()
            losses.append(loss.item())
            if (index + 1) % accumulate == 0 or index + 1 == total:
                optimizer.step()
                optimizer.zero_grad()
    return model, losses


def mean_of_present(losses: list[float], counts: list[bool]) -> list[float]:
    """Returns the mean of each microstep's losses over the ranks that have data. Collective over the world."""
    pairs = [(loss * count, float(count)) for loss, count in zip(losses, counts, strict=True)]
    table = torch.tensor(pairs).view(-1, 2)
    dist.all_reduce(table)
    return (table[:, 0] / table[:, 1]).tolist()
