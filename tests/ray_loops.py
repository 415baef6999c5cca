"""The same training in four ways, in Ray's workers and under torchrun: ``torchrun ray_loops.py FOLDER WAYS...``.

Each rank writes the loss of each step to a file of the folder. In Ray a checkpoint is reported after step 2, and the
first attempt ends in step 3.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset

from lightning_mics import MiCSConfig, load_checkpoint, mics_shard, save_checkpoint
from lightning_mics.core.runtime import runtime_of

STEPS, SAVED, VOCABULARY = 4, 2, 19


class Interrupted(Exception):
    """Ends a way in the middle, where the worker is killed in another one."""


@dataclass
class Run:
    """One way on one rank.

    Attributes:
        way: The way.
        folder: Where losses go.
        in_ray: Whether Ray started this process.
        last: The checkpoint to go on from.
        kills: Whether a worker is killed in step 3 of the first attempt; otherwise the way is left there.
    """

    way: str
    folder: Path
    in_ray: bool = False
    last: str | None = None
    kills: bool = False

    def begin(self, step: int) -> None:
        """Is called before each step."""
        if self.in_ray and self.last is None and step == SAVED + 1:
            if not self.kills:
                raise Interrupted
            if dist.get_rank() == 2:
                import ray.train

                ray.train.get_all_reported_checkpoints()  # when Ray knows of what was reported
                os.kill(os.getpid(), signal.SIGKILL)

    def note(self, step: int, loss: Tensor, model: Any) -> None:
        """Writes the loss of a step."""
        layout = runtime_of(model).mesh.layout
        line = {"step": step, "loss": loss.item(), "resumed": self.last is not None}
        line |= {"node_size": layout.topology.node_size, "shard_size": layout.shard_size}
        with (self.folder / f"{self.way}-{dist.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, VOCABULARY, (STEPS * dist.get_world_size(), 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def make_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2, **dict.fromkeys(_DROPS, 0.0))
    )


_DROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
adamw = functools.partial(torch.optim.AdamW, lr=1e-2)


def bare(run: Run) -> None:
    model = mics_shard(make_model(), MiCSConfig(shard_size=2))
    optimizer, rows, done = adamw(model.parameters()), Rows(), 0
    if run.last is not None:
        done = load_checkpoint(run.last, model, optimizer)["step"]
    for step in range(done + 1, STEPS + 1):
        run.begin(step)
        batch = rows[(step - 1) * dist.get_world_size() + dist.get_rank()]
        loss = model(**{name: tokens[None] for name, tokens in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.note(step, loss, model)
        if run.in_ray:
            from lightning_mics.ray import report

            save = functools.partial(save_checkpoint, model=model, optimizers=optimizer, meta={"step": step})
            report({"way": run.way, "step": step}, save if step == SAVED else None)


def accelerate(run: Run) -> None:
    from accelerate_tools import forget_accelerate

    from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin

    forget_accelerate()
    accelerator = MiCSAccelerator(mics_plugin=MiCSPlugin(shard_size=2))
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, adamw(model.parameters()), DataLoader(Rows(), batch_size=1))
    done = 0
    if run.last is not None:
        accelerator.load_state(run.last)
        done, loader = SAVED, accelerator.skip_first_batches(loader, SAVED)
    for step, batch in enumerate(loader, done + 1):
        run.begin(step)
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.note(step, loss, model)
        if run.in_ray:
            from lightning_mics.ray import report

            report({"way": run.way, "step": step}, accelerator.save_state if step == SAVED else None)


def lightning(run: Run) -> None:
    import lightning.pytorch as pl

    from lightning_mics import MiCSStrategy

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            run.begin(self.global_step + 1)
            loss: Tensor = self.model(**batch).loss
            run.note(self.global_step + 1, loss, self)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.parameters())

    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": STEPS // SAVED, "logger": False}
    options |= {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    if run.in_ray:
        from ray.train.lightning import RayLightningEnvironment, prepare_trainer

        from lightning_mics.ray.lightning import RayMiCSStrategy, RayTrainReportCallback

        trainer = pl.Trainer(
            devices="auto",
            strategy=RayMiCSStrategy(shard_size=2),
            plugins=[RayLightningEnvironment()],
            callbacks=[RayTrainReportCallback()],
            **options,
        )
        trainer = prepare_trainer(trainer)
        assert (trainer.world_size, trainer.num_nodes, trainer.strategy.num_processes) == (4, 2, 2)
    else:
        trainer = pl.Trainer(devices=2, num_nodes=2, strategy=MiCSStrategy(shard_size=2), **options)
    # Two steps make an epoch, after which Ray's callback reports.
    trainer.fit(Lit(), DataLoader(Subset(Rows(), range(SAVED * 4)), batch_size=1), ckpt_path=run.last)


def transformers(run: Run) -> None:
    from accelerate_tools import forget_accelerate
    from transformers import TrainingArguments

    from lightning_mics.accelerate import MiCSPlugin
    from lightning_mics.transformers import MiCSTrainer

    class InOrder(MiCSTrainer):
        def _get_train_sampler(self, data: Any = None) -> Any:
            return SequentialSampler(data)

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            run.begin(self.state.global_step + 1)
            loss = super().training_step(model, *args, **kwargs)
            run.note(self.state.global_step + 1, loss, model)
            return loss

    forget_accelerate()
    output = str(run.folder / "trainer")
    if run.in_ray:
        from lightning_mics.ray import run_path

        output = run_path("trainer")
    model = make_model()
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output,
            per_device_train_batch_size=1,
            max_steps=STEPS,
            save_steps=SAVED,
            save_strategy="steps" if run.in_ray else "no",
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Rows(),
        mics_plugin=MiCSPlugin(shard_size=2),
        optimizers=(adamw(model.parameters()), None),
    )
    if run.in_ray:
        from ray.train.huggingface.transformers import prepare_trainer

        from lightning_mics.ray.transformers import RayTrainReportCallback

        trainer.add_callback(RayTrainReportCallback())
        trainer = prepare_trainer(trainer)
    trainer.train(resume_from_checkpoint=run.last)


WAYS: dict[str, Callable[[Run], None]] = {
    "bare": bare,
    "accelerate": accelerate,
    "lightning": lightning,
    "transformers": transformers,
}


def in_ray(config: dict[str, Any]) -> None:
    """A ``train_loop_per_worker``: all ways of a list, the last of which loses a worker."""
    import ray.train

    from lightning_mics.ray import last_checkpoint, path_of

    reported = [(entry.metrics, entry.checkpoint) for entry in ray.train.get_all_reported_checkpoints()]
    found = {_way_of(metrics, path_of(checkpoint)): path_of(checkpoint) for metrics, checkpoint in reported}
    ways = config["ways"]
    assert last_checkpoint() == found.get(ways[-1])
    for way in ways:
        run = Run(way, Path(config["folder"]), in_ray=True, last=found.get(way), kills=way == ways[-1])
        try:
            WAYS[way](run)
        except Interrupted:
            assert run.last is None


def _way_of(metrics: dict[str, Any], path: str) -> str:
    named = "lightning" if "epoch" in metrics and "way" not in metrics else str(metrics.get("way"))
    return "transformers" if Path(path).name.startswith("checkpoint-") else named


def without_ray(folder: str | Path, ways: Sequence[str]) -> None:
    """Trains in a process group that is there, of two nodes by torchrun's variables."""
    for way in ways:
        WAYS[way](Run(way, Path(folder)))


def in_pool(folder: Path, ways: Sequence[str]) -> None:
    """Trains in workers of a pool, to which it tells what torchrun tells of two nodes."""
    node, local = divmod(dist.get_rank(), 2)
    variables = {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": node, "ACCELERATE_USE_CPU": "true"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in variables.items()})
    without_ray(folder, ways)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    without_ray(sys.argv[1], sys.argv[2:])
    dist.destroy_process_group()
