"""Models by name, by configuration and by factory; and what is said where that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPT2Config, RobertaConfig, T5Config, ViTConfig

from lightning_mics import MiCSConfigError
from lightning_mics.plan import models
from lightning_mics.trace import profile_model
from lightning_mics.trace.models import build_model, known_models

# Counts of the published checkpoints; of the rest, those that the shape's formula gives.
COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "tinyllama": 1_100_048_384,
}
SIZES = {
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13e9,
    "gpt3-175b": 175e9,
    "gpt-100b": 100e9,
    "bert-10b": 10e9,
    "bert-15b": 15e9,
    "bert-20b": 20e9,
    "bert-50b": 50e9,
}


@pytest.mark.parametrize("name", known_models())
def test_known_models_have_their_size(name: str) -> None:
    model, sample, shown = build_model(name)
    count = sum(param.numel() for param in model.parameters())
    assert count == COUNTS[name] if name in COUNTS else count == pytest.approx(SIZES[name], rel=0.03)
    assert all(param.is_meta and param.dtype == torch.float32 for param in model.parameters())
    assert shown == name
    assert sample["input_ids"].shape[0] == 1
    assert not model.config.use_cache


def test_names_may_be_written_in_other_ways() -> None:
    assert build_model("GPT2_Medium", sequence_length=8)[2] == "gpt2-medium"


@pytest.mark.parametrize(
    ("name", "asked", "length"),
    [
        ("gpt2", None, 1024),
        ("bert-base", None, 512),
        ("mistral-7b", None, 8192),
        ("gpt2", 7, 7),
        ("tinyllama", 9000, 9000),
    ],
)
def test_samples_are_as_long_as_asked(name: str, asked: int | None, length: int) -> None:
    assert build_model(name, sequence_length=asked)[1]["input_ids"].shape == (1, length)


def test_tables_of_positions_have_an_end() -> None:
    with pytest.raises(MiCSConfigError, match="sequence_length=2000, but gpt2 has positions for 1024 tokens"):
        build_model("gpt2", sequence_length=2000)
    with pytest.raises(MiCSConfigError, match="at least 1"):
        build_model("gpt2", sequence_length=0)


def write(config: Any, path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**config.to_dict(), **changes}))
    return path


SMALL = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("config", "architectures", "expected", "length"),
    [
        (GPT2Config(n_layer=2, n_embd=32, n_head=2, **SMALL), None, "GPT2LMHeadModel", 1024),
        (BertConfig(**TINY_BERT, **SMALL), ["BertForSequenceClassification"], "BertForSequenceClassification", 512),
        (RobertaConfig(**TINY_BERT, **{**SMALL, "pad_token_id": 1}), ["RobertaForMaskedLM"], "RobertaForMaskedLM", 511),
        (T5Config(num_layers=2, d_model=32, d_kv=16, d_ff=64, num_heads=2, decoder_start_token_id=0, **SMALL), None,
         "T5ForConditionalGeneration", 8192),
    ],
)  # fmt: skip
def test_configurations_of_hugging_face(
    config: Any, architectures: list[str] | None, expected: str, length: int, tmp_path: Path
) -> None:
    changes = {"dtype": "bfloat16", "architectures": architectures}
    if expected.startswith("Roberta"):
        changes["max_position_embeddings"] = 513
    file = write(config, tmp_path / "mine" / "config.json", **changes)
    for path in (file, file.parent, str(file)):
        model, sample, name = build_model(path)
        assert (type(model).__name__, sample["input_ids"].shape, name) == (expected, (1, length), "mine")
        assert next(model.parameters()).dtype == torch.float32
    model, sample, name = build_model(file, sequence_length=16)
    assert profile_model(model, sample, param_dtype="bfloat16").flops > 0


def test_a_model_of_images(tmp_path: Path) -> None:
    config = ViTConfig(**TINY_BERT, image_size=32, patch_size=8)
    file = write(config, tmp_path / "vit.json", architectures=["ViTForImageClassification"])
    model, sample, name = build_model(file)
    assert (sample["pixel_values"].shape, name) == ((1, 3, 32, 32), "vit")
    assert profile_model(model, sample).flops > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ("[1]", "names no 'model_type'"),
        ('{"a": 1}', "names no 'model_type'"),
        ('{"model_type": "lama"}', r"'lama' is not known to transformers .* Did you mean 'llama'\?"),
        ('{"model_type": "gpt2", "n_embd": 30, "n_head": 7}', r"config\.json: .* cannot build the model"),
        (
            '{"model_type": "gpt2", "n_layers": 2}',
            r"key 'n_layers' is unknown to GPT2Config\. Did you mean 'n_layer'\?",
        ),
        ('{"model_type": "bert", "hidden_sizes": 64}', r"Did you mean 'hidden_size'\?"),
    ],
)
def test_bad_files(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(MiCSConfigError, match=message):
        build_model(file)


def test_keys_that_transformers_dropped_are_no_typing_errors(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    dropped = {"n_ctx": 1024, "tie_encoder_decoder": False, "layer_norm_eps": 1e-5, "forced_bos_token_id": 1}
    file.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, **dropped}))
    assert len(build_model(file)[0].transformer.h) == 2


def test_missing_files_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(MiCSConfigError, match=r"config.json cannot be read \(No such file"):
        build_model(tmp_path / "config.json")
    with pytest.raises(MiCSConfigError, match="cannot be read"):
        build_model(tmp_path)
    with pytest.raises(MiCSConfigError, match=r"'gpt2-xxl' is not known.* Did you mean 'gpt2-xl'\? .*module:factory"):
        build_model("gpt2-xxl")


def test_without_transformers_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MiCSConfigError, match=r"pip install 'lightning-mics\[transformers\]'"):
        build_model("gpt2")


FACTORIES = """
import torch
from torch import nn
number = 3
def plain():
    return nn.Linear(4, 4)
def with_sample():
    return nn.Linear(4, 4), torch.ones(2, 4)
def wrong():
    return "model"
def failing():
    raise ValueError("no data here.\\nsecond line")
class Space:
    @staticmethod
    def build():
        return nn.Linear(4, 4)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planned_models.py").write_text(FACTORIES)
    (tmp_path / "planned_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "planned_models", raising=False)


@pytest.mark.usefixtures("here")
def test_factories() -> None:
    path = list(sys.path)
    for name in ("plain", "with_sample", "Space.build"):
        model, sample, shown = build_model(f"planned_models:{name}")
        assert (model.weight.is_meta, shown) == (True, name)
        assert (sample is not None) == (name == "with_sample")
    assert sys.path == path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planned_model:plain", "module 'planned_model' does not exist here"),
        ("planned_broken:plain", "importing planned_broken failed with ZeroDivisionError"),
        ("planned_models:plane", r"has no 'plane'. Did you mean 'plain'\?"),
        ("planned_models:zzz", "It has: .*number"),
        ("planned_models:number", "is a int. Name a function"),
        ("planned_models:wrong", "returned a str"),
        ("planned_models:failing", "failed with ValueError: no data here. It is called"),
    ],
)
def test_bad_factories(name: str, message: str) -> None:
    with pytest.raises(MiCSConfigError, match=message):
        build_model(name)


def test_every_known_model_is_checked() -> None:
    assert set(models._SHAPES) == set(COUNTS) | set(SIZES)
