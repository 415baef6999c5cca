"""Frozen weights of 4 or 8 bits under adapters: sharded, and equal to one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from adapter_tools import logits, quantized, train
from models import language_loss
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from way_tools import WAYS, alone, sgd
from works import refused, works

from lightning_mics import MiCSConfig, MiCSError, mics_shard
from lightning_mics.checkpoint import load_checkpoint, save_checkpoint
from lightning_mics.core import quantized as core_quantized
from lightning_mics.core._torch import shards_integers
from lightning_mics.errors import MiCSConfigError
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BOUND = 1e-6
shards_them = pytest.mark.skipif(not shards_integers(), reason="FSDP2 of this torch shards no integers")
KINDS = (
    "own int8",
    "torchao int8",
    "torchao nf4",
    "bitsandbytes 4",
    "bitsandbytes 4 in bfloat16",
    "bitsandbytes 8",
)


def adapted(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = quantized(kind, dtype)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], **options}))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return model


def adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "lora_" in name}


def frozen(model: nn.Module) -> Iterator[DTensor]:
    return (param for param in model.parameters() if isinstance(param, DTensor) and not param.requires_grad)


def whole_bytes(kind: str) -> int:
    """Returns the bytes of the frozen base before sharding, tables of values included."""
    tensors = [param for param in quantized(kind).parameters()]
    if kind != "own int8":
        return 0
    inner = [[t.values, t.scales] if hasattr(t, "scales") else [t] for t in tensors]
    return sum(part.nbytes for parts in inner for part in parts)


def trained(kind: str, folder: str) -> dict[str, Any]:
    plain = adapted(kind)
    train(plain, 0)
    found: dict[str, Any] = {"differences": []}
    for shard_size in (2, 4):
        model = mics_shard(adapted(kind), MiCSConfig(shard_size=shard_size))
        train(model, 0, dist.get_rank())
        weights = adapters(full_state_dict(model))
        found["differences"] += weight_differences(weights, adapters(plain.state_dict())).values()
        save_checkpoint(f"{folder}/{shard_size}", model)
    found["base"] = sum(param.nbytes for param in frozen(model))
    found["here"] = sum(param.to_local().nbytes for param in frozen(model))
    found["small"] = sum(buffer.nbytes for name, buffer in model.named_buffers() if "parametrizations" in name)
    found["whole"] = whole_bytes(kind)
    model.save_pretrained(f"{folder}/adapter")
    resumed = mics_shard(adapted(kind), MiCSConfig(shard_size=4))
    load_checkpoint(f"{folder}/2", resumed)
    found["resumed"] = max(weight_differences(full_state_dict(resumed), full_state_dict(model)).values())
    if dist.get_rank() == 0:
        torch.save(logits(plain), f"{folder}/logits.pt")
    return found


@shards_them
@works("Model kinds", "A frozen base of 4 or 8 bits")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_sharded(pool: WorkerPool, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    if kind.partition(" ")[0] != "own":
        pytest.importorskip(kind.partition(" ")[0])
    for found in pool.run(trained, kind, str(tmp_path), world_size=4, timeout=120):
        assert max(found["differences"]) <= BOUND and found["resumed"] <= BOUND
        assert 4 * found["here"] == found["base"] and found["small"] <= 16 * 1024
        assert not found["whole"] or found["base"] + found["small"] == found["whole"]
    read = PeftModel.from_pretrained(quantized(kind), tmp_path / "adapter").train()
    torch.testing.assert_close(logits(read), torch.load(tmp_path / "logits.pt"), atol=1e-5, rtol=1e-5)


class Net(nn.Module):
    """A quantized base with adapters, of the rows that every way in is given."""

    def __init__(self) -> None:
        super().__init__()
        self.model = adapted("own int8")

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": language_loss(self.model, (rows * 7).long().abs() % 23)}


def by_way(way: str) -> float:
    """The optimizer holds the frozen weights too, and is made before they are taken apart in most ways."""
    expected = adapters(alone(Net(), sgd, 2))
    trained = WAYS[way](Net(), sgd, 2, {"shard_size": 2})
    return max(weight_differences(adapters(full_state_dict(trained)), expected).values())


@shards_them
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_in(pool: WorkerPool, way: str) -> None:
    assert max(pool.run(by_way, way, world_size=4, timeout=120)) <= BOUND


def of_other_dtypes() -> float:
    """Mixed precision casts neither values nor scales."""
    config = MiCSConfig(shard_size=2, param_dtype="bfloat16")
    model = mics_shard(adapted("own int8"), config)
    kept = {param.dtype for name, param in model.named_parameters() if "parametrizations" in name}
    assert kept == {torch.int8, torch.int32}
    gathered: list[Tensor] = []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.base_layer.register_forward_hook(lambda module, *_: gathered.append(module.weight.scales.clone()))
    with torch.autocast("cpu", torch.bfloat16):
        train(model, 0, dist.get_rank(), world=2)
    expected = quantized("own int8").model.layers[0].mlp.up_proj.weight.scales
    return (gathered[0] - expected).abs().max().item()


@shards_them
def test_mixed_precision_leaves_scales_alone(pool: WorkerPool) -> None:
    assert pool.run(of_other_dtypes, world_size=2) == [0.0, 0.0]


MERGED = refused("Training loops", "PEFT: merging into sharded 4- or 8-bit weights", says="merge them in one process")
PLANNED = refused("Model kinds", "4- or 8-bit weights with `shard_size='auto'`", says="does not plan weights of 4 or 8")
TRAINED = refused("Model kinds", "4- or 8-bit weights that are trained", says="of 4 or 8 bits, is to be trained")


def refuse() -> list[str]:
    says = []
    model: Any = adapted("own int8")
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(MiCSConfigError) as error:
        mics_shard(model, MiCSConfig(shard_size=2))
    says.append(str(error.value))
    with pytest.raises(MiCSConfigError) as error:
        mics_shard(adapted("own int8"), MiCSConfig(shard_size="auto"))
    says.append(str(error.value))
    model = mics_shard(adapted("own int8"), MiCSConfig(shard_size=2))
    for name in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(MiCSError) as refusal:
            getattr(model, name)()
        says.append(str(refusal.value))
    train(model, 0, dist.get_rank(), world=2)
    model.unload()
    return says


@shards_them
@MERGED
@PLANNED
@TRAINED
def test_what_writes_to_quantized_weights_is_refused(pool: WorkerPool) -> None:
    for trains, plans, *merges in pool.run(refuse, world_size=2):
        TRAINED.check(trains)
        PLANNED.check(plans)
        for merge in merges:
            MERGED.check(merge)


def refuse_of_old() -> str:
    with mock.patch.object(core_quantized, "shards_integers", lambda: False), pytest.raises(MiCSConfigError) as error:
        mics_shard(adapted("own int8"), MiCSConfig(shard_size=2))
    return str(error.value)


def test_a_torch_that_shards_no_integers_is_told(pool: WorkerPool) -> None:
    for says in pool.run(refuse_of_old, world_size=2):
        assert "shards no integers. Use PyTorch 2.13 or newer" in says
