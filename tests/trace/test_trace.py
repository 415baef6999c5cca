"""A profile holds what real passes measure, and taking it changes nothing."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Regressor, Routed, TiedBlocks, regression_loss
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_mics import MiCSConfig, MiCSConfigError, mics_shard
from lightning_mics.plan.hardware import find_instance
from lightning_mics.plan.memory import predict_memory
from lightning_mics.plan.profile import ModelProfile
from lightning_mics.plan.settings import Candidate, Training
from lightning_mics.topology import Recomputation
from lightning_mics.trace import profile_model, run
from lightning_mics.trace._torch import fake_world
from lightning_mics.trace.models import build_model
from lightning_mics.trace.structure import Structure

WIDTH, HEADS, TOKENS, VOCABULARY, SAMPLES = 64, 4, 128, 500, 3
SHARED = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(layers: int = 2, **settings: Any) -> GPT2LMHeadModel:
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "loss_type": "ForCausalLM", **settings}
    config = GPT2Config(
        n_layer=layers, n_embd=WIDTH, n_head=HEADS, n_positions=TOKENS, use_cache=False, **SHARED, **settings
    )
    return GPT2LMHeadModel(config)


def bert(layers: int = 2) -> BertForMaskedLM:
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SHARED,
    )
    return BertForMaskedLM(config)


def llama(layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=172,
        use_cache=False,
        **SHARED,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[int], nn.Module]] = {"gpt2": gpt2, "bert": bert, "llama": llama}


def tokens(samples: int = SAMPLES) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (samples, TOKENS))}


def loss_of(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    return model(**sample, labels=sample["input_ids"]).loss


def saved_bytes(model: nn.Module, sample: dict[str, Tensor]) -> int:
    """Returns what autograd keeps after a real forward pass, without parameters, buffers and inputs."""
    known = [*model.parameters(), *model.buffers(), *sample.values()]
    others = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in others:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, sample)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peaks(model: nn.Module, sample: dict[str, Tensor], path: Path) -> tuple[int, int]:
    """Returns the most that a real forward and a real backward pass have allocated on the CPU, gradients included."""
    loss_of(model, sample).backward()
    model.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function("mics forward"):
            loss = loss_of(model, sample)
        loss.backward()
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    ends = next(event["ts"] + event["dur"] for event in events if event.get("name") == "mics forward")
    live, forward, backward = 0, 0, 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        if event["ts"] <= ends:
            forward = max(forward, live)
        else:
            backward = max(backward, live)
    return forward, backward


def predicted_peaks(profile: ModelProfile, width: int) -> tuple[float, float]:
    """Returns the same from a profile, for parameters that are not sharded."""
    kept, forward = 0.0, 0.0
    for unit in [*profile.blocks, profile.root]:
        kept += unit.saved.at(SAMPLES)
        forward = max(forward, kept + unit.forward_extra.at(SAMPLES))
    backward, gradients = kept + profile.root.backward_extra.at(SAMPLES), profile.root.trainable_numel * width
    kept -= profile.root.saved.at(SAMPLES)
    for unit in profile.blocks[::-1]:
        gradients += unit.trainable_numel * width
        backward = max(backward, kept + gradients + unit.backward_extra.at(SAMPLES))
        kept -= unit.saved.at(SAMPLES)
    return forward, backward


def saved_of(profile: ModelProfile, samples: int = SAMPLES) -> float:
    return sum(unit.saved.at(samples) for unit in profile.units)


def input_bytes(sample: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in sample.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_saved_activations_are_those_of_a_real_pass(name: str, dtype: torch.dtype) -> None:
    model, sample = MODELS[name](2).train().to(dtype), tokens()
    profile = profile_model(model, sample, device_type="cpu")
    assert saved_of(profile) - input_bytes(sample) == pytest.approx(saved_bytes(model, sample), rel=0.001)


@pytest.mark.parametrize("name", MODELS)
def test_peaks_are_those_of_real_passes(name: str, tmp_path: Path) -> None:
    model, sample = MODELS[name](2).train(), tokens()
    profile = profile_model(model, sample, device_type="cpu")
    forward, backward = peaks(model, sample, tmp_path / "trace.json")
    expected = predicted_peaks(profile, width=4)
    inputs = input_bytes(sample)
    assert (expected[0] - inputs, expected[1] - inputs) == pytest.approx((forward, backward), rel=0.01)


def test_operations_are_those_of_the_shapes() -> None:
    profile = profile_model(gpt2(), tokens(), param_dtype="bfloat16")
    block = 2 * 12 * WIDTH**2 * TOKENS + 4 * TOKENS**2 * WIDTH
    assert [unit.forward_flops for unit in profile.blocks] == [block] * 2
    assert profile.root.forward_flops == 2 * WIDTH * VOCABULARY * TOKENS
    assert profile.flops == 3 * sum(unit.forward_flops for unit in profile.units)


def test_launches_are_the_operations_of_the_model_alone() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    model = nn.Sequential(nn.ModuleDict({"a": block})["a"], nn.Linear(8, 8))
    unit = profile_model(model, torch.ones(1, 8), wrap="Sequential").blocks[0]
    assert (unit.forward_launches, unit.backward_launches) == (3, 6)  # backward: products, sums of biases, GELU
    few, many = (profile_model(gpt2(layers), {"input_ids": torch.ones(1, 16, dtype=torch.long)}) for layers in (4, 8))
    assert len({(unit.forward_launches, unit.backward_launches) for unit in (*few.blocks, *many.blocks)}) == 1
    assert 15 <= few.blocks[0].forward_launches <= 25 <= few.blocks[0].backward_launches <= 40


def test_traffic_is_what_all_but_products_read_and_write() -> None:
    block = nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 8, bias=False))
    model = nn.Sequential(nn.ModuleDict({"a": block})["a"], nn.Linear(8, 8))
    unit = profile_model(model, torch.ones(1, 8), wrap="Sequential").blocks[0]
    row = 8 * 4
    assert unit.forward_traffic.at(5) == 5 * 2 * row  # GELU reads a row and writes one
    assert unit.backward_traffic.at(5) == 5 * 3 * row  # and its backward pass reads two
    assert unit.attention_flops == 0


def test_causal_attention_leaves_half_of_its_operations_out() -> None:
    block = profile_model(gpt2(), tokens(), param_dtype="bfloat16").blocks[0]
    assert (block.attention_flops, block.masked_flops) == (4 * TOKENS**2 * WIDTH, 2 * TOKENS**2 * WIDTH)
    whole = profile_model(bert(), tokens(), param_dtype="bfloat16").blocks[-1]
    assert whole.attention_flops > 0 == whole.masked_flops


def test_scores_are_kept_only_where_attention_is_eager() -> None:
    fused, eager = (
        profile_model(gpt2(1, attn_implementation=attention, attn_pdrop=0.1), tokens(), param_dtype="bfloat16")
        for attention in ("sdpa", "eager")
    )
    # Scores after softmax, and after dropout, with its mask.
    expected = 5 * HEADS * TOKENS**2
    assert eager.blocks[0].saved.per_sample - fused.blocks[0].saved.per_sample == pytest.approx(expected, rel=0.05)


def test_the_last_block_is_measured_by_itself() -> None:
    blocks = profile_model(llama(5), tokens(), param_dtype="bfloat16").blocks
    # Its output is kept by no other block; the final norm keeps it in float32.
    assert [block.checkpoint.per_sample for block in blocks] == [2 * TOKENS * WIDTH] * 4 + [0]


def test_checkpointed_blocks_keep_their_inputs() -> None:
    for block in profile_model(gpt2(4), tokens(), param_dtype="bfloat16").blocks:
        assert block.can_checkpoint
        assert (block.checkpoint.fixed, block.checkpoint.per_sample) == (0, 2 * TOKENS * WIDTH)


@pytest.mark.parametrize("how", [False, True, 2, "selective"])
def test_units_inside_a_block_are_computed_again_with_it(how: Recomputation) -> None:
    batch, wrap = tokens(), ["GPT2Block", "GPT2MLP"]
    profile = profile_model(gpt2(3), batch, wrap=wrap)
    passes = dict.fromkeys(range(6), 0)
    with fake_world(4):
        model = gpt2(3)
        parts = [part for block in model.transformer.h for part in (block.ln_1, block.mlp.act)]
        for number, part in enumerate(parts):
            part.register_forward_hook(lambda *args, number=number: passes.update({number: passes[number] + 1}))
        config = MiCSConfig(shard_size=2, node_size=2, verify=False, wrap=wrap, activation_checkpointing=how)
        mics_shard(model, config, device_type="cpu")
        model(**batch, labels=batch["input_ids"]).loss.backward()
    again = Candidate(shard_size=2, activation_checkpointing=how).again(profile.blocks)
    assert [1 + bool(what) for what in again] == list(passes.values())


def test_memory_of_recomputed_blocks_is_that_with_units_inside_of_them() -> None:
    inside, alone = (profile_model(gpt2(3), tokens(), wrap=["GPT2Block", *more]) for more in (["GPT2MLP"], []))
    accelerator = find_instance("p4d.24xlarge", 1).node.accelerator
    for how in (True, 2, "selective"):
        candidate = Candidate(shard_size=1, micro_batch=64, activation_checkpointing=how)
        ours, theirs = (predict_memory(p, candidate, Training(), accelerator) for p in (inside, alone))
        assert ours.activations == theirs.activations
        assert ours.temporaries == pytest.approx(theirs.temporaries, rel=0.02)


def test_the_dtype_of_the_computation_decides() -> None:
    wide, narrow = (profile_model(gpt2(), tokens(), param_dtype=dtype) for dtype in (None, "bfloat16"))
    assert (wide.compute_dtype, narrow.compute_dtype) == ("float32", "bfloat16")
    assert wide.blocks[0].saved.per_sample > 1.8 * narrow.blocks[0].saved.per_sample
    assert all(param.dtype == "float32" for unit in narrow.units for param in unit.params)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_counted_once(name: str) -> None:
    model = MODELS[name](1)
    profile = profile_model(model, tokens())
    assert profile.numel == sum(param.numel() for param in model.parameters())
    assert profile.sequence_length == TOKENS
    assert profile.buffer_bytes == sum(buffer.nbytes for buffer in model.buffers())


def test_frozen_parameters_get_no_gradient() -> None:
    model = Regressor(3)
    model.blocks[1].requires_grad_(False)
    profile = profile_model(model, torch.randn(2, 5), loss=regression_loss)
    assert profile.trainable_numel == sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert profile.blocks[1].trainable_numel == 0
    assert profile.blocks[1].backward_flops < profile.blocks[0].backward_flops


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.campaign] * (name != "gpt2")) for name in MODELS]
)
def test_a_few_layers_stand_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = MODELS[name](5), tokens()
    few = profile_model(model, sample, param_dtype="bfloat16")
    monkeypatch.setattr(Structure, "_find_alike", lambda self: [])
    assert profile_model(model, sample, param_dtype="bfloat16") == few


def test_equal_units_are_one_object() -> None:
    blocks = profile_model(gpt2(5), tokens()).blocks
    assert len(blocks) == 5
    assert all(block is blocks[0] for block in blocks)


class ByNumber(Regressor):
    """Cannot run with fewer blocks than it was built with."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index in range(5):
            x = self.blocks[index](x)
        return self.last(torch.tanh(self.narrow(x)))


def test_models_that_need_all_their_layers_are_traced_whole() -> None:
    by_number = profile_model(ByNumber(5), torch.randn(2, 5), loss=regression_loss, name="x")
    assert by_number == profile_model(Regressor(5), torch.randn(2, 5), loss=regression_loss, name="x")


def test_merged_units_are_one_unit() -> None:
    names = [unit.name for unit in profile_model(TiedBlocks(), torch.randn(2, 5), loss=regression_loss).blocks]
    assert "blocks.0.down + blocks.1.down" in names


def test_a_large_model_needs_three_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample, name = build_model("gpt3-175b")
    calls, shard = [], run.apply_unit
    monkeypatch.setattr(run, "apply_unit", lambda *args, **kwargs: [calls.append(1), shard(*args, **kwargs)][1])
    profile = profile_model(model, sample, param_dtype="bfloat16", name=name)
    assert len(calls) == 4 * (3 + 1)
    assert (profile.name, len(profile.blocks), profile.numel) == ("gpt3-175b", 96, 174604259328)
    assert 6.0 < profile.flops / 2048 / profile.numel < 6.5


def test_taking_a_profile_changes_nothing() -> None:
    model = gpt2().eval()
    model.transformer.h[0].train()
    model.transformer.h[1].register_forward_hook(lambda module, args, output: output)
    param = next(model.parameters())
    param.grad = torch.ones_like(param)

    def state() -> Any:
        modules = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return modules, [id(p) for p in model.parameters()], torch.get_rng_state().tolist(), sys.excepthook

    sample, values = tokens(), {name: value.clone() for name, value in model.state_dict().items()}
    before = state()
    profile_model(model, sample, param_dtype="bfloat16")
    assert state() == before
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert torch.equal(param.grad, torch.ones_like(param))
    assert not dist.is_initialized()


def test_a_lightning_module_is_run_by_its_training_step() -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"scale": 2.0})
            self.model = Regressor(4)

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = self.hparams.scale * nn.functional.mse_loss(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

    task = Task()
    task.trainer = trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    profile = profile_model(task, [torch.randn(3, 5), torch.randn(3, 1)])
    assert task.trainer is trainer
    assert len(profile.blocks) == 4
    assert profile.blocks[0].saved.per_sample > 0


def test_batches_of_input_and_target_and_plain_tensors_run() -> None:
    pair, plain = (
        profile_model(Regressor(), sample) for sample in ((torch.randn(3, 5), torch.ones(3)), torch.ones(1, 5))
    )
    assert pair.blocks == plain.blocks


def test_batch_norms_are_units_where_dtypes_mix() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(3)))
    units = profile_model(model, torch.randn(2, 4, 16, 16), param_dtype="bfloat16").blocks
    assert [unit.name for unit in units][:2] == ["0", "0.1"]


def test_what_depends_on_values_is_refused() -> None:
    with pytest.raises(MiCSConfigError, match=r"Routed cannot be traced .*no sample"):
        profile_model(Routed(), torch.randn(4, 7))


def test_a_failure_leaves_no_process_group() -> None:
    with pytest.raises(MiCSConfigError, match="Regressor cannot be traced"):
        profile_model(Regressor(), torch.randn(4, 9))
    assert not dist.is_initialized()


def test_a_loss_must_need_a_gradient() -> None:
    with pytest.raises(MiCSConfigError, match="needs a gradient"):
        profile_model(Regressor(), torch.randn(4, 5), loss=lambda model, x: model(x).detach().sum())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_a_sample_a_formula_estimates(attention: str) -> None:
    model = gpt2(4, attn_implementation=attention, resid_pdrop=0.1)
    estimate = profile_model(model, None, param_dtype="bfloat16", sequence_length=TOKENS)
    scores = 5 * HEADS * TOKENS**2 if attention == "eager" else 0
    assert estimate.source == "formula"
    assert estimate.blocks[0].saved.per_sample == 34 * TOKENS * WIDTH + scores
    traced = profile_model(model, tokens(), param_dtype="bfloat16")
    assert [unit.params for unit in estimate.units] == [unit.params for unit in traced.units]
    assert estimate.flops == pytest.approx(traced.flops, rel=0.02)
    assert 0.5 < saved_of(estimate) / saved_of(traced) < 2


def test_estimated_embeddings_are_no_blocks() -> None:
    estimate = profile_model(bert(3), None)
    assert estimate.sequence_length == 512
    assert [unit.saved.per_sample > 0 for unit in estimate.blocks].count(True) == 3


def test_without_sample_and_configuration_there_are_only_shapes() -> None:
    profile = profile_model(Regressor(3), None)
    assert (profile.source, profile.knows_activations, len(profile.blocks)) == ("shapes only", False, 3)
    weights = sum(param.numel() for param in Regressor(3).parameters() if param.dim() > 1)
    assert profile.flops == 6 * weights
    assert profile_model(Regressor(3), None, sequence_length=7).flops == 7 * profile.flops
    assert profile.numel == sum(param.numel() for param in Regressor(3).parameters())


def test_convolutions_that_differ_in_their_stride_are_not_alike():
    strides = (1, 1, 2, 1, 2, 1)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, stride=s, padding=1), nn.ReLU()) for s in strides))
    profile = profile_model(model, torch.zeros(1, 8, 32, 32))
    flops = [unit.forward_flops for unit in profile.blocks]
    assert flops == [2 * 8 * 8 * 9 * size**2 for size in (32, 32, 16, 16, 8, 8)]
