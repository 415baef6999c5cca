"""``generate`` wherever a loop may call it: in hooks of a LightningModule, with Fabric, Accelerate and alone."""

from __future__ import annotations

from types import MethodType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from accelerate_tools import make_accelerator
from lightning.fabric import Fabric
from lightning_tools import VOCABULARY, loader, make_trainer, where
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from works import works

from lightning_mics import MiCSConfig, MiCSStrategy, mics_shard
from lightning_mics.core.runtime import register_forward_method
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.testing import WorkerPool, full_state_dict

HOOKS = ("validation_step", "on_validation_epoch_end", "on_train_epoch_end", "on_train_batch_end", "test_step")


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=None, loss_type="ForCausalLMLoss"))


def prompt() -> Tensor:
    return torch.arange(3)[None] + dist.get_rank()


def sample(model: Any, **options: Any) -> list[int]:
    # Ranks come to an end at different lengths.
    length = 9 + dist.get_rank()
    return model.generate(prompt(), max_length=length, do_sample=False, pad_token_id=0, **options)[0].tolist()


def alone(weights: dict[str, Tensor]) -> list[int]:
    model = tiny_gpt2()
    model.load_state_dict(weights)
    return sample(model.eval())


class Writer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = tiny_gpt2()
        self.checked: list[str] = []

    def check(self, hook: str) -> None:
        if hook in self.checked:
            return
        self.checked.append(hook)
        was_training = self.model.training
        written = sample(self.model.eval())
        self.model.train(was_training)
        weights = {name.removeprefix("model."): value for name, value in full_state_dict(self).items()}
        assert written == alone(weights), hook
        if not hook.endswith("step"):  # nothing stays gathered
            assert all(isinstance(param, DTensor) for param in self.parameters()), hook

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0], labels=batch[0]).loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.check("validation_step")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.check("test_step")

    def on_validation_epoch_end(self) -> None:
        self.check("on_validation_epoch_end")

    def on_train_batch_end(self, *args: Any) -> None:
        self.check("on_train_batch_end")

    def on_train_epoch_end(self) -> None:
        self.check("on_train_epoch_end")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def write_in_hooks(accumulate: int) -> None:
    world_size = dist.get_world_size()
    for shard_size in sorted({1, 2, world_size}):
        module, rows = Writer(), loader(3, world_size)
        trainer = make_trainer(strategy=MiCSStrategy(shard_size=shard_size), accumulate_grad_batches=accumulate)
        trainer.fit(module, rows, rows)
        trainer.test(module, rows, verbose=False)
        assert set(module.checked) == set(HOOKS)


@works("Training loops", "generate() in validation hooks")
@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 3), (4, 1)])
def test_a_lightning_module_generates_in_every_hook(pool: WorkerPool, world_size: int, accumulate: int) -> None:
    pool.run(write_in_hooks, accumulate, world_size=world_size)


class Wrapped(nn.Module):
    """Holds a model of transformers, and has a method of its own that reads the root's parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = tiny_gpt2()
        self.scale = nn.Parameter(torch.full((2,), 3.0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).logits * self.scale[0]

    def encode(self, tokens: Tensor) -> Tensor:
        return self(tokens).sum() + self.scale.sum()


def write_in_other_ways() -> None:
    expected = alone(tiny_gpt2_weights())
    world_size = dist.get_world_size()
    for shard_size in sorted({1, 2, world_size}):
        torch.manual_seed(1)
        bare = mics_shard(tiny_gpt2(), MiCSConfig(shard_size=shard_size)).eval()
        assert sample(bare) == expected
        assert all(isinstance(param, DTensor) for param in bare.parameters())
        outer = mics_shard(Wrapped(), MiCSConfig(shard_size=shard_size)).eval()
        assert sample(outer.inner) == expected
        encoded = reference_encoding()
        outer.inner.count = MethodType(count, outer.inner)
        register_forward_method(outer.inner, "count")
        torch.testing.assert_close(outer.inner.count(prompt()), reference_count())

        fabric = Fabric(**where(), strategy=FabricStrategy(shard_size=shard_size))
        fabric.launch()
        torch.manual_seed(1)
        model = fabric.setup(tiny_gpt2().eval())
        assert sample(model) == expected
        model.mark_forward_method("generate")
        assert sample(model) == expected
        wrapped = fabric.setup(Wrapped().eval())
        assert sample(wrapped.inner) == expected
        wrapped.mark_forward_method("encode")
        torch.testing.assert_close(wrapped.encode(prompt()), encoded)
        fabric.backward(wrapped.encode(prompt()))
        assert all(param.grad is not None for param in wrapped.parameters())

        accelerator = make_accelerator(settings={"shard_size": shard_size})
        torch.manual_seed(1)
        prepared = accelerator.prepare(tiny_gpt2().eval())
        assert sample(prepared) == expected and sample(accelerator.unwrap_model(prepared)) == expected
        assert sample(accelerator.prepare(Wrapped().eval()).inner) == expected


def tiny_gpt2_weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return tiny_gpt2().state_dict()


def reference_encoding() -> Tensor:
    return Wrapped().eval().encode(prompt())


def count(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits.sum()


def reference_count() -> Tensor:
    return count(Wrapped().eval().inner, prompt())


@works("Training loops", "generate() of a model inside a sharded one")
@works("Training loops", "mark_forward_method of Fabric")
@pytest.mark.parametrize("world_size", [2, 4])
def test_generation_in_every_way_in(pool: WorkerPool, world_size: int) -> None:
    pool.run(write_in_other_ways, world_size=world_size)
