"""Lightning's Trainer, Fabric and Accelerate on NCCL ranks: each precision, offload, and a resume on another shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate_tools import forget_accelerate, loader_of, make_accelerator
from gpu_tools import NCCL, NCCL_AND_GLOO, NEEDS_CARD, REHEARSES, on_cards
from lightning.fabric import Fabric
from lightning.pytorch.plugins import MixedPrecision
from lightning_tools import (
    LanguageModel,
    Net,
    PoolEnvironment,
    cross_entropy,
    dataset,
    loader,
    make_optimizer,
    make_trainer,
    mean_over_ranks,
    where,
)
from lightning_tools import train_alone as lightning_alone
from models import build, loss_of, microbatch
from torch import nn

from lightning_mics import MiCSStrategy
from lightning_mics.fabric import MiCSStrategy as FabricMiCSStrategy
from lightning_mics.testing import (
    WorkerPool,
    full_state_dict,
    relative_difference,
    weight_differences,
    worker_device,
)

pytestmark = NEEDS_CARD

SHARDING = {"shard_size": 2, "node_size": 2}
OFFLOADED = {**SHARDING, "cpu_offload": True}
BATCHES, ACCUMULATE, CLIP = 6, 2, 0.5
# Losses of half precision against float32 on one process.
BOUNDS = {"32-true": 1e-5, "bf16-mixed": 2e-2, "16-mixed": 5e-3, "no": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
if REHEARSES:  # CPUs have no loss scaling
    BOUNDS = {precision: bound for precision, bound in BOUNDS.items() if precision not in ("16-mixed", "fp16")}


def reference() -> Net:
    torch.manual_seed(3)
    return Net()


def module() -> LanguageModel:
    ours = LanguageModel()
    ours.net.load_state_dict(reference().state_dict())
    return ours


def fit(precision: str, settings: dict[str, Any]) -> float:
    """Returns how far the losses of two epochs are from those of one process."""
    alone, ours = reference(), module()
    how: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # the scale that is usual to begin with would skip the first steps
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
        how = {"plugins": [PoolEnvironment(), MixedPrecision("16-mixed", "cuda", scaler)]}
    trainer = make_trainer(
        strategy=MiCSStrategy(**settings),
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        gradient_clip_algorithm="norm",
        max_epochs=2,
        **how,
    )
    world = trainer.world_size
    expected = lightning_alone(alone, BATCHES, world, accumulate=ACCUMULATE, clip_norm=CLIP, epochs=2)
    trainer.fit(ours, loader(BATCHES, world))
    return max(map(relative_difference, mean_over_ranks(ours.losses), expected))


@pytest.mark.parametrize("offload", [False, True], ids=["on the card", "offloaded"])
@pytest.mark.parametrize("precision", [name for name in BOUNDS if "-" in name])
def test_trainer(pool: WorkerPool, precision: str, offload: bool) -> None:
    settings, backend = (OFFLOADED, NCCL_AND_GLOO) if offload else (SHARDING, NCCL)
    for difference in on_cards(pool, fit, precision, settings, backend=backend):
        assert difference < BOUNDS[precision]


def fit_and_save(folder: str, settings: dict[str, Any]) -> list[float]:
    """Trains two epochs, with a checkpoint after the first; returns the losses of the second."""
    ours = module()
    trainer = make_trainer(strategy=MiCSStrategy(**settings), enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(ours, loader(BATCHES, trainer.world_size))
    trainer.save_checkpoint(Path(folder) / "saved.ckpt")
    return resume(str(Path(folder) / "saved.ckpt"), settings)


def resume(path: str, settings: dict[str, Any]) -> list[float]:
    torch.manual_seed(99)
    ours = LanguageModel()
    trainer = make_trainer(strategy=MiCSStrategy(**settings), max_epochs=2)
    trainer.fit(ours, loader(BATCHES, trainer.world_size), ckpt_path=path)
    return mean_over_ranks(ours.losses)


@pytest.mark.parametrize("offload", [False, True], ids=["on the card", "offloaded"])
def test_trainer_resumes_on_another_shard_size(pool: WorkerPool, tmp_path: Path, offload: bool) -> None:
    settings, backend = (OFFLOADED, NCCL_AND_GLOO) if offload else (SHARDING, NCCL)
    expected = lightning_alone(reference(), BATCHES, 4, epochs=2)[BATCHES:]
    same = on_cards(pool, fit_and_save, str(tmp_path), settings, backend=backend)
    other = on_cards(pool, resume, str(tmp_path / "saved.ckpt"), {**settings, "shard_size": 4}, backend=backend)
    for losses in (*same, *other):
        assert max(map(relative_difference, losses, expected)) < 1e-5


def fabric_steps(precision: str, settings: dict[str, Any]) -> float:
    """Returns how far the losses are from those of one process."""
    torch.manual_seed(3)
    fabric = Fabric(strategy=FabricMiCSStrategy(**settings), precision=precision, **where())
    fabric.launch()
    net = reference()
    model, optimizer = fabric.setup(net, make_optimizer("sgd", net.parameters()))
    alone = reference()
    inner = make_optimizer("sgd", alone.parameters())
    world, rank, worst = fabric.world_size, fabric.global_rank, 0.0
    tokens, targets = (rows.split(2 * world) for rows in dataset(BATCHES, world).tensors)
    for index in range(BATCHES):
        ends = index % ACCUMULATE == ACCUMULATE - 1
        with fabric.no_backward_sync(model, enabled=not ends):
            mine = fabric.to_device((tokens[index][rank::world], targets[index][rank::world]))
            loss = cross_entropy(model(mine[0]), mine[1])
            fabric.backward(loss / ACCUMULATE)
        expected = cross_entropy(alone(tokens[index]), targets[index])
        (expected / ACCUMULATE).backward()
        worst = max(worst, relative_difference(mean_over_ranks([loss.item()])[0], expected.item()))
        if ends:
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            nn.utils.clip_grad_norm_(alone.parameters(), CLIP)
            for entry in (optimizer, inner):
                entry.step()
                entry.zero_grad()
    return worst


@pytest.mark.parametrize("offload", [False, True], ids=["on the card", "offloaded"])
def test_fabric(pool: WorkerPool, offload: bool) -> None:
    settings, backend = (OFFLOADED, NCCL_AND_GLOO) if offload else (SHARDING, NCCL)
    for difference in on_cards(pool, fabric_steps, "32-true", settings, backend=backend):
        assert difference < BOUNDS["32-true"]


def accelerate_steps(precision: str, settings: dict[str, Any], folder: str) -> tuple[float, float]:
    """Returns how far losses are from those of one process, and weights from those saved, after loading them."""
    world = dist.get_world_size()
    rows = torch.cat([microbatch("gpt2", index, 2 * world) for index in range(BATCHES)])
    accelerator = make_accelerator(ACCUMULATE, settings, mixed_precision=precision)
    model, alone = build("gpt2"), build("gpt2")
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (model, alone)]
    model, optimizer, batches = accelerator.prepare(model, optimizers[0], loader_of(rows, 2))
    worst = 0.0
    for index, batch in enumerate(batches):
        with accelerator.accumulate(model):
            loss = loss_of("gpt2", model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        expected = loss_of("gpt2", alone, rows[index * 2 * world : (index + 1) * 2 * world])
        (expected / ACCUMULATE).backward()
        if index % ACCUMULATE == ACCUMULATE - 1:
            nn.utils.clip_grad_norm_(alone.parameters(), CLIP)
            optimizers[1].step()
            optimizers[1].zero_grad()
        worst = max(worst, relative_difference(mean_over_ranks([loss.item()])[0], expected.item()))
    weights = full_state_dict(model)
    accelerator.save_state(folder)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    accelerator.load_state(folder)
    restored = max(weight_differences(full_state_dict(model), weights).values())
    forget_accelerate()
    return worst, restored


@pytest.mark.parametrize("offload", [False, True], ids=["on the card", "offloaded"])
@pytest.mark.parametrize("precision", [name for name in BOUNDS if "-" not in name])
def test_accelerate(pool: WorkerPool, tmp_path: Path, precision: str, offload: bool) -> None:
    settings, backend = (OFFLOADED, NCCL_AND_GLOO) if offload else (SHARDING, NCCL)
    for difference, restored in on_cards(pool, accelerate_steps, precision, settings, str(tmp_path), backend=backend):
        assert difference < BOUNDS[precision]
        assert restored == 0


def offload_without_gloo() -> None:
    make_trainer(strategy=MiCSStrategy(**OFFLOADED)).fit(module(), loader(1, dist.get_world_size()))


@pytest.mark.skipif(REHEARSES, reason="gloo has CPU tensors")
def test_offload_without_gloo_is_refused_in_words(pool: WorkerPool) -> None:
    for failure in pool.attempt(offload_without_gloo, world_size=2, timeout=60, backend=NCCL):
        assert failure.kind == "MiCSConfigError"
        assert "cpu_offload" in failure.message
        assert "cpu:gloo,cuda:nccl" in failure.message


def test_workers_have_the_card(pool: WorkerPool) -> None:
    assert {device.type for device in on_cards(pool, worker_device)} == {"cpu" if REHEARSES else "cuda"}
