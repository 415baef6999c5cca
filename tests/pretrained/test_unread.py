"""Unread parameters: whatever a script does to them, it is as if ``from_pretrained`` had loaded them."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_tools import class_of_kind, inputs, saved
from torch import Tensor, nn

from lightning_mics import CheckpointError, MiCSError, load_pretrained
from lightning_mics.accelerate.plugin import take_over_launch
from lightning_mics.core._torch import is_unread
from lightning_mics.pretrained.huggingface import reading_on_demand
from lightning_mics.testing import WorkerPool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("saved"), "gpt2")


def unread(folder: Path, **options: Any) -> Any:
    with reading_on_demand():
        model = class_of_kind("gpt2").from_pretrained(folder, **options)
    assert all(map(is_unread, model.parameters()))
    return model


def add_half(param: Tensor) -> None:
    param.data.add_(0.5)


def through_view(model: Any) -> None:
    model.transformer.wte.weight.data[3].fill_(7.0)


def through_alias(model: Any) -> None:
    alias = model.state_dict()["transformer.wte.weight"]
    alias.mul_(3.0)
    alias[0] = 1.0


def rounded_twice(model: Any) -> None:
    model.half().float()


def new_head(model: Any) -> None:
    torch.manual_seed(1)
    nn.init.normal_(model.transformer.h[0].mlp.c_fc.weight)


def by_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs("gpt2")).logits.square().mean().backward()
    optimizer.step()


def assigned(model: Any) -> None:
    model.transformer.ln_f.weight = nn.Parameter(model.transformer.ln_f.weight * 2)
    model.transformer.h[1].ln_1.weight.data = torch.ones(16)


def untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight.data.zero_()


def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model(**inputs("gpt2"))
    by_optimizer(model)


CHANGES: list[Callable[[Any], object]] = [
    lambda model: [add_half(param) for param in model.parameters()],
    through_view,
    through_alias,
    rounded_twice,
    new_head,
    by_optimizer,
    assigned,
    untied,
    in_inference_mode,
    lambda model: model.resize_token_embeddings(67, mean_resizing=False),
    lambda model: model.resize_token_embeddings(50),
    lambda model: model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}),
    lambda model: nn.utils.parametrizations.weight_norm(model.transformer.h[0].mlp.c_fc),
    lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()) * 2, model.parameters()
    ),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.requires_grad_(False),
    lambda model: [param.clamp_(-0.1, 0.1) for param in model.requires_grad_(False).parameters()],
    lambda model: torch._foreach_mul_([param.data for param in model.parameters()], 0.5),
    lambda model: model.share_memory(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_sharding_counts(folder: Path, change: Callable[[Any], object]) -> None:
    expected, model = class_of_kind("gpt2").from_pretrained(folder), unread(folder)
    for each in (expected, model):
        torch.manual_seed(2)
        change(each)
    wanted, found = dict(expected.named_parameters()), dict(model.named_parameters())
    assert list(wanted) == list(found)
    for name, param in wanted.items():
        assert found[name].requires_grad == param.requires_grad
        assert found[name].dtype == param.dtype
        assert torch.equal(found[name].data, param.data), name
    assert expected.lm_head.weight is expected.transformer.wte.weight or change is untied


@pytest.mark.parametrize(
    "make",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: torch_saved(model)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_models_of_their_own(folder: Path, make: Callable[[Any], Any]) -> None:
    model, expected = unread(folder), class_of_kind("gpt2").from_pretrained(folder)
    made = make(model)
    assert made.lm_head.weight is made.transformer.wte.weight
    made.transformer.wte.weight.data.zero_()
    assert torch.equal(model.transformer.wte.weight, expected.transformer.wte.weight)
    assert torch.equal(made.transformer.h[0].ln_1.weight, expected.transformer.h[0].ln_1.weight)


def torch_saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_what_reads_nothing(folder: Path) -> None:
    model = unread(folder)
    expected = class_of_kind("gpt2").from_pretrained(folder)
    assert model.num_parameters() == expected.num_parameters()
    assert (model.dtype, model.device) == (expected.dtype, expected.device)
    assert model.get_memory_footprint() == expected.get_memory_footprint()
    torch.optim.AdamW(model.parameters())
    model.gradient_checkpointing_enable()
    model.to("cpu").train().requires_grad_(True).state_dict()
    copy.deepcopy(model.to(torch.float64))
    assert all(map(is_unread, model.parameters()))


def test_a_saved_model_is_that_which_was_loaded(folder: Path, tmp_path: Path) -> None:
    unread(folder).save_pretrained(tmp_path / "again")
    expected = class_of_kind("gpt2").from_pretrained(folder).state_dict()
    found = class_of_kind("gpt2").from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_files_that_go_or_change(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "gone")
    model = unread(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    assert torch.equal(model.lm_head.weight, class_of_kind("gpt2").from_pretrained(folder).lm_head.weight)
    shutil.copytree(folder, tmp_path / "changed")
    model = unread(tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="has changed since the model was made of it"):
        model.lm_head.weight.sum()


def test_generation_and_adapters_on_unread_weights(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    made = []
    for model in (class_of_kind("gpt2").from_pretrained(folder), unread(folder)):
        torch.manual_seed(4)
        options = {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True}
        adapted = get_peft_model(model, LoraConfig(**options))
        number = sum(map(is_unread, adapted.parameters()))
        made.append({name: param.detach().clone() for name, param in adapted.named_parameters()})
        made.append(adapted.generate(inputs("gpt2")["input_ids"], max_new_tokens=4, do_sample=False))
    assert number == 29  # 28 of the model, and the copy of its head
    for name, tensor in made[0].items():
        assert torch.equal(made[2][name], tensor), name
    assert torch.equal(made[1], made[3])


def test_who_holds_weights_in_another_way(folder: Path, pool: WorkerPool) -> None:
    model = unread(folder)
    held = weakref.ref(model.lm_head.weight)
    with pytest.raises(MiCSError, match="FSDP_CPU_RAM_EFFICIENT_LOADING=false"):
        held().sum()
    expected = class_of_kind("gpt2").from_pretrained(folder)
    assert pool.run(in_ddp, folder, world_size=2) == [expected(**inputs("gpt2")).logits.sum().item()] * 2


def in_ddp(folder: Path) -> float:
    model = nn.parallel.DistributedDataParallel(unread(folder))
    loss = model(**inputs("gpt2")).logits.sum()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("damage", ["cut", "header", "text", "part"])
def test_damaged_files_are_told(folder: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = file.read_bytes()
    if damage == "part":
        file.rename(tmp_path / "model" / "a.safetensors")
        (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "b.safetensors"}}')
    else:
        file.write_bytes(
            {"cut": content[:-9], "header": b"\xff" * 8 + content[8:], "text": b"version https://git-lfs"}[damage]
        )
    says = "lists b.safetensors" if damage == "part" else "damaged or not a safetensors file"
    with pytest.raises(CheckpointError, match=says):
        load_pretrained(nn.Linear(2, 2), tmp_path / "model")


def test_one_process_of_several_reads_its_part_and_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was launched in this process before: what counts is how many there are, and what the user wants."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for world_size, wanted, waits in (("2", "true", True), ("2", "false", False), ("1", "true", False)):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", wanted)
        take_over_launch()
        model = class_of_kind("gpt2").from_pretrained(folder)
        assert {is_unread(param) for param in model.parameters()} == {waits}
