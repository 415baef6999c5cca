"""The yardstick: training sharded is training in one process that sees the global batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from parity import Case, compare, layouts

from lightning_mics.testing import WorkerPool

# By microstep and replica: -1 runs no block. Blocks 0 and 1 take turns, also between replicas; block 2 is unused in
# whole windows, block 3 always.
ROUTES = {
    1: ((0,), (-1,), (1,), (1,), (-1,), (-1,), (0,), (2,), (-1,), (-1,)),
    2: ((0, 1), (0, -1), (-1, -1), (1, 0), (1, 1), (-1, 0), (0, 0), (-1, 2), (2, 2), (-1, -1)),
    4: ((0, 1, 2, -1), (1, 0, -1, 0), (-1, -1, -1, -1), (0, 0, 1, 1), (-1, 0, -1, -1), (2, 1, 0, -1)),
}


def check(pool: WorkerPool, cases: Iterator[Case] | list[Case]) -> None:
    cases = list(cases)
    for comparisons in pool.run(compare, cases, world_size=cases[0].world, timeout=120):
        for comparison in comparisons:
            comparison.check()


def spans_nodes(shard: int, node: int) -> bool:
    return shard > node


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_layout_trains_like_one_process(pool: WorkerPool, world: int, accumulate: int) -> None:
    def cases() -> Iterator[Case]:
        for shard, node in layouts(world):
            case = Case("uneven", world, shard, node, accumulate)
            yield case
            if spans_nodes(shard, node) and node > 1:
                yield Case("uneven", world, shard, node, accumulate, settings=(("hierarchical", False),))

    check(pool, cases())


@pytest.mark.parametrize("model", ["gpt2", "bert", "llama", "frozen", "tied", "shared", "twice"])
def test_every_kind_of_model_trains_like_one_process(pool: WorkerPool, model: str) -> None:
    cases = [Case(model, 4, shard, 2, 4) for shard in (1, 2, 4)]
    check(pool, [*cases, Case(model, 4, 2, 2, 1, optimizer="adamw"), Case(model, 4, 4, 2, 4, optimizer="adamw")])


def test_eight_ranks_train_a_tied_model_like_one_process(pool: WorkerPool) -> None:
    check(pool, [Case("gpt2", 8, 4, 2, 4), Case("gpt2", 8, 4, 2, 4, settings=(("hierarchical", False),))])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_sometimes_unused_parameters_train_like_in_one_process(pool: WorkerPool, accumulate: int) -> None:
    cases = [Case("routed", 4, 4 // num, 2, accumulate, routes=routes) for num, routes in ROUTES.items()]
    check(pool, [*cases, Case("routed", 4, 2, 2, accumulate, optimizer="adamw", routes=ROUTES[2])])


def test_gradients_are_clipped_by_the_norm_of_one_process(pool: WorkerPool) -> None:
    check(pool, [Case("frozen", 4, shard, 2, 2, clip=0.05) for shard in (1, 2, 4)])


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
