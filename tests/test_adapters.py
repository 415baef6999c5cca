"""Adapters of PEFT: each form beside one process that sees the global batch, and read by plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adapter_tools import FORMS, adapted, base, logits, settings, train
from models import language_loss
from torch import Tensor, nn
from way_tools import WAYS, alone, sgd
from works import refused, works

from lightning_mics import MiCSConfig, MiCSError, mics_shard
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BOUND = 1e-6


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(weight_differences(found, expected).values())


def form(name: str, kind: str, folder: str) -> list[float]:
    """Trains a form at p=2 and p=4, and writes what plain PEFT is to read."""
    plain = adapted(name, kind)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    train(plain, 0)
    expected = plain.state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in expected.items())
    found = []
    for shard_size in (2, 4):
        model = mics_shard(adapted(name, kind), MiCSConfig(shard_size=shard_size))
        train(model, 0, dist.get_rank())
        found.append(worst(full_state_dict(model), expected))
    saved: Any = model
    saved.save_pretrained(f"{folder}/adapter")
    left = saved.merge_and_unload()
    merged = logits(left)
    left.save_pretrained(f"{folder}/merged")
    if dist.get_rank() == 0:
        torch.save((logits(plain), merged), f"{folder}/logits.pt")
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", kind) for kind in FORMS]
    + [("gpt2", kind) for kind in ("DoRA", "DoRA on an embedding", "a head of its own")]
    + [("bert", kind) for kind in ("LoRA on an embedding", "trainable tokens, tied")],
)
def test_forms(pool: WorkerPool, tmp_path: Path, name: str, kind: str) -> None:
    from peft import PeftModel

    for found in pool.run(form, name, kind, str(tmp_path), world_size=4, timeout=120):
        assert max(found) <= BOUND
    expected, merged = torch.load(tmp_path / "logits.pt")
    model: Any = base(name)
    read = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(read), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged, logits(read.merge_and_unload()), atol=1e-5, rtol=1e-5)
    whole = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(whole), merged, atol=1e-5, rtol=1e-5)


for _kind in list(FORMS)[2:]:
    test_forms = works("Model kinds", f"PEFT: {_kind}")(test_forms)


def switch(model: Any, rank: int | None) -> Any:
    for step, name in enumerate(("one", "two", "one")):
        model.set_adapter(name)
        train(model, 2 * step, rank)
    return model


def both(model: Any, rank: int | None) -> Any:
    model.base_model.set_adapter(["one", "two"])
    train(model, 0, rank)
    return model


def mix(model: Any, rank: int | None) -> Any:
    train(model, 0, rank)
    for way in ("linear", "cat", "svd"):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.3], way, combination_type=way)
    model.set_adapter("linear")
    train(model, 2, rank)
    return model


def add(kind: str) -> Callable[[Any, int | None], Any]:
    def add(model: Any, rank: int | None) -> Any:
        train(model, 0, rank)
        torch.manual_seed(9 + (rank or 0))  # rank 0's values win
        model.add_adapter("three", settings("gpt2", kind))
        model.set_adapter("three")
        train(model, 2, rank)
        return model

    return add


def merge(model: Any, rank: int | None) -> Any:
    train(model, 0, rank)
    model.merge_adapter()
    model.merged = logits(model)
    model.unmerge_adapter()
    train(model, 2, rank)
    return model


def go_on_without(model: Any, rank: int | None) -> Any:
    left = model.merge_and_unload()
    left.requires_grad_(True)
    del model
    train(left, 2, rank)
    return left


ACTS = {
    "set_adapter in mid-training": ("llama", "LoRA", switch),
    "several adapters at once": ("llama", "LoRA", both),
    "add_weighted_adapter": ("gpt2", "LoRA", mix),
    "add_adapter after sharding": ("gpt2", "LoRA", add("LoRA")),
    "add_adapter after sharding: DoRA": ("gpt2", "LoRA", add("DoRA")),
    "add_adapter after sharding: a head of its own": ("gpt2", "LoRA", add("a head of its own")),
    "add_adapter after sharding: trainable tokens": ("gpt2", "LoRA", add("trainable tokens")),
    "merge_adapter and unmerge_adapter": ("llama", "DoRA", merge),
    "merge_adapter and unmerge_adapter: trainable tokens": ("bert", "trainable tokens", merge),
    "Training what merge_and_unload returns": ("gpt2", "LoRA", go_on_without),
    "Training what merge_and_unload returns: tied trainable tokens": (
        "bert",
        "trainable tokens, tied",
        go_on_without,
    ),
}


def acted(act: str) -> list[float]:
    name, kind, do = ACTS[act]
    names = ("one", "two") if kind == "LoRA" else ("one",)
    plain = do(adapted(name, kind, names), None)
    found = []
    for shard_size in (2, 4):
        model = do(mics_shard(adapted(name, kind, names), MiCSConfig(shard_size=shard_size)), dist.get_rank())
        found.append(worst(full_state_dict(model), plain.state_dict()))
        if hasattr(plain, "merged"):
            found.append((model.merged - plain.merged).abs().max().item())
    return found


MERGES_TOKENS = ("merge_adapter and unmerge_adapter: trainable tokens", "Training what merge_and_unload returns: tied")


@pytest.mark.parametrize("act", [pytest.param(act, marks=works("Training loops", f"PEFT: {act}")) for act in ACTS])
def test_adapters_come_and_go(pool: WorkerPool, act: str) -> None:
    if act.startswith(MERGES_TOKENS) and torch.__version__ < "2.13":
        pytest.skip("shards have no index_copy in this torch")
    for found in pool.run(acted, act, world_size=4, timeout=120):
        assert max(found) <= BOUND, found


class Combined(nn.Module):
    """Most forms in one model, of the rows that every way in is given."""

    def __init__(self) -> None:
        super().__init__()
        from peft import get_peft_model

        config = settings("llama", "trainable tokens, tied")
        config.use_dora, config.modules_to_save = True, ["norm"]
        self.model: Any = get_peft_model(base("llama"), config)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": language_loss(self.model, (rows * 7).long().abs() % 23)}


def combined(way: str, folder: str) -> float:
    torch.manual_seed(0)
    plain = Combined()
    expected = alone(plain, sgd, 2)
    torch.manual_seed(0)
    trained: Any = WAYS[way](Combined(), sgd, 2, {"shard_size": 2})
    trained.model.save_pretrained(folder)
    if dist.get_rank() == 0:
        torch.save(logits(plain.model), f"{folder}/logits.pt")
    return worst(full_state_dict(trained), expected)


@works("Model kinds", "DoRA, trainable tokens and `modules_to_save` in one model, in every way in")
@works("Savers", "`save_pretrained` of PEFT in every way in, on every rank")
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_in(pool: WorkerPool, tmp_path: Path, way: str) -> None:
    from peft import PeftModel

    assert max(pool.run(combined, way, str(tmp_path), world_size=4, timeout=120)) <= BOUND
    read = PeftModel.from_pretrained(base("llama"), tmp_path)
    torch.testing.assert_close(logits(read), torch.load(tmp_path / "logits.pt"), atol=1e-5, rtol=1e-5)


PISSA = refused(
    "Training loops",
    "PEFT: add_adapter after sharding, `init_lora_weights='pissa'`",
    says="Add the adapter before the model is sharded",
)


def add_factors() -> str:
    model: Any = mics_shard(adapted("gpt2", "LoRA"), MiCSConfig(shard_size=2))
    config = settings("gpt2", "LoRA")
    config.init_lora_weights = "pissa"
    with pytest.raises(MiCSError) as error:
        model.add_adapter("factors", config)
    assert list(model.peft_config) == ["default"]
    train(model, 0, dist.get_rank(), world=2)  # it goes on
    return str(error.value)


@PISSA
def test_factors_of_weights_are_refused_later(pool: WorkerPool) -> None:
    for message in pool.run(add_factors, world_size=2):
        PISSA.check(message)


def wrapped(name: str, kind: str) -> float:
    plain = adapted(name, kind)
    train(plain, 0)
    model = mics_shard(adapted(name, kind), MiCSConfig(shard_size=4, wrap=[nn.Linear, nn.Embedding]))
    train(model, 0, dist.get_rank())
    return worst(full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("kind", ["DoRA", "trainable tokens, tied"])
def test_layers_that_adapters_read_are_no_units(pool: WorkerPool, kind: str) -> None:
    assert max(pool.run(wrapped, "llama", kind, world_size=4)) <= BOUND


def halves() -> float:
    """A bfloat16 model with float32 adapters on its embedding, and a bfloat16 head."""
    from peft import get_peft_model

    def make() -> nn.Module:
        config = settings("llama", "a head of its own")
        config.target_modules |= {"embed_tokens"}
        torch.manual_seed(1)
        made: nn.Module = get_peft_model(base("llama").bfloat16(), config)
        return made

    plain = make()
    train(plain, 0)
    model = mics_shard(make(), MiCSConfig(shard_size=2))
    train(model, 0, dist.get_rank())
    return worst(full_state_dict(model), plain.state_dict())


def test_adapters_of_another_dtype(pool: WorkerPool) -> None:
    assert max(pool.run(halves, world_size=4)) <= 2e-2
