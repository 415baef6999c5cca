"""What public scripts do with a prepared model, beside Accelerate's own way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.local_sgd import LocalSGD
from accelerate_tools import lora, make_accelerator
from huggingface_hub import save_torch_state_dict
from models import build, loss_of, microbatch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from works import refused, works

from lightning_mics import Hop, MiCSError
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences


def train_with_no_sync(shards: tuple[int, ...]) -> float:
    """Trains as loops that know DDP do; returns the largest difference from one process."""
    worst = 0.0
    for shard in shards:
        for accumulate in (1, 3):
            accelerator = make_accelerator(settings={"shard_size": shard})
            world, rank = accelerator.num_processes, accelerator.process_index
            model, alone = build("uneven", seed=3), build("uneven", seed=3)
            optimizer, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone))
            model, optimizer = accelerator.prepare(model, optimizer)
            for window in range(2):
                for index in range(accumulate):
                    rows = [microbatch("uneven", (window * 3 + index) * world + other, 2) for other in range(world)]
                    if index + 1 < accumulate:
                        with model.no_sync():
                            accelerator.backward(loss_of("uneven", model, rows[rank]) / accumulate)
                    else:
                        accelerator.backward(loss_of("uneven", model, rows[rank]) / accumulate)
                    sum(loss_of("uneven", alone, part) / accumulate / world for part in rows).backward()  # type: ignore[union-attr]
                for step in (optimizer, reference):
                    step.step()
                    step.zero_grad()
            worst = max(worst, *weight_differences(full_state_dict(model), alone.state_dict()).values())
            ledger = accelerator.ledger(model)
            reduced = ledger.total(Hop.PARTITION_REDUCE).calls, ledger.total(Hop.REPLICATION_REDUCE).calls
            assert shard == world or shard == 1 or reduced[0] == accumulate * reduced[1], reduced
    return worst


@works("Training loops", "`model.no_sync()` after `accelerator.prepare`")
@pytest.mark.parametrize(("world", "shards"), [(2, (1, 2)), (4, (1, 2, 4))])
def test_no_sync_of_the_model_defers(pool: WorkerPool, world: int, shards: tuple[int, ...]) -> None:
    assert max(pool.run(train_with_no_sync, shards, world_size=world, timeout=120)) <= 1e-5


LOCAL_SGD = refused("Training loops", "Accelerate's `LocalSGD`", says="LocalSGD averages whole parameters")
AVERAGED = refused("Training loops", "`accelerator.reduce(param.data)`", says="accelerator.reduce was given shards")


def average_weights() -> tuple[str, str]:
    accelerator = make_accelerator(settings={"shard_size": 2})
    model = accelerator.prepare(build("uneven", seed=3))
    said = []
    for use in (
        lambda: LocalSGD(accelerator, model, local_sgd_steps=8),
        lambda: [accelerator.reduce(param.data, reduction="mean") for param in model.parameters()],
    ):
        with pytest.raises(Exception) as caught:  # words are checked below
            use()
        said.append(str(caught.value))
    with LocalSGD(accelerator, model, local_sgd_steps=8, enabled=False) as off:
        off.step()
    return said[0], said[1]


@LOCAL_SGD
@AVERAGED
def test_averages_of_shards_are_refused(pool: WorkerPool) -> None:
    for first, second in pool.run(average_weights, world_size=2):
        LOCAL_SGD.check(first)
        AVERAGED.check(second)


# Saving.


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(5)
    config = T5Config(
        vocab_size=101, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=0
    )
    return T5ForConditionalGeneration(config)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, tie_word_embeddings=True, **sizes))


def gpt2() -> nn.Module:
    return build("gpt2", 5)


TIED = {"t5": t5, "llama": llama, "gpt2": gpt2}


def save_tied(folder: str) -> None:
    for name, make in TIED.items():
        accelerator = make_accelerator(settings={"shard_size": 2})
        model = accelerator.prepare(make())
        accelerator.save_model(model, f"{folder}/{name}/save_model")
        accelerator.save_model(model, f"{folder}/{name}/bin", safe_serialization=False)
        accelerator.unwrap_model(model).save_pretrained(f"{folder}/{name}/save_pretrained")
        whole = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            torch.save(whole, f"{folder}/{name}/whole.pt")


def save_alone(folder: str, shard: int) -> list[str]:
    accelerator = make_accelerator(settings={"shard_size": shard, "node_size": 1})
    model = accelerator.prepare(gpt2())
    entries = [
        lambda: accelerator.save(model.state_dict(), f"{folder}/a"),
        lambda: torch.save(model.state_dict(), f"{folder}/b"),
        lambda: model.save_pretrained(f"{folder}/c"),
        lambda: accelerator.get_state_dict(model),
    ]
    said = []
    for entry in entries:
        if accelerator.is_main_process:
            try:
                entry()
            except MiCSError as error:
                said.append(str(error))
        dist.barrier()
    return said


@works("Savers", "Whole weights on the main process alone, with shard_size=1")
def test_savers_that_the_main_process_calls_alone(pool: WorkerPool, tmp_path: Path) -> None:
    said, nothing = pool.run(save_alone, str(tmp_path), 2, world_size=2)
    names = ["accelerator.save", "saving a sharded tensor", "GPT2LMHeadModel.save_pretrained", "accelerator.get_state"]
    assert nothing == [] and len(said) == len(names)
    for words, name in zip(said, names, strict=True):
        assert words.startswith(name) and "was called on rank 0 and not on rank 1" in words
    assert pool.run(save_alone, str(tmp_path), 1, world_size=2) == [[], []]


def bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}.values())


@works("Savers", "Tied weights are written once (`save_pretrained`, `save_model`)")
@works("Savers", "`accelerator.save_model` for `from_pretrained`")
def test_tied_weights_are_written_once(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(save_tied, str(tmp_path), world_size=4, timeout=120)
    for name, make in TIED.items():
        model = make()
        for way in ("save_model", "save_pretrained"):
            folder = tmp_path / name / way
            config = json.loads((folder / "config.json").read_text())
            assert config["architectures"] == [type(model).__name__]
            assert (folder / "generation_config.json").is_file()
            with safe_open(folder / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
                written = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            assert sum(tensor.nbytes for tensor in written.values()) == bytes_of(dict(model.named_parameters()))
            read = type(model).from_pretrained(folder)
            assert all(torch.equal(value, read.state_dict()[key]) for key, value in model.state_dict().items())
        for file in ("whole.pt", "bin/pytorch_model.bin"):
            whole = torch.load(tmp_path / name / file)
            assert whole.keys() == model.state_dict().keys() and bytes_of(whole) == bytes_of(model.state_dict())


def save_adapters(folder: str) -> None:
    accelerator = make_accelerator(settings={"shard_size": 2})
    model = accelerator.prepare(lora(build("gpt2", 5)))
    accelerator.save_model(model, f"{folder}/whole")
    accelerator.unwrap_model(model).save_pretrained(f"{folder}/adapter")


def test_save_model_of_adapters_writes_all_weights(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(save_adapters, str(tmp_path), world_size=2)
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        assert any("base_layer" in key for key in file.keys())  # noqa: SIM118
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


class Diffuser(nn.Module):
    """Saves as the models of diffusers do, and as some others."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("tied", 4)
        self.config = {"width": 8}

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)  # type: ignore[no-any-return]

    def save_pretrained(self, folder: str, is_main_process: bool = True, max_shard_size: str = "10GB") -> None:
        if is_main_process:
            Path(folder).mkdir(parents=True)  # fails where two processes write
            save_torch_state_dict(self.state_dict(), folder, max_shard_size=max_shard_size)

    def save(self, path: str) -> None:
        """Every rank writes its own file."""
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().clone() for k, v in self.net.state_dict().items()}, f"{path}/{dist.get_rank()}")

    def keep(self, path: str) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        torch.save({"weights": self.net.state_dict(), "step": 3}, f"{path}/{dist.get_rank()}")


class Pipeline(nn.Module):
    """Saves by the modules inside of it, as sentence-transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = gpt2()
        self.dense = nn.Linear(8, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.dense(self.encoder(rows, output_hidden_states=True).hidden_states[-1])  # type: ignore[no-any-return]

    def save_to_disk(self, folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        self.encoder.save_pretrained(f"{folder}/encoder")
        save_model(self.dense, f"{folder}/{dist.get_rank()}-dense.safetensors")


def save_their_way(folder: str, shard: int) -> None:
    accelerator = make_accelerator(settings={"shard_size": shard})
    rank = accelerator.process_index
    model = accelerator.prepare(Diffuser())
    model.save_pretrained(f"{folder}/a", is_main_process=accelerator.is_main_process)
    accelerator.unwrap_model(model).save_pretrained(f"{folder}/b")
    model.save(f"{folder}/c")
    model.keep(f"{folder}/d")
    Path(f"{folder}/e").mkdir(exist_ok=True)
    torch.save(model.net.state_dict(), f"{folder}/e/{rank}")
    save_model(model.net, f"{folder}/e/{rank}.safetensors")
    accelerator.save(model.net.state_dict(), f"{folder}/f.pt")
    pipeline = accelerator.prepare(Pipeline())
    pipeline.save_to_disk(f"{folder}/g")
    # What is asked for otherwise has shards, which write through; and whole weights are taken.
    assert all(isinstance(value, DTensor) for value in model.net.state_dict().values())
    whole = {name: value * 2 for name, value in torch.load(f"{folder}/e/{rank}").items()}
    model.net.load_state_dict(whole)
    assert all(torch.equal(value, whole[name]) for name, value in full_state_dict(model.net).items())
    copied = copy.deepcopy(model.net.state_dict())
    assert all(torch.equal(value.full_tensor(), whole[name]) for name, value in copied.items())


@works("Savers", "`save_pretrained` of models like those of diffusers")
@works("Savers", "Methods that save by `self.state_dict()` or by modules inside")
@works("Savers", "`torch.save(model.state_dict())` on every rank after `accelerator.prepare`")
@works("Savers", "`safetensors.torch.save_model`")
@works("Savers", "`accelerator.save(model.state_dict())`")
@works("Savers", "`model.load_state_dict` of whole weights after `accelerator.prepare`")
@pytest.mark.parametrize(("world", "shard"), [(2, 1), (2, 2), (4, 2)])
def test_whatever_saves_gets_whole_weights(pool: WorkerPool, tmp_path: Path, world: int, shard: int) -> None:
    pool.run(save_their_way, str(tmp_path), shard, world_size=world, timeout=120)
    expected = Diffuser().state_dict()
    inner = {name.removeprefix("net."): value for name, value in expected.items()}

    def check(actual: dict[str, Tensor], wanted: dict[str, Tensor], *, all_names: bool = True) -> None:
        assert actual.keys() == wanted.keys() if all_names else actual.keys() <= wanted.keys()
        assert type(next(iter(actual.values()))) is Tensor
        assert all(torch.equal(value, wanted[name]) for name, value in actual.items())
        assert bytes_of(actual) == bytes_of(wanted)

    for name in ("a", "b"):
        check(load_file(tmp_path / name / "model.safetensors"), expected, all_names=False)
    check(torch.load(tmp_path / "f.pt"), inner)
    for rank in range(world):
        whole = load_file(tmp_path / "c" / str(rank))
        assert all(torch.equal(whole[name], value) for name, value in inner.items())
        kept = torch.load(tmp_path / "d" / str(rank))
        assert kept["step"] == 3
        check(kept["weights"], inner)
        check(torch.load(tmp_path / "e" / str(rank)), inner)
        check(load_file(tmp_path / "e" / f"{rank}.safetensors"), inner, all_names=False)
        check(load_file(tmp_path / "g" / f"{rank}-dense.safetensors"), Pipeline().dense.state_dict())
    encoder = type(gpt2()).from_pretrained(tmp_path / "g" / "encoder")
    check(encoder.state_dict(), Pipeline().encoder.state_dict())


def save_by_hooks(folder: str) -> None:
    accelerator = make_accelerator(settings={"shard_size": 2})
    model = accelerator.prepare(Diffuser())

    class Average:
        """Keeps shards, and is registered."""

        def state_dict(self) -> dict[str, Any]:
            return {"average": model.net.state_dict(), "steps": 7}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded = state

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            for entry in models:
                entry.save_pretrained(f"{folder}/unet")
                weights.pop()

    accelerator.register_save_state_pre_hook(save)
    average = Average()
    accelerator.register_for_checkpointing(average)
    accelerator.save_state(f"{folder}/state")
    accelerator.register_load_state_pre_hook(lambda models, folder: models.pop())
    accelerator.load_state(f"{folder}/state")
    assert average.loaded["steps"] == 7
    expected = model.net.state_dict()
    assert all(torch.equal(average.loaded["average"][name].to_local(), expected[name].to_local()) for name in expected)


@works("Savers", "Hooks of `save_state` that save on the main process alone (diffusers' scripts)")
def test_hooks_save_on_the_main_process(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(save_by_hooks, str(tmp_path), world_size=4)
    whole, expected = load_file(tmp_path / "state" / "unet" / "model.safetensors"), Diffuser().state_dict()
    assert whole and all(torch.equal(value, expected[name]) for name, value in whole.items())
