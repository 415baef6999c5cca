"""Ranks that evaluate different numbers of batches: in the Trainer's loops, with Accelerate, alone, and generating."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from accelerate_tools import make_accelerator
from lightning.pytorch.callbacks import Callback
from lightning_tools import LanguageModel, Net, cross_entropy, dataset, loader, make_trainer
from models import build, loss_of, microbatch
from test_generation import prompt, tiny_gpt2
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from works import works

from lightning_mics import MiCSConfig, MiCSStrategy, mics_shard, unequal_passes
from lightning_mics.testing import WorkerPool


def reference() -> Net:
    torch.manual_seed(3)
    return Net()


class Counts(Callback):
    def __init__(self) -> None:
        self.predicted = 0

    def on_predict_batch_end(self, *args: Any) -> None:
        self.predicted += 1


class Evaluated(LanguageModel):
    """Counts the rows that its steps see, as a metric of torchmetrics does."""

    def __init__(self) -> None:
        super().__init__()
        self.net.load_state_dict(reference().state_dict())
        self.rows = 0

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.rows += len(batch[0])
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


def predict_nine() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = TensorDataset(*dataset(3, 2).tensors)
    nine = Subset(rows, range(9))
    alone = reference()
    for shard_size in (1, 2, 4):
        module, counts = Evaluated(), Counts()
        trainer = make_trainer(strategy=MiCSStrategy(shard_size=shard_size), callbacks=[counts])
        predicted = trainer.predict(module, DataLoader(nine, batch_size=1))
        mine = range(9)[rank::world_size]
        assert len(predicted) == len(mine) == counts.predicted
        with torch.no_grad():
            for index, logits in zip(mine, predicted, strict=True):
                torch.testing.assert_close(logits, alone(nine[index][0][None]))
        trainer.fit(module, loader(2, world_size))
        # Half of the ranks have no rows, and nobody knows how many there are.
        trainer = make_trainer(
            strategy=MiCSStrategy(shard_size=shard_size), use_distributed_sampler=False, limit_predict_batches=9
        )
        few = Stream(Subset(rows, range([0, 1, 3, 0][rank])))
        assert len(trainer.predict(module, DataLoader(few, batch_size=1))) == len(few._rows)


@works("Training loops", "`trainer.predict` on a number of samples that the ranks do not divide")
def test_predict_gives_each_rank_its_own_samples(pool: WorkerPool) -> None:
    pool.run(predict_nine, world_size=4)


class Stream(IterableDataset[Any]):
    """Rows of a dataset, of which nobody knows how many there will be."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self._rows[index] for index in range(len(self._rows)))


LENGTHS = ([3, 1, 2, 2], [1, 2, 4, 1])


def validate_unequal(is_stream: bool, *lengths: list[int]) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = TensorDataset(*dataset(3, 2).tensors)
    wanted = [torch.arange(sum(counts)) for counts in lengths]
    parts = [torch.split(indices, counts) for indices, counts in zip(wanted, lengths, strict=True)]
    mine = [Subset(rows, part[rank].tolist()) for part in parts]
    loaders = [DataLoader(Stream(part) if is_stream else part, batch_size=1) for part in mine]
    alone = reference()
    for shard_size in (2, 4):
        module = Evaluated()
        trainer = make_trainer(
            strategy=MiCSStrategy(shard_size=shard_size),
            use_distributed_sampler=False,
            limit_val_batches=9 if is_stream else 1.0,
        )
        measured = trainer.validate(module, loaders, verbose=False)
        for found, indices in zip(measured, wanted, strict=True):
            tokens, targets = rows[indices]
            with torch.no_grad():
                expected = cross_entropy(alone(tokens), targets)
            assert abs(next(iter(found.values())) - expected) < 1e-5
        assert module.rows == sum(counts[rank] for counts in lengths)
        module = Evaluated()
        trainer = make_trainer(
            strategy=MiCSStrategy(shard_size=shard_size),
            use_distributed_sampler=False,
            val_check_interval=1,
            accumulate_grad_batches=2,
        )
        trainer.fit(module, loader(2, world_size), loaders)


@works("Training loops", "Validation and test loaders of other lengths on each rank, also of unknown length")
@pytest.mark.parametrize("is_stream", [False, True])
def test_metrics_are_those_of_all_rows(pool: WorkerPool, is_stream: bool) -> None:
    pool.run(validate_unequal, is_stream, *LENGTHS, world_size=4)


def run_alone(shard_size: int, settings: dict[str, Any]) -> None:
    rank, alone = dist.get_rank(), build("uneven")
    model = mics_shard(build("uneven"), MiCSConfig(shard_size=shard_size, node_size=2, **settings)).eval()
    for first in (1, 0):  # with and without any pass before; nobody has one at last
        with torch.no_grad(), unequal_passes(model):
            for index in range((rank + first) % 4):
                rows = microbatch("uneven", index, 2)
                torch.testing.assert_close(loss_of("uneven", model, rows), loss_of("uneven", alone, rows))
    for _ in range(2):
        rows = microbatch("uneven", rank, 2)
        loss_of("uneven", model.train(), rows).backward()


@pytest.mark.parametrize("shard_size", [1, 2, 4])
def test_ranks_run_as_many_passes_as_they_like(pool: WorkerPool, shard_size: int) -> None:
    for settings in ({}, {"reshard_after_forward": False}):
        pool.run(run_alone, shard_size, settings, world_size=4)


def train_in_it() -> None:
    model = mics_shard(build("uneven"), MiCSConfig(shard_size=2))
    with unequal_passes(model):
        loss_of("uneven", model, microbatch("uneven", 0, 2)).backward()


def test_a_backward_pass_is_refused(pool: WorkerPool) -> None:
    for failure in pool.attempt(train_in_it, world_size=2):
        assert failure.kind == "MiCSError" and "with as many batches on every rank" in failure.message


def evaluate_with_accelerate() -> None:
    from accelerate import DataLoaderConfiguration

    rank, alone = dist.get_rank(), build("uneven")
    accelerator = make_accelerator(
        settings={"shard_size": 2}, dataloader_config=DataLoaderConfiguration(even_batches=False)
    )
    rows = microbatch("uneven", 0, 6)
    model, batches = accelerator.prepare(build("uneven").eval(), DataLoader(rows, batch_size=1))  # type: ignore[arg-type]
    for even in (None, False):
        seen = []
        with accelerator.join_uneven_inputs([model], even_batches=even), torch.no_grad():
            for batch in batches:
                torch.testing.assert_close(loss_of("uneven", model, batch), loss_of("uneven", alone, batch))
                seen.append(batch)
        torch.testing.assert_close(torch.cat(seen), rows[rank::4])


@works("Training loops", "`accelerator.join_uneven_inputs` in evaluations, with `even_batches=False`")
def test_accelerate_evaluates_unequal_batches(pool: WorkerPool) -> None:
    pool.run(evaluate_with_accelerate, world_size=4)


class Speaker(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = tiny_gpt2().eval()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> list[int]:
        return speak(self.model, batch[0])


def speak(model: Any, tokens: Tensor) -> list[int]:
    length = 6 + int(tokens[0, 0])
    return model.generate(tokens, max_length=length, do_sample=False, pad_token_id=0)[0].tolist()


def generate_unequal() -> None:
    rank = dist.get_rank()
    torch.manual_seed(1)
    alone: nn.Module = tiny_gpt2().eval()
    prompts = torch.stack([prompt()[0] - rank + index for index in range(9)])
    for shard_size in (1, 2, 4):
        trainer = make_trainer(strategy=MiCSStrategy(shard_size=shard_size))
        written = trainer.predict(Speaker(), DataLoader(TensorDataset(prompts), batch_size=1))
        assert written == [speak(alone, row[None]) for row in prompts[rank::4]]


@works("Training loops", "`generate` in `predict_step`, with other numbers of prompts on each rank")
def test_ranks_generate_for_different_numbers_of_prompts(pool: WorkerPool) -> None:
    pool.run(generate_unequal, world_size=4)
