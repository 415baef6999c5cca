"""What a loop may do around a step on slices of shards, beside one process that does the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_slices import Net, rows
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from works import works

from lightning_mics import MiCSConfig, clip_grad_norm_, mics_shard
from lightning_mics.core.runtime import is_sharded
from lightning_mics.core.slices import rows_at
from lightning_mics.testing import WorkerPool, full_state_dict

BOUND = 1e-5


class Loop:
    """A loop over the rows of some ranks.

    Args:
        model: A model, sharded or not.
        ranks: Whose rows it trains on.

    Attributes:
        seen: What is to be the same in both loops, beside weights.
    """

    def __init__(self, model: Any, ranks: Sequence[int]) -> None:
        self.model, self.ranks = model, ranks
        self.seen: list[Tensor] = []

    def batch(self, number: int) -> Tensor:
        return torch.cat([rows(rank, number) for rank in self.ranks])

    def backward(self, number: int) -> Tensor:
        loss: Tensor = self.model(self.batch(number)).square().mean()
        loss.backward()
        return loss

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        self.backward(number)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)


def second_backward_passes(loop: Loop) -> None:
    optimizer = adamw(loop.model)
    for number in (0, 2, 4):
        loop.backward(number)
        loop.step(optimizer, number + 1)


def gradients_that_are_looked_at_and_scaled(loop: Loop) -> None:
    optimizer = adamw(loop.model)
    for number in range(3):
        loop.backward(number)
        for param in loop.model.parameters():
            if param.grad is not None:
                loop.seen.append(param.grad.detach().norm())
                param.grad.mul_(0.5)
        optimizer.step()
        loop.model.zero_grad()


def largest_magnitudes(loop: Loop) -> None:
    optimizer = adamw(loop.model)
    for number in range(2):
        loop.backward(number)
        clip: Any = clip_grad_norm_ if number and is_sharded(loop.model) else _clip
        loop.seen.append(clip(loop.model, 0.01, float("inf")))
        optimizer.step()
        optimizer.zero_grad()


def _clip(model: nn.Module, max_norm: float, norm_type: float) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)


def weights_that_are_assigned(loop: Loop) -> None:
    loop.step(adamw(loop.model), 0)
    params = list(loop.model.parameters())  # those that are tied stay so
    copies = {id(param): nn.Parameter(param.detach().clone(), param.requires_grad) for param in params}
    named = loop.model.named_parameters(remove_duplicate=False)
    loop.model.load_state_dict({name: copies[id(param)] for name, param in named}, assign=True)
    optimizer = adamw(loop.model)
    for number in (1, 2):
        loop.step(optimizer, number)


def weights_in_other_memory(loop: Loop) -> None:
    optimizer = adamw(loop.model)
    loop.step(optimizer, 0)
    for param in loop.model.parameters():
        param.data = param.data.clone()
    loop.model.to(torch.float32)
    for number in (1, 2):
        loop.backward(number)
        loop.model.to(torch.float32)
        optimizer.step()
        optimizer.zero_grad()


def weights_that_are_loaded(loop: Loop) -> None:
    """Weights go back, states stay; then states go back, and weights stay."""
    optimizer = adamw(loop.model)
    loop.step(optimizer, 0)
    weights = copy.deepcopy(loop.model.state_dict())
    states = copy.deepcopy(optimizer.state_dict())
    loop.step(optimizer, 1)
    loop.model.load_state_dict(weights)
    loop.step(optimizer, 2)
    optimizer.load_state_dict(states)
    loop.step(optimizer, 3)


def validation_right_after_a_step(loop: Loop) -> None:
    optimizer = adamw(loop.model)
    for number, mode in enumerate((torch.no_grad, torch.inference_mode, torch.no_grad)):
        loop.step(optimizer, number)
        loop.model.eval()
        with mode():
            loop.seen.append(loop.model(rows(0, 9)).clone())
        loop.model.train()


class Twice(torch.optim.Optimizer):
    """Evaluates its closure twice, and steps after each."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        for _ in range(2):
            loss = closure()
            with torch.no_grad():
                for group in self.param_groups:
                    for param in group["params"]:
                        if param.grad is not None:
                            average = self.state[param].setdefault("average", torch.zeros_like(param))
                            average.mul_(0.9).add_(param.grad)
                            param.add_(average, alpha=-0.05)
        return loss


def closures_that_are_evaluated_twice(loop: Loop) -> None:
    optimizer = Twice(loop.model.parameters())
    for number in range(2):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            return loop.backward(number)

        optimizer.step(closure)


def steps_without_gradients(loop: Loop) -> None:
    optimizer = adamw(loop.model)
    for number in range(3):
        optimizer.step()
        loop.step(optimizer, number)


SCENARIOS: list[Callable[[Loop], None]] = [
    second_backward_passes,
    gradients_that_are_looked_at_and_scaled,
    largest_magnitudes,
    weights_that_are_assigned,
    weights_in_other_memory,
    weights_that_are_loaded,
    validation_right_after_a_step,
    closures_that_are_evaluated_twice,
    steps_without_gradients,
]


def differences(p: int) -> dict[str, str]:
    found = {}
    for scenario in SCENARIOS:
        torch.manual_seed(0)
        alone = Net()
        config = MiCSConfig(shard_size=p, optimizer_shard_size="world")
        loops = [Loop(mics_shard(copy.deepcopy(alone), config), [dist.get_rank()])]
        loops.append(Loop(alone, range(dist.get_world_size())))
        try:
            for loop in loops:
                scenario(loop)
            whole = full_state_dict(loops[0].model)
            pairs = [(whole[name], value) for name, value in alone.state_dict().items()]
            pairs += list(zip(*(loop.seen for loop in loops), strict=True))
            worst = max(abs(float((_whole(mine) - other).abs().max())) for mine, other in pairs)
            outcome = "" if worst <= BOUND else f"differs by {worst:.1e}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        if outcome:
            found[scenario.__name__] = outcome
    return found


def _whole(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


@works("Training loops", "`.to(device)`, `load_state_dict(assign=True)` of sharded models, optimizer_shard_size")
@works("Training loops", "Closures that are evaluated twice, with optimizer_shard_size")
@pytest.mark.parametrize("world, p", [(4, 2), (2, 1), (1, 1)])
def test_what_loops_do_ends_as_in_one_process(pool: WorkerPool, world: int, p: int) -> None:
    for found in pool.run(differences, p, world_size=world):
        assert found == {}


def test_slices_are_the_blocks_of_a_tensor_on_two_dimensions() -> None:
    """Of what a shard has, and not of what it is padded to."""
    for num_rows, p, m in itertools.product(range(1, 41), (1, 2, 3, 4, 8), (2, 3, 4)):
        for place in itertools.product(range(p), range(m)):
            shape, offset = _compute_local_shape_and_global_offset((num_rows,), (p, m), place, [Shard(0), Shard(0)])
            shard = rows_at(place[0], p, num_rows)
            mine = rows_at(place[1], m, shard.stop - shard.start)
            assert mine.stop - mine.start == shape[0]
            assert not shape[0] or shard.start + mine.start == offset[0]
