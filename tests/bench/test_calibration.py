"""A model's block measured on the device at hand, and what the planner makes of it."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import pytest
import torch
from plan_examples import make_cluster
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.bench.calibration import Calibration, calibrate
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.evaluate import evaluate
from lightning_mics.plan.hardware import Host
from lightning_mics.plan.settings import Candidate, Training, Variant
from lightning_mics.testing import WorkerPool
from lightning_mics.trace import profile_model
from lightning_mics.trace._torch import fake_world

TOKENS, ACCUMULATION = 4, 4
TRAINING = Training(param_dtype="float32")


def narrow(layers: int = 12) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model whose operations take less than their launch."""
    model = GPT2LMHeadModel(
        GPT2Config(
            **{"n_layer": layers, "n_embd": 64, "n_head": 2, "n_positions": 16, "vocab_size": 256},
            **{"bos_token_id": 0, "eos_token_id": 0, "use_cache": False, "loss_type": "ForCausalLM"},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        )
    )
    return model, {"input_ids": torch.ones(1, TOKENS, dtype=torch.long)}


def one_block() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return narrow(1)


def short() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return narrow(4)


def without_a_group(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs something in a pool's worker as in a process that no launcher started."""
    torch.distributed.destroy_process_group()
    torch.set_num_threads(1)
    return function(*args, **kwargs)


@pytest.mark.parametrize(
    "variant", [Variant(), Variant(lora_rank=4, base_bits=4), Variant(frozen=("transformer.h.3", "mlp"))]
)
def test_a_block_is_measured(pool: WorkerPool, variant: Variant) -> None:
    found: Calibration
    options = {"seconds": 0.0, "variant": variant}
    (found,) = pool.run(without_a_group, calibrate, f"{__name__}:short", TRAINING, **options, world_size=1)
    whole = profile_model(*narrow(2)).blocks[1]
    assert (found.unit.trainable_numel < whole.trainable_numel) == (variant != Variant())
    assert not any(param.is_quantized for param in found.unit.params)
    assert found.kept == found.predicted == found.unit.saved.at(1)
    assert 1e-6 < found.host.launch < 1e-3 and found.host.unit > 0
    assert found.host_seconds > found.host.launch * found.unit.forward_launches
    cluster = found.applied_to(make_cluster(), "float32")
    accelerator = cluster.node.accelerator
    assert accelerator.peak_flops["float32"] * accelerator.compute_efficiency == pytest.approx(found.rate)
    assert cluster.node.host == found.host and 0 < accelerator.optimizer_efficiency <= 1


def test_a_model_without_a_stack_is_refused() -> None:
    with pytest.raises(MiCSConfigError, match="no stack of two equal blocks or more"):
        calibrate(f"{__name__}:one_block", TRAINING)


def test_a_block_that_is_frozen_whole_is_refused() -> None:
    with pytest.raises(MiCSConfigError, match=r"--freeze h leaves nothing to train in transformer\.h\.0"):
        calibrate(f"{__name__}:short", TRAINING, variant=Variant(frozen=("h",)))


def test_what_is_faster_than_the_peak_moves_the_peak() -> None:
    unit = profile_model(*narrow(2)).blocks[0]
    fast = Calibration(
        **{"device": "CPU", "micro_batch": 1, "forward_rate": 80e12, "backward_rate": 80e12, "host": Host()},
        **{"host_seconds": 0.0, "kept": 1.0, "predicted": 1.0, "optimizer_rate": 5e12, "unit": unit},
    )
    accelerator = fast.applied_to(make_cluster(), "float32").node.accelerator
    assert accelerator.peak_flops["float32"] == pytest.approx(80e12) and accelerator.compute_efficiency == 1
    assert accelerator.optimizer_efficiency == 1


def predicted(layers: int, host: Host) -> float:
    """Returns the seconds that the host is predicted to work in a step."""
    cluster = make_cluster(8, 8).with_host(host)
    candidate = Candidate(shard_size=8, accumulation=ACCUMULATION)
    return evaluate(profile_model(*narrow(layers)), cluster, candidate, TRAINING).time.host


def measured(layers: int, steps: int = 7) -> float:
    """Returns the seconds of this processor in a step of one rank of 64."""
    model, batch = narrow(layers)
    with fake_world(64):
        mics_shard(model, MiCSConfig(shard_size=8, node_size=8, verify=False), device_type="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        seconds = []
        for number in range(steps + 2):
            gc.collect()
            gc.disable()
            begin = time.process_time()
            for index in range(ACCUMULATION):
                with defer_replication_sync(model, enabled=index + 1 < ACCUMULATION):
                    model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number >= 2:
                seconds.append(time.process_time() - begin)
            gc.enable()
    return statistics.median(seconds)


def compare(layers: list[int]) -> dict[int, tuple[float, float]]:
    """Returns predicted and measured seconds; calibrated before and after, for a busy machine is not always as busy."""
    found = {}
    hosts = [host()]
    for count in layers:
        seconds = measured(count)
        hosts.append(host())
        found[count] = (statistics.mean(predicted(count, near) for near in hosts[-2:]), seconds)
    return found


def host() -> Host:
    return calibrate(f"{__name__}:narrow", TRAINING, seconds=5.0).host


@pytest.mark.campaign
def test_the_host_s_time_is_predicted_after_calibration(pool: WorkerPool, record_property: Any) -> None:
    (found,) = pool.run(without_a_group, compare, [12, 24, 48], world_size=1, timeout=200)
    words = [f"{n}: {p * 1e3:.0f} ms predicted, {m * 1e3:.0f} measured" for n, (p, m) in found.items()]
    record_property("figures", "; ".join(words))
    for guess, real in found.values():
        assert guess == pytest.approx(real, rel=0.15)
