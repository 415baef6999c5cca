"""Where weights may lie, what does not fit, and ranks that would read different things."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import object_storage  # noqa: F401  registers the protocol
import pytest
import torch
import torch.distributed as dist
from models import Regressor
from pretrained_tools import Reads, class_of_kind, saved
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_mics import CheckpointError, MiCSConfig, load_pretrained, mics_shard
from lightning_mics.core._torch import is_unread
from lightning_mics.pretrained.files import WeightsFile
from lightning_mics.pretrained.huggingface import reading_on_demand
from lightning_mics.testing import WorkerPool, full_state_dict

HUB = "someone/small-gpt2"


def on_meta(folder: Path) -> Any:
    cls = class_of_kind("gpt2")
    with torch.device("meta"):
        return cls(cls.config_class.from_pretrained(folder))


def load_from(folder: Path, source: str, environment: dict[str, str], settings: dict[str, Any]) -> dict[str, Tensor]:
    os.environ.update(environment)
    model = on_meta(folder)
    load_pretrained(model, source)
    assert all(map(is_unread, model.parameters()))
    with Reads() as reads:
        mics_shard(model, MiCSConfig(shard_size=2, **settings), device_type="cpu")
    if source.startswith("objects") and dist.get_rank() >= 2:
        assert reads.bytes == 0, "the first replica reads, and hands on"
    first = full_state_dict(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    load_pretrained(model, source)
    assert all(torch.equal(first[name], tensor) for name, tensor in full_state_dict(model).items())
    return first


def put_into_hub_cache(folder: Path, cache: Path) -> None:
    """Lays files out as a download of the hub does."""
    root = cache / f"models--{HUB.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")


@pytest.mark.parametrize("where", ["folder", "file URL", "hub", "object storage", "parts in object storage"])
def test_a_source(pool: WorkerPool, tmp_path: Path, where: str) -> None:
    folder = saved(tmp_path, "gpt2", max_shard_size="5KB" if "parts" in where else "1GB")
    expected = class_of_kind("gpt2").from_pretrained(folder).state_dict()
    environment: dict[str, str] = {}
    source = {"folder": str(folder), "file URL": f"file://{folder}", "hub": HUB}.get(where, "objects://bucket/model")
    if where == "hub":
        put_into_hub_cache(folder, tmp_path / "cache")
        results = pool.run(load_from_hub, folder, str(tmp_path / "cache"), world_size=4)
    else:
        if "object" in where:
            (tmp_path / "objects").mkdir()
            environment["OBJECTS_ROOT"] = str(tmp_path / "objects")
            for file in folder.iterdir():
                shutil.copy(file, tmp_path / "objects" / f"bucket%2Fmodel%2F{file.name}")
        results = pool.run(load_from, folder, source, environment, {}, world_size=4)
    for found in results:
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def load_from_hub(folder: Path, cache: str) -> dict[str, Tensor]:
    model = on_meta(folder)
    load_pretrained(model, HUB, local_files_only=True, cache_dir=cache)
    mics_shard(model, MiCSConfig(shard_size=2), device_type="cpu")
    return full_state_dict(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"param_dtype": "bfloat16", "optimizer_shard_size": "world", "master_weights": "owners"},
        {"cpu_offload": True},
        {"ignore": ["Embedding"]},
    ],
    ids=["masters", "offload", "whole"],
)
def test_a_setting(pool: WorkerPool, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = saved(tmp_path, "gpt2")
    expected = class_of_kind("gpt2").from_pretrained(folder).state_dict()
    for found in pool.run(load_from, folder, str(folder), {}, settings, world_size=4):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name


class Wrapped(nn.Module):
    """A model under another name, with something that files lack."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Regressor()
        self.inner.extra = nn.Linear(2, 2)


def into_plain_modules(folder: Path) -> tuple[dict[str, set[Any]], dict[str, Tensor], str]:
    with torch.device("meta"):
        model = Wrapped()
    told = load_pretrained(model, folder)
    mics_shard(model, MiCSConfig(shard_size=2), device_type="cpu")
    with pytest.raises(CheckpointError, match=r"other names than the model: there is blocks.0.down.bias"):
        load_pretrained(nn.Linear(2, 2), folder)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(nn.ModuleDict({"first": nn.Linear(7, 2)}), folder)
    return told, full_state_dict(model), str(error.value)


def test_a_model_of_ones_own(pool: WorkerPool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = Regressor().state_dict()
    save_file({**expected, "other": torch.ones(1)}, tmp_path / "weights.safetensors")
    results = pool.run(into_plain_modules, tmp_path, world_size=4)
    for told, found, error in results:
        assert told["missing_keys"] == {"inner.extra.weight", "inner.extra.bias"}
        assert told["unexpected_keys"] == {"inner.other"}
        assert all(torch.equal(found[f"inner.{name}"], tensor) for name, tensor in expected.items())
        assert torch.equal(found["inner.extra.weight"], results[0][1]["inner.extra.weight"])
        assert "first.bias has shape (8,) there and (2,) here" in error


def ranks_that_differ(folder: Path, other: Path, how: str) -> tuple[dict[str, Tensor] | str, int]:
    rank = dist.get_rank()
    with reading_on_demand():
        model = class_of_kind("gpt2").from_pretrained(other if how == "files" and rank == 3 else folder)
    if how == "reading" and rank == 2:
        model.transformer.wpe.weight.sum()
    if how == "writing" and rank in (0, 2):
        model.transformer.wpe.weight.data.fill_(rank + 1.0)
    try:
        with Reads() as reads:
            mics_shard(model, MiCSConfig(shard_size=2), device_type="cpu")
    except Exception as error:
        # Nothing was changed: what is unread can still be read.
        assert is_unread(model.transformer.h[0].ln_1.weight)
        model.transformer.h[0].ln_1.weight.sum()
        return f"{type(error).__name__}: {error}", 0
    return full_state_dict(model), reads.bytes


@pytest.mark.parametrize("how", ["files", "reading", "writing"])
def test_ranks_that_differ(pool: WorkerPool, tmp_path: Path, how: str) -> None:
    folder = saved(tmp_path, "gpt2")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tensors = class_of_kind("gpt2").from_pretrained(folder).state_dict()
    del tensors["lm_head.weight"]
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    for found, _ in pool.run(ranks_that_differ, folder, other, how, world_size=4):
        if how == "files":
            assert isinstance(found, str)
            assert re.match("MiCSConfigError: Ranks differ in the files of pretrained weights", found)
            continue
        assert isinstance(found, dict)
        wanted = {**tensors, **({"transformer.wpe.weight": torch.ones(16, 16)} if how == "writing" else {})}
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def what_does_not_fit(folder: Path) -> list[str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config.from_pretrained(folder, vocab_size=67)
    errors = []
    for load in (
        lambda: load_pretrained(GPT2LMHeadModel(config), folder),
        lambda: load_pretrained(on_meta(folder), folder.parent / "nothing"),
        lambda: load_pretrained(on_meta(folder), f"memory://{folder}"),
        lambda: load_pretrained(nn.Linear(2, 2), folder, revision="main"),
    ):
        with pytest.raises(CheckpointError) as error:
            load()
        errors.append(str(error.value))
    told = load_pretrained(GPT2LMHeadModel(config), folder, ignore_mismatched_sizes=True)
    assert {name for name, *_ in told["mismatched_keys"]} == {"transformer.wte.weight"}
    return errors


def test_what_does_not_fit_is_told_on_every_rank(pool: WorkerPool, tmp_path: Path) -> None:
    for errors in pool.run(what_does_not_fit, saved(tmp_path, "gpt2"), world_size=2):
        for error, says in zip(
            errors,
            ["shape (61, 16) there and (67, 16) here", "There is no ", "memory of one process", "revision="],
            strict=True,
        ):
            assert says in error


def test_a_reader_takes_parts_of_any_shape(tmp_path: Path) -> None:
    values = torch.arange(60).view(3, 4, 5)
    save_file({"cube": values, "number": torch.tensor(2.5), "none": torch.empty(0, 3)}, tmp_path / "a.safetensors")
    entries = WeightsFile(tmp_path / "a.safetensors").entries
    assert torch.equal(entries["cube"].read([1, 2, 0], [2, 1, 4]), values[1:3, 2:3, :4])
    assert torch.equal(entries["number"].read([], []), torch.tensor(2.5))
    assert entries["none"].read([0, 0], [0, 3]).shape == (0, 3)
