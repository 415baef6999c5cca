"""The yardstick: training sharded is training in one process that sees the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import parity
import pytest
import torch
from parity import BOUND, Case, check, comparison, layouts, train_alone
from works import works

from lightning_mics.testing import WorkerPool

# By microstep and replica: -1 runs no block. Blocks 0 and 1 take turns, also between replicas; block 2 is unused in
# whole windows, block 3 always.
ROUTES = {
    1: ((0,), (-1,), (1,), (1,), (-1,), (-1,), (0,), (2,), (-1,), (-1,)),
    2: ((0, 1), (0, -1), (-1, -1), (1, 0), (1, 1), (-1, 0), (0, 0), (-1, 2), (2, 2), (-1, -1)),
    4: ((0, 1, 2, -1), (1, 0, -1, 0), (-1, -1, -1, -1), (0, 0, 1, 1), (-1, 0, -1, -1), (2, 1, 0, -1)),
}


def spans_nodes(shard: int, node: int) -> bool:
    return shard > node


@pytest.mark.parametrize(
    ("world", "accumulate"),
    [(2, 1), (2, 4), (4, 1), (4, 4), pytest.param(8, 1, marks=pytest.mark.campaign), (8, 4)],
)
def test_every_layout_trains_like_one_process(pool: WorkerPool, world: int, accumulate: int) -> None:
    def cases() -> Iterator[Case]:
        for shard, node in layouts(world):
            case = Case("uneven", world, shard, node, accumulate)
            yield case
            if spans_nodes(shard, node) and node > 1:
                yield Case("uneven", world, shard, node, accumulate, settings=(("hierarchical", False),))

    check(pool, cases())


KINDS = {
    "gpt2": "GPT-2 of transformers",
    "bert": "BERT of transformers",
    "llama": "Llama of transformers",
    "frozen": "Frozen parameters",
    "tied": "Weights tied over units",
    "shared": "A block that is used in two places",
    "twice": "A block that runs twice",
}


@pytest.mark.parametrize(
    "model", [pytest.param(kind, marks=works("Model kinds", name)) for kind, name in KINDS.items()]
)
def test_every_kind_of_model_trains_like_one_process(pool: WorkerPool, model: str) -> None:
    cases = [Case(model, 4, shard, 2, 4) for shard in (1, 2, 4)]
    check(pool, [*cases, Case(model, 4, 2, 2, 1, optimizer="adamw"), Case(model, 4, 4, 2, 4, optimizer="adamw")])


def test_eight_ranks_train_a_tied_model_like_one_process(pool: WorkerPool) -> None:
    check(pool, [Case("gpt2", 8, 4, 2, 4), Case("gpt2", 8, 4, 2, 4, settings=(("hierarchical", False),))])


@works("Model kinds", "Parameters that some microsteps, ranks or replicas do not use")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_sometimes_unused_parameters_train_like_in_one_process(pool: WorkerPool, accumulate: int) -> None:
    cases = [Case("routed", 4, 4 // num, 2, accumulate, routes=routes) for num, routes in ROUTES.items()]
    check(pool, [*cases, Case("routed", 4, 2, 2, accumulate, optimizer="adamw", routes=ROUTES[2])])


def test_gradients_are_clipped_by_the_norm_of_one_process(pool: WorkerPool) -> None:
    check(pool, [Case("frozen", 4, shard, 2, 2, clip=0.05) for shard in (1, 2, 4)])


@works("Training loops", "An incomplete last window, closed by hand")
def test_an_incomplete_window_is_closed_by_hand(pool: WorkerPool) -> None:
    check(pool, [Case("uneven", 4, shard, 2, 4, incomplete=True) for shard in (2, 4)])


SETTINGS = {
    "activation checkpointing": {"activation_checkpointing": True},
    "units kept after forward": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "fine units": {"wrap": ("Linear", "LayerNorm")},
    "reduction in the gradients' own dtype": {"reduce_dtype": None},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_change_no_number(pool: WorkerPool, settings: dict[str, object]) -> None:
    check(pool, [Case("uneven", 4, shard, 2, 2, settings=tuple(settings.items())) for shard in (2, 4)])


# What the yardstick would notice.


def scale(optimizer: torch.optim.Optimizer, factor: float) -> torch.optim.Optimizer:
    """Makes all gradients wrong by a factor."""

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.mul_(factor)

    optimizer.register_step_pre_hook(hook)
    return optimizer


def without_decay(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


def lose_a_microstep(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_of, calls = parity.loss_of, iter(range(1000))
    monkeypatch.setattr(parity, "loss_of", lambda *args: loss_of(*args) * (next(calls) != 5))


@pytest.mark.parametrize("fault", ["gradients 1 % too large", "gradients halved", "lost microstep", "no weight decay"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", ["gpt2", "bert", "uneven"])
def test_weights_tell_faults_from_rounding(
    monkeypatch: pytest.MonkeyPatch, model: str, optimizer: str, fault: str
) -> None:
    case = Case(model, 4, 1, 1, 4, optimizer=optimizer)
    right, make_optimizer = train_alone(case), parity.make_optimizer
    if fault == "lost microstep":
        lose_a_microstep(monkeypatch)
    else:
        spoil = {
            "gradients 1 % too large": lambda optimizer: scale(optimizer, 1.01),
            "gradients halved": lambda optimizer: scale(optimizer, 0.5),
            "no weight decay": without_decay,
        }[fault]
        monkeypatch.setattr(parity, "make_optimizer", lambda *args: spoil(make_optimizer(*args)))
    wrong = comparison(case, train_alone.__wrapped__(case), right)
    assert wrong.weight > 50 * BOUND
    with pytest.raises(AssertionError, match=f"{wrong.worst} differs by"):
        replace(wrong, loss=0.0, norm=0.0).check()
