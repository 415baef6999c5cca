"""Pretrained weights into shards: what ``from_pretrained`` loads in one process, read by each rank in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_tools import Reads, class_of_kind, inputs, saved
from torch import Tensor, nn

from lightning_mics import MiCSConfig, load_pretrained, mics_shard
from lightning_mics.core._torch import is_unread
from lightning_mics.pretrained.huggingface import reading_on_demand
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

WORLD = 4
KINDS = ("gpt2", "bert", "t5", "llama", "mixtral")


def outcome(model: nn.Module, kind: str) -> dict[str, Tensor]:
    with torch.no_grad():
        logits = model.eval()(**inputs(kind)).logits
    return {"logits": logits, **full_state_dict(model)}


def on_demand(folder: Path, kind: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], int, int]:
    torch.manual_seed(5)
    with reading_on_demand():
        model = class_of_kind(kind).from_pretrained(folder, **options)
    assert any(map(is_unread, model.parameters()))
    bytes_of_model = sum(param.nbytes for param in model.parameters() if is_unread(param))
    with Reads() as reads:
        mics_shard(model, MiCSConfig(shard_size=2), device_type="cpu")
    assert not any(map(is_unread, model.parameters()))
    return outcome(model, kind), reads.bytes, bytes_of_model


def by_load_pretrained(folder: Path, kind: str, first: bool) -> dict[str, Tensor]:
    """Loads into a model on the meta device, before it is sharded or after."""
    torch.manual_seed(5)
    cls = class_of_kind(kind)
    with torch.device("meta"):
        model = cls(cls.config_class.from_pretrained(folder))
    if first:
        told = load_pretrained(model, folder)
        torch.manual_seed(6)  # nothing that is read may be initialised
    mics_shard(model, MiCSConfig(shard_size=2), device_type="cpu")
    if not first:
        told = load_pretrained(model, folder)
    assert told["missing_keys"] == ({"classifier.weight", "classifier.bias"} if kind == "bert" else set())
    found = outcome(model, kind)
    return {name: tensor for name, tensor in found.items() if "classifier" not in name and name != "logits"} | (
        {} if kind == "bert" else {"logits": found["logits"]}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_what_from_pretrained_loads(pool: WorkerPool, tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path, kind, **({"max_shard_size": "6KB"} if kind == "llama" else {}))
    assert kind != "llama" or len(list(folder.glob("*.safetensors"))) >= 3
    torch.manual_seed(5)
    expected = outcome(class_of_kind(kind).from_pretrained(folder), kind)
    for found, read, whole in pool.run(on_demand, folder, kind, {}, world_size=WORLD):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if name != "logits")
        assert_parity({"logits": found["logits"]}, {"logits": expected["logits"]}, 1e-6)
        # Half the rows; of an odd number one more, and of samples a few bytes.
        assert read < 0.8 * whole
    for first in (True, False):
        for found in pool.run(by_load_pretrained, folder, kind, first, world_size=WORLD):
            assert_parity(found, {name: tensor for name, tensor in expected.items() if name in found}, 1e-6)


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_files_in_another_dtype(pool: WorkerPool, tmp_path: Path, stored: str, wanted: str) -> None:
    folder = saved(tmp_path, "llama", dtype=getattr(torch, stored))
    options = {"dtype": getattr(torch, wanted)}
    expected = class_of_kind("llama").from_pretrained(folder, **options).state_dict()
    for found, _, _ in pool.run(on_demand, folder, "llama", options, world_size=WORLD):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert found["model.norm.weight"].dtype == options["dtype"]
