"""The Accelerate adapter against one process that sees the global batch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, ParallelismConfig
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, compile_regions
from accelerate_tools import forget_accelerate, loader_of, lora, make_accelerator
from checkpoint_tools import equal, everything, slow_writing
from lightning_tools import make_trainer
from models import VOCABULARY, build, loss_of, microbatch
from object_storage import keys
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from works import works

from lightning_mics import Hop, MiCSConfig, MiCSStrategy
from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin
from lightning_mics.accelerate.backends import ask_for_backends
from lightning_mics.accelerate.plugin import launched_settings
from lightning_mics.checkpoint import optimizer_state
from lightning_mics.errors import CheckpointError, MiCSConfigError
from lightning_mics.testing import WorkerPool, full_state_dict, relative_difference, weight_differences

ROWS, EPOCHS, CLIP = 2, 2, 0.5


@dataclass(frozen=True)
class Case:
    """One way to train; an epoch has an incomplete last window wherever ``accumulate`` does not divide it."""

    model: str
    world: int
    settings: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 4
    batches: int = 6
    lora: bool = False
    optimizer: str = "sgd"

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.model}{' LoRA' * self.lora}, world {self.world}, {settings}, accumulate {self.accumulate}"


def make_model(case: Case, seed: int = 0) -> nn.Module:
    model = build(case.model, seed)
    return lora(model) if case.lora else model


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    params = [param for param in model.parameters() if param.requires_grad]
    if case.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=1e-2)
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01)


def rows_of(case: Case) -> Tensor:
    return torch.cat([microbatch(case.model, index, case.world * ROWS) for index in range(case.batches)])


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def run_loop(case: Case, accelerator: Accelerator, rows: Tensor, batch_size: int, model: nn.Module) -> Outcome:
    """The loop of the public examples; the optimizer is built before ``prepare``."""
    optimizer = make_optimizer(case, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2 * accelerator.num_processes, gamma=0.9)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader_of(rows, batch_size), scheduler)
    losses, norms = [], []
    for _ in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_of(case.model, model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), CLIP)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return Outcome(losses, norms, full_state_dict(model))


def train_sharded(case: Case) -> tuple[Outcome, list[dict[str, int]]]:
    accelerator = make_accelerator(case.accumulate, case.settings)
    model = make_model(case, seed=dist.get_rank())
    outcome = run_loop(case, accelerator, rows_of(case), ROWS, model)
    losses = torch.tensor(outcome.losses, dtype=torch.float64)
    dist.all_reduce(losses)
    ledger = accelerator.ledger(model)
    calls = [{hop.name: ledger.total(hop, unit).calls for hop in Hop} for unit in ledger.units()]
    return Outcome((losses / case.world).tolist(), outcome.norms, outcome.weights), calls


def train_alone(case: Case) -> Outcome:
    forget_accelerate()
    kept = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=case.accumulate)
        assert accelerator.num_processes == 1
        # Accelerate steps a schedule once for each process.
        case = Case(case.model, case.world, {}, case.accumulate, case.batches, case.lora, case.optimizer)
        return run_loop(case, accelerator, rows_of(case), ROWS * case.world, make_model(case))
    finally:
        os.environ.update(kept)
        forget_accelerate()


def compare(cases: list[Case]) -> list[tuple[str, float, float, float, list[dict[str, int]]]]:
    results = []
    for case in cases:
        ours, calls = train_sharded(case)
        theirs = train_alone(case)
        loss = max(map(relative_difference, ours.losses, theirs.losses))
        norm = max(map(relative_difference, ours.norms, theirs.norms))
        assert len(ours.norms) == len(theirs.norms)
        weight = max(weight_differences(ours.weights, theirs.weights).values()) if case.optimizer == "sgd" else 0.0
        results.append((str(case), loss, norm, weight, calls))
    return results


CASES = [
    *(Case("gpt2", world, {"shard_size": 2, "node_size": 2}, accumulate) for world in (4, 8) for accumulate in (1, 4)),
    *(Case("bert", 4, {"shard_size": shard, "node_size": 2}) for shard in (1, 2, 4)),
    *(Case("uneven", 8, {"shard_size": 4, "node_size": 2, "hierarchical": h}) for h in (True, False)),
    Case("bert", 4, {"shard_size": 4, "node_size": 2}, optimizer="adamw"),
    Case("gpt2", 4, {"shard_size": 2, "node_size": 2}, lora=True),
    Case("gpt2", 4, {"shard_size": 4, "node_size": 2}, lora=True),
    Case("gpt2", 8, {"shard_size": 4, "node_size": 2}, accumulate=1, lora=True),
]


@pytest.mark.parametrize("world", [4, 8])
def test_training_equals_one_process(pool: WorkerPool, world: int) -> None:
    cases = [case for case in CASES if case.world == world]
    for results in pool.run(compare, cases, world_size=world, timeout=120):
        for name, loss, norm, weight, _ in results:
            assert loss <= 1e-5, f"{name}: losses differ by {loss:.1e}"
            assert norm <= 1e-5, f"{name}: norms differ by {norm:.1e}"
            assert weight <= 1e-5, f"{name}: weights differ by {weight:.1e}"


def test_two_hops(pool: WorkerPool) -> None:
    case = Case("gpt2", 4, {"shard_size": 2, "node_size": 2}, accumulate=4, batches=8)
    for _, calls in pool.run(train_sharded, case, world_size=4):
        for unit in calls:
            assert (unit["PARTITION_REDUCE"], unit["REPLICATION_REDUCE"]) == (8 * EPOCHS, 2 * EPOCHS)


def reduced_bytes(with_lora: bool) -> tuple[int, int]:
    """Returns the bytes of reduced gradients in a microstep, and those of the trainable parameters."""
    accelerator = make_accelerator(1, {"shard_size": 2, "node_size": 2})
    model = build("gpt2")
    model = lora(model) if with_lora else model
    trainable = sum(param.numel() * 4 for param in model.parameters() if param.requires_grad)
    model = accelerator.prepare(model)
    accelerator.backward(loss_of("gpt2", model, microbatch("gpt2", 0, 2)))
    ledger = accelerator.ledger(model)
    return ledger.total(Hop.PARTITION_REDUCE).message_bytes, trainable


@works("Model kinds", "LoRA adapters of PEFT")
def test_with_lora_only_adapters_travel(pool: WorkerPool) -> None:
    for reduced, trainable in pool.run(reduced_bytes, True, world_size=4):
        assert trainable <= reduced < 2 * trainable  # uneven shards are padded
    assert pool.run(reduced_bytes, False, world_size=4)[0][0] > 4 * pool.run(reduced_bytes, True, world_size=4)[0][0]


def gathered_bytes(mixed_precision: str) -> tuple[int, torch.dtype, torch.dtype]:
    forget_accelerate()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = MiCSAccelerator(mics_plugin=MiCSPlugin(shard_size=2), mixed_precision=mixed_precision)
    model = build("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    logits = model(input_ids=microbatch("gpt2", 0, 2)).logits
    accelerator.backward(logits.square().mean())
    optimizer.step()
    ledger = accelerator.ledger(model)
    return ledger.total(Hop.PARTITION_GATHER).message_bytes, logits.dtype, next(model.parameters()).grad.dtype


def test_mixed_precision_gathers_half_the_bytes(pool: WorkerPool) -> None:
    full, _, _ = pool.run(gathered_bytes, "no", world_size=2)[0]
    half, output, grad = pool.run(gathered_bytes, "bf16", world_size=2)[0]
    assert 2 * half == full and output is torch.float32 and grad is torch.float32


def generate_with(with_lora: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Ranks generate different lengths, with an encoder-decoder model whose parts are called one by one."""
    from transformers import T5Config, T5ForConditionalGeneration

    accelerator = make_accelerator(1, {"shard_size": 2, "node_size": 2})
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model: Any = T5ForConditionalGeneration(config).eval()
    if with_lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "v"])).eval()
    rows = microbatch("gpt2", dist.get_rank(), 2)
    options = {"input_ids": rows, "max_new_tokens": 3 + dist.get_rank(), "do_sample": False}
    expected = model.generate(**options).tolist()
    model = accelerator.prepare(model)
    actual = accelerator.unwrap_model(model).generate(**options).tolist()
    accelerator.backward(model(input_ids=rows, labels=rows).loss)
    return actual, expected


@pytest.mark.parametrize("with_lora", [False, True])
def test_generation(pool: WorkerPool, with_lora: bool) -> None:
    for actual, expected in pool.run(generate_with, with_lora, world_size=4):
        assert actual == expected


def prepare_one_by_one() -> tuple[bool, bool]:
    """The optimizer is built first, and prepared last and alone."""
    accelerator = make_accelerator(1, {"shard_size": 2, "node_size": 2})
    model = build("uneven")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = accelerator.prepare(model)
    before = full_state_dict(model)
    optimizer = accelerator.prepare(optimizer)
    accelerator.backward(loss_of("uneven", model, microbatch("uneven", 0, 2)))
    accelerator.clip_grad_value_(model.parameters(), 0.01)
    largest = max(param.grad.to_local().abs().max().item() for param in model.parameters() if param.to_local().numel())
    optimizer.step()
    after = full_state_dict(model)
    return all(not torch.equal(before[name], after[name]) for name in before), largest <= 0.01


def test_an_optimizer_may_be_prepared_alone(pool: WorkerPool) -> None:
    assert pool.run(prepare_one_by_one, world_size=4) == [(True, True)] * 4


# Checkpoints.


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def set_up(
    shard: int, seed: int, is_async: bool = False, **project: Any
) -> tuple[MiCSAccelerator, Any, Any, Any, Counter]:
    forget_accelerate()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = MiCSAccelerator(
        mics_plugin=MiCSPlugin(shard_size=shard, node_size=dist.get_world_size(), async_checkpoint=is_async),
        gradient_accumulation_steps=4,
        project_config=ProjectConfiguration(**project) if project else None,
    )
    model = build("gpt2", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    return accelerator, model, optimizer, scheduler, counter


def save(path: str, shard: int) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    accelerator, model, optimizer, scheduler, counter = set_up(shard, seed=1)
    for index in range(6):  # one window and half of the next
        with accelerator.accumulate(model):
            accelerator.backward(loss_of("gpt2", model, microbatch("gpt2", index, 2)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    optimizer.optimizer.zero_grad()
    counter.value = 17
    accelerator.save_state(path)
    accelerator.save_model(model, f"{path}-model")
    return (
        everything(model, optimizer.optimizer),
        scheduler.state_dict(),
        loss_of("gpt2", model, microbatch("gpt2", 9, 4)).detach(),
    )


def load(path: str, shard: int) -> tuple[dict[str, Tensor], dict[str, Any], int, int]:
    accelerator, model, optimizer, scheduler, counter = set_up(shard, seed=2)
    accelerator.load_state(path)
    return everything(model, optimizer.optimizer), scheduler.state_dict(), counter.value, accelerator.step


def test_state_is_loaded_bitwise_on_other_shapes(pool: WorkerPool, tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    saved, schedule, _ = pool.run(save, path, 2, world_size=4)[0]
    for world, shard in ((4, 4), (2, 2), (4, 2), (8, 4)):
        for loaded, loaded_schedule, counter, step in pool.run(load, path, shard, world_size=world):
            assert equal(loaded, saved)
            assert loaded_schedule["last_epoch"] == schedule["last_epoch"]
            assert (counter, step) == (17, 6)


def save_and_load_at_a_url(root: str) -> tuple[bool, int, int, list[str]]:
    options = {"root": root}
    project = {"project_dir": "objects://bucket/run", "automatic_checkpoint_naming": True, "total_limit": 2}
    accelerator, model, optimizer, _, counter = set_up(2, 1, **project)
    optimizer.step()
    for value in (16, 17, 18):
        counter.value = value
        accelerator.save_state(storage_options=options)
    before, counter.value = everything(model, optimizer.optimizer), 0
    optimizer.step()
    accelerator.load_state("objects://bucket/run/checkpoints/checkpoint_1", storage_options=options)
    same, first = equal(everything(model, optimizer.optimizer), before), counter.value
    accelerator.load_state(storage_options=options)
    with pytest.raises(CheckpointError, match=r"a URL, and accelerator\.save_model writes to file systems only"):
        accelerator.save_model(model, "objects://bucket/model")
    return same, first, counter.value, sorted({key.split("/")[2] for key in keys(Path(root))})


@works("Savers", "save_state and load_state in object storage")
def test_states_at_urls(pool: WorkerPool, tmp_path: Path) -> None:
    for result in pool.run(save_and_load_at_a_url, str(tmp_path), world_size=2):
        assert result == (True, 17, 18, ["checkpoint_1", "checkpoint_2"])


@works("Savers", "save_pretrained of transformers, after accelerator.prepare")
def test_a_saved_model_opens_with_from_pretrained(pool: WorkerPool, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    loss = pool.run(save, str(tmp_path / "state"), 2, world_size=4)[0][2]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "state-model")
    assert torch.equal(loss_of("gpt2", model, microbatch("gpt2", 9, 4)), loss)


def save_and_load_by_hooks(path: str) -> tuple[bool, bool, int]:
    """Hooks take the weights upon themselves, as scripts for diffusion models do."""
    kept: list[dict[str, Tensor]] = []

    def take_weights(models: list[Any], weights: list[Any], folder: str) -> None:
        kept.append({name: value.to_local().clone() for name, value in weights.pop().items()})

    def give_weights(models: list[Any], folder: str) -> None:
        for name, value in models.pop().state_dict().items():
            value.to_local().copy_(kept[0][name])

    def begin(seed: int) -> tuple[Any, Any, Any]:
        accelerator, model, optimizer, *_ = set_up(2, seed)
        accelerator.register_save_state_pre_hook(take_weights)
        accelerator.register_load_state_pre_hook(give_weights)
        return accelerator, model, optimizer

    accelerator, model, optimizer = begin(1)
    accelerator.backward(loss_of("gpt2", model, microbatch("gpt2", 0, 2)))
    optimizer.optimizer.step()
    accelerator.step = 5
    saved = everything(model, optimizer.optimizer)
    accelerator.save_state(path)
    accelerator, model, optimizer = begin(2)
    accelerator.load_state(path)
    return equal(everything(model, optimizer.optimizer), saved), bool(optimizer.state), accelerator.step


def test_hooks_may_take_over_the_weights(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(save_and_load_by_hooks, str(tmp_path / "state"), world_size=2) == [(True, True, 5)] * 2


def save_three(folder: str, is_async: bool) -> tuple[list[list[str]], int]:
    accelerator, _, _, _, counter = set_up(
        2, 1, is_async, project_dir=folder, automatic_checkpoint_naming=True, total_limit=2
    )
    seen = []
    with slow_writing():
        for counter.value in range(3):
            accelerator.save_state()
            seen.append(sorted(name for name in os.listdir(f"{folder}/checkpoints") if name[0] != "."))
        accelerator.load_state()
    return [*seen, sorted(os.listdir(f"{folder}/checkpoints"))], counter.value


@pytest.mark.parametrize("is_async", [False, True])
def test_checkpoints_are_named_and_limited(pool: WorkerPool, tmp_path: Path, is_async: bool) -> None:
    first, *others = ["checkpoint_0"], ["checkpoint_0", "checkpoint_1"], ["checkpoint_1", "checkpoint_2"]
    at_once = [[], first, others[0]] if is_async else [first, *others]
    assert pool.run(save_three, str(tmp_path), is_async, world_size=2) == [([*at_once, others[-1]], 2)] * 2


def save_for_others(folder: str) -> float:
    accelerator, model, *_ = set_up(2, seed=3)
    regional = accelerator.prepare(compile_regions(build("gpt2", seed=3), backend="eager"))
    for name, whole in {"plain": model, "regions": regional}.items():
        accelerator.unwrap_model(whole, keep_torch_compile=False).save_pretrained(
            f"{folder}/{name}", is_main_process=accelerator.is_main_process, save_function=accelerator.save
        )
    compiled = accelerator.prepare(torch.compile(build("gpt2", seed=3), backend="eager"))
    accelerator.save_model(compiled, f"{folder}/compiled")
    return loss_of("gpt2", model, microbatch("gpt2", 9, 4)).item()


def test_whole_weights_are_saved_for_others_compiled_or_not(pool: WorkerPool, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    loss = pool.run(save_for_others, str(tmp_path), world_size=4)[0]
    for name in ("plain", "regions", "compiled"):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / name)
        assert loss_of("gpt2", model, microbatch("gpt2", 9, 4)).item() == loss


# What is refused.


def build_with(environ: dict[str, str], **kwargs: Any) -> None:
    forget_accelerate()
    os.environ.update({"ACCELERATE_USE_CPU": "true", **environ})
    MiCSAccelerator(**kwargs)


def plugin_and_parallelism() -> None:
    build_with(
        {},
        mics_plugin=MiCSPlugin(shard_size=2),
        parallelism_config=ParallelismConfig(dp_shard_size=4, dp_replicate_size=1),
    )


def wrong_precision() -> None:
    build_with({}, mixed_precision="fp16")


def comm_hook() -> None:
    build_with({}, kwargs_handlers=[DistributedDataParallelKwargs(comm_hook="fp16")])


def join() -> None:
    accelerator = make_accelerator(1, {"shard_size": 2})
    with accelerator.join_uneven_inputs([]):
        pass


LAUNCH = {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}


def launch(**environ: str) -> None:
    build_with({**LAUNCH, **environ})


def wrong_replicas() -> None:
    launch(PARALLELISM_CONFIG_DP_REPLICATE_SIZE="3")


def tensor_parallel() -> None:
    launch(PARALLELISM_CONFIG_TP_SIZE="2")


def contradicting_variable() -> None:
    launch(MICS_SHARD_SIZE="4")


def first_version() -> None:
    launch(FSDP_VERSION="1")


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (plugin_and_parallelism, "MiCSConfigError", ("dp_shard_size=4", "shard_size=2")),
        (wrong_precision, "MiCSConfigError", ("mixed_precision='fp16'", "'bf16'")),
        (comm_hook, "MiCSConfigError", ("comm_hook", "reduce_dtype")),
        (join, "MiCSError", ("join_uneven_inputs", "even_batches=True")),
        (wrong_replicas, "MiCSConfigError", ("make 6 processes, but 4", "parallelism_config_dp_replicate_size: 2")),
        (tensor_parallel, "MiCSConfigError", ("parallelism_config_tp_size: 2", "parallelism_config_tp_size: 1")),
        (contradicting_variable, "MiCSConfigError", ("MICS_SHARD_SIZE=4", "parallelism_config_dp_shard_size: 2")),
        (first_version, "MiCSConfigError", ("fsdp_version: 1", "fsdp_version: 2")),
    ],
)
def test_bad_use_raises_on_every_rank(pool: WorkerPool, function: Any, kind: str, words: tuple[str, ...]) -> None:
    for failure in pool.attempt(function, world_size=4):
        assert failure.kind == kind, failure
        for word in words:
            assert word in failure.message, failure.message


# Where settings come from.


def test_settings_come_from_arguments_then_variables_then_the_launch_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = {**LAUNCH, "WORLD_SIZE": "4", "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true"}
    for name, value in file.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MICS_HIERARCHICAL", "false")
    monkeypatch.setenv("MICS_CPU_OFFLOAD", "false")
    plugin = MiCSPlugin(verify=False)
    assert (plugin.shard_size, plugin.reshard_after_forward, plugin.cpu_offload) == (2, False, False)
    assert (plugin.hierarchical, plugin.verify) == (False, False)
    assert MiCSPlugin(shard_size=4, hierarchical=True).config == plugin.config.replace(
        shard_size=4, hierarchical=True, verify=True
    )
    whole = MiCSPlugin(config=MiCSConfig(shard_size="world", reduce_dtype=None))
    assert (whole.shard_size, whole.reduce_dtype, whole.cpu_offload) == ("world", None, False)


def test_the_launch_files_class_names_become_units() -> None:
    settings = launched_settings({"FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer, GPT2Block"})
    assert settings == {"wrap": ["BertLayer", "GPT2Block"]}
    with pytest.raises(MiCSConfigError, match="divides 4"):
        launched_settings({**LAUNCH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "3", "WORLD_SIZE": "4"})


# The same checkpoint in other hands.


class Lit(pl.LightningModule):
    """Holds the model as ``self.model``, so that all names begin with ``model.``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = build("gpt2", seed)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return loss_of("gpt2", self.model, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: str, shard: int, steps: int, ckpt_path: str | None, full: bool = False) -> dict[str, Tensor]:
    data = TensorDataset(microbatch("gpt2", 5, 24))
    trainer = make_trainer(
        strategy=MiCSStrategy(shard_size=shard, save_distributed_checkpoint=not full), max_epochs=-1, max_steps=steps
    )
    ours = Lit(seed=6)
    trainer.fit(ours, DataLoader(data, batch_size=2), ckpt_path=ckpt_path)
    trainer.save_checkpoint(f"{folder}/lightning.ckpt")
    weights = full_state_dict(ours.model)
    for name, state in optimizer_state(ours, trainer.optimizers[0])["state"].items():
        for key, value in state.items():
            weights[f"{name.removeprefix('model.')}/{key}"] = (
                value.full_tensor() if isinstance(value, DTensor) else value.clone()
            )
    return weights


def load_from_lightning(folder: str) -> dict[str, Tensor]:
    accelerator, model, optimizer, *_ = set_up(4, seed=2)
    accelerator.load_state(f"{folder}/lightning.ckpt")
    return everything(model, optimizer.optimizer)


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_a_lightning_checkpoint_opens_under_accelerate(pool: WorkerPool, tmp_path: Path, full: bool) -> None:
    saved = pool.run(fit, str(tmp_path), 2, 2, None, full, world_size=4)[0]
    for loaded in pool.run(load_from_lightning, str(tmp_path), world_size=4):
        assert equal(loaded, saved)


def test_an_accelerate_checkpoint_opens_under_lightning(pool: WorkerPool, tmp_path: Path) -> None:
    saved, *_ = pool.run(save, str(tmp_path / "state"), 2, world_size=4)[0]
    # No step is left to take, so that what was loaded is saved as it is.
    for loaded in pool.run(fit, str(tmp_path), 4, 0, str(tmp_path / "state"), world_size=4):
        assert equal({name: loaded[name] for name in saved}, saved)
    trained = pool.run(fit, str(tmp_path), 4, 2, str(tmp_path / "state"), world_size=4)[0]
    assert not torch.equal(trained["transformer.wte.weight"], saved["transformer.wte.weight"])


@pytest.mark.parametrize(
    ("handlers", "offload", "made"),
    [
        ([], False, None),
        ([], True, "cpu:gloo,cuda:nccl"),
        ([InitProcessGroupKwargs(timeout=timedelta(seconds=9))], True, "cpu:gloo,cuda:nccl"),
        ([InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")], True, "cuda:nccl,cpu:gloo"),
    ],
)
def test_offload_asks_for_a_backend_for_host_memory(
    monkeypatch: pytest.MonkeyPatch, handlers: list[Any], offload: bool, made: str | None
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    options = {"kwargs_handlers": handlers}
    ask_for_backends(options, MiCSPlugin(cpu_offload=offload))
    found = [handler for handler in options["kwargs_handlers"] if isinstance(handler, InitProcessGroupKwargs)]
    assert [handler.backend for handler in found] == ([] if made is None else [made])
    assert [handler.timeout for handler in found if handlers] == [handler.timeout for handler in handlers]
    on_cpus: dict[str, Any] = {"kwargs_handlers": [], "cpu": True}
    ask_for_backends(on_cpus, MiCSPlugin(cpu_offload=True))
    assert on_cpus["kwargs_handlers"] == []
