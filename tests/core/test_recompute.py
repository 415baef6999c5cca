"""Blocks recompute by choice, once a backward pass, and never beside somebody else's recomputation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate_tools import make_accelerator
from memory_tools import most_allocated
from models import Block, Regressor, microbatch, regression_loss, tiny_gpt2
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint as checkpoint_in_place
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from works import works

from lightning_mics import MiCSConfig, MiCSConfigError, mics_shard
from lightning_mics.core.recompute import blocks_to_recompute, planned_recomputation
from lightning_mics.core.units import plan_units
from lightning_mics.testing import WorkerPool

CONFIG = MiCSConfig(shard_size=2, node_size=2)


class Stage(nn.Module):
    """Holds units, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(self.dropout(x))
        return x


class Staged(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Stage()])


def is_second(module: nn.Module) -> bool:
    return getattr(module, "is_second", False) is True


def new_model() -> nn.Module:
    torch.manual_seed(0)
    model: Any = Staged()
    for index, block in enumerate(model.blocks[0].blocks):
        block.is_second = index == 1
    return model


BLOCKS = {f"blocks.0.blocks.{index}" for index in range(3)}
# What is given, and which modules run again in the backward pass, once each.
CHOICES: dict[str, tuple[Any, set[str]]] = {
    "none": (False, set()),
    "all": (True, BLOCKS),
    "second": (2, {"blocks.0.blocks.0", "blocks.0.blocks.2"}),
    "selective": ("selective", BLOCKS),
    "class": (Block, BLOCKS),
    "name": ("Block", BLOCKS),
    "set": (frozenset({Block, nn.LayerNorm}), BLOCKS),
    "function": (is_second, {"blocks.0.blocks.1"}),
    "function in a list": ([is_second, "Dropout"], {"blocks.0.blocks.1", "blocks.0.dropout"}),
    "part of a unit": ("LayerNorm", {f"{block}.norm" for block in BLOCKS}),
    "holds units": ([Stage], {"blocks.0"}),
}


def step(how: Any) -> tuple[dict[str, Tensor], Counter[tuple[str, bool]]]:
    """Returns the gradients of two microsteps, and how often each module has run outside and in backward passes."""
    model = new_model()
    runs: Counter[tuple[str, bool]] = Counter()
    for name, module in model.named_modules():
        module.forward = counted(module.forward, name, runs)  # type: ignore[method-assign]
    mics_shard(model, CONFIG.replace(wrap="Block", activation_checkpointing=how))
    for micro in range(2):
        torch.manual_seed(7 + micro + dist.get_rank())
        loss = regression_loss(model, microbatch("uneven", 2 * micro + dist.get_rank(), 4))
        loss.backward()
    return {name: param.grad.full_tensor() for name, param in model.named_parameters()}, runs


def counted(forward: Callable[..., Any], name: str, runs: Counter[tuple[str, bool]]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        runs[name, torch._C._current_graph_task_id() != -1] += 1
        return forward(*args)

    return run


def wrong_choices() -> dict[str, Any]:
    plain, _ = step(False)
    wrong: dict[str, Any] = {}
    for name, (how, chosen) in CHOICES.items():
        gradients, runs = step(how)
        others = {module for module, is_again in runs if is_again and not inside(module, chosen)}
        not_once = {module for module in chosen if not runs[module, True] == runs[module, False] > 0}
        differ = [name for name in plain if not torch.equal(plain[name], gradients[name])]
        if differ or others or not_once:
            wrong[name] = (differ, others, not_once)
    return wrong


def inside(module: str, chosen: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in chosen)


@works("Training loops", 'Recomputation by class, name or function, and `"selective"`')
def test_what_is_chosen_recomputes_once_and_nothing_changes(pool: WorkerPool) -> None:
    """Bitwise, with dropout, in units, parts of them and what holds them."""
    assert pool.run(wrong_choices, world_size=4) == [{}] * 4


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 256), nn.Linear(256, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))).tanh().sigmoid())


def peaks(ways: dict[str, Any], shard: Callable[[nn.Module, dict[str, Any]], nn.Module]) -> dict[str, int]:
    found = {}
    for name, how in ways.items():
        settings = {"shard_size": 1, "node_size": 1, "wrap": Wide, "activation_checkpointing": how}
        model = shard(nn.Sequential(*(Wide() for _ in range(4))), settings)
        rows = torch.ones(512, 32)
        model(rows).sum().backward()
        found[name] = most_allocated(lambda: model(rows).sum().backward())  # noqa: B023
    return found


WAYS: dict[str, Any] = {"none": False, "all": True, "second": 2, "selective": "selective", "class": [Wide]}


def bare(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    return mics_shard(model, MiCSConfig(**settings))


def by_accelerate(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    prepared: nn.Module = make_accelerator(settings=settings).prepare(model)
    return prepared


@pytest.mark.parametrize("shard", [bare, by_accelerate])
def test_activations_take_less_in_each_way(pool: WorkerPool, shard: Any) -> None:
    (found,) = pool.run(peaks, WAYS, shard, world_size=1)
    assert found["all"] == found["class"] < found["selective"] < found["none"], found
    assert found["all"] < found["second"] < 0.8 * found["none"], found


def test_of_units_inside_each_other_the_outermost_recomputes() -> None:
    model: Any = new_model()
    config = MiCSConfig(activation_checkpointing=True)
    assert blocks_to_recompute(model, plan_units(model, [Stage, Block]), config) == [model.blocks[0]]


def test_a_plan_knows_all_blocks_by_any_name() -> None:
    model = Regressor()
    units = plan_units(model)
    known = {how: planned_recomputation(model, units, MiCSConfig(activation_checkpointing=how)) for how in HOW}
    assert known == HOW


HOW: dict[Any, Any] = {False: False, 2: 2, "selective": "selective", Block: True, "Block": True, "LayerNorm": None}


# --- somebody else's recomputation beside it --------------------------------------------------------------------------


class Inside(Block):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class Reentrant(Inside):
    reentrant = True


def with_blocks(block: Callable[[], nn.Module]) -> nn.Module:
    model = Regressor()
    model.blocks = nn.ModuleList(block() for _ in range(2))
    return model


class Around(Regressor):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(torch.tanh(self.narrow(x)))


class AroundReentrant(Around):
    reentrant = True


def enabled() -> nn.Module:
    model: Any = tiny_gpt2()
    model.gradient_checkpointing_enable()
    return model


def said_at_sharding(build: Callable[[], nn.Module]) -> str:
    with pytest.raises(MiCSConfigError) as error:
        mics_shard(build(), CONFIG.replace(activation_checkpointing=True))
    return str(error.value)


def in_place() -> nn.Module:
    return with_blocks(lambda: checkpoint_in_place(Block()))


def in_parts() -> nn.Module:
    model = Regressor()
    for block in model.blocks:
        block.up = checkpoint_wrapper(block.up)
    return model


@pytest.mark.parametrize("build", [enabled, in_place, in_parts])
def test_a_model_that_says_that_it_recomputes_is_refused(pool: WorkerPool, build: Callable[[], nn.Module]) -> None:
    for text in pool.run(said_at_sharding, build, world_size=2):
        assert "recomputes activations itself. It would be computed twice." in text


def said_in_a_step(build: Callable[[], nn.Module], how: Any) -> str:
    model = mics_shard(build(), CONFIG.replace(activation_checkpointing=how))
    rows = microbatch("uneven", dist.get_rank(), 4)
    with torch.no_grad():
        model(rows)
    with pytest.raises(MiCSConfigError) as error:
        regression_loss(model, rows).backward()
    return str(error.value)


def reentrant_blocks() -> nn.Module:
    return with_blocks(Reentrant)


def blocks_with_a_call() -> nn.Module:
    return with_blocks(Inside)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (blocks_with_a_call, "recomputes Inside, and a checkpoint() inside"),
        (reentrant_blocks, "recomputes Reentrant, and a checkpoint() inside"),
        (Around, "recomputes Block, and a checkpoint() around it"),
        (AroundReentrant, "recomputes Block, and a checkpoint() around it"),
    ],
)
def test_a_call_of_checkpoint_is_found_when_it_runs(
    pool: WorkerPool, build: Callable[[], nn.Module], says: str
) -> None:
    for text in pool.run(said_in_a_step, build, True, world_size=2):
        assert says in text and "activation_checkpointing=False" in text


def enabled_later() -> str:
    model: Any = mics_shard(tiny_gpt2(), CONFIG.replace(activation_checkpointing=["GPT2Block"]))
    model.train().gradient_checkpointing_enable()
    with pytest.raises(MiCSConfigError) as error:
        model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    return str(error.value)


def beside() -> bool:
    """Returns whether a user's calls work where MiCS recomputes other blocks."""
    model: Any = with_blocks(Inside)
    model.narrow = nn.Sequential(model.narrow, nn.Tanh())
    mics_shard(model, CONFIG.replace(wrap="Inside", activation_checkpointing="Sequential"))
    regression_loss(model, microbatch("uneven", dist.get_rank(), 4)).backward()
    return all(param.grad is not None for param in model.parameters())


def test_what_is_enabled_later_is_found_and_other_blocks_may_recompute_themselves(pool: WorkerPool) -> None:
    for text in pool.run(enabled_later, world_size=2):
        assert "recomputes GPT2Block" in text and "gradient_checkpointing_disable()" in text
    assert pool.run(beside, world_size=2) == [True] * 2


def unlike() -> str:
    odd = dist.get_rank() % 2

    def choose(module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm if odd else Block)

    with pytest.raises(MiCSConfigError) as error:
        mics_shard(Regressor(), CONFIG.replace(activation_checkpointing=choose))
    return str(error.value)


def test_ranks_that_choose_otherwise_are_told(pool: WorkerPool) -> None:
    for text in pool.run(unlike, world_size=2):
        assert "the modules that activation_checkpointing= selects" in text


@pytest.mark.parametrize(
    ("how", "says"), [(False, "no block is recomputed"), ("selective", "'selective' keeps the results of products")]
)
def test_nothing_waits_on_the_host_where_blocks_are_not_recomputed_whole(how: Any, says: str) -> None:
    config = MiCSConfig(activation_checkpointing=how, activation_checkpointing_offload=True)
    model = Regressor()
    with pytest.raises(MiCSConfigError, match=says):
        blocks_to_recompute(model, plan_units(model), config)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("Blok", "activation_checkpointing='Blok': the model contains no module of that class. Did you mean 'Block'"),
        (lambda module: False, "activation_checkpointing= selected no module"),
        (nn.ModuleList, "selected a ModuleList, which has no forward"),
    ],
)
def test_a_choice_of_nothing_is_refused(how: Any, says: str) -> None:
    model = Regressor()
    with pytest.raises(MiCSConfigError) as error:
        planned_recomputation(model, plan_units(model), MiCSConfig(activation_checkpointing=how))
    assert says in str(error.value)
