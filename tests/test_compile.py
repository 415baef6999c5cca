"""torch.compile: the numbers and the hops of eager training, and nothing compiled anew after two steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from compile_ways import WAYS, Seen, reference_of, seen_of, through_a_checkpoint
from works import works

from lightning_mics.testing import WorkerPool, relative_difference, weight_differences

BOUND = 1e-5
# Compiled in the suite by inductor as well; the whole grid is a campaign.
IN_WORDS = {
    "blocks_then_shard": "block.compile() for each block, then mics_shard",
    "shard_then_blocks": "mics_shard, then block.compile() for each block",
    "wrap_then_shard": "torch.compile(block) in the place of each block, then mics_shard",
    "shard_then_wrap": "mics_shard, then torch.compile(block) in the place of each block",
    "regions_then_shard": "compile_regions(model) of Accelerate, then mics_shard",
    "shard_then_regions": "mics_shard, then compile_regions(model) of Accelerate",
    "whole_then_shard": "model.compile(), then mics_shard",
    "wrap_whole_then_shard": "torch.compile(model), then mics_shard",
    "shard_then_wrap_whole": "mics_shard, then torch.compile(model)",
    "accelerate_regional": "TorchDynamoPlugin(use_regional_compilation=True) of Accelerate",
    "accelerate_whole": "TorchDynamoPlugin() of Accelerate",
    "fabric": "fabric.setup(torch.compile(model))",
    "trainer_blocks": "block.compile() in configure_model, Lightning Trainer",
    "trainer_in_place": "module.compile() before Trainer.fit",
    "huggingface": "TrainingArguments(torch_compile=True)",
}
BY_INDUCTOR = ("blocks_then_shard", "accelerate_regional")
# The root's graph is left where its first unit is called; mostly Dynamo does not count that as a break.
# And what looks for plain layers around a sharded module is called, outside of graphs, until the first pass has begun.
WITH_A_GRAPH_BREAK = ("trainer_in_place", "shard_then_regions")


@pytest.fixture(scope="module")
def eager(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Seen]]:
    folder = tmp_path_factory.mktemp("eager")
    return cache(lambda reference: pool.run(seen_of, None, reference, "", folder, world_size=4))


def check(found: list[Seen], expected: list[Seen]) -> str:
    """Checks every rank; returns what was seen."""
    loss = weight = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        loss = max(loss, *map(relative_difference, ours.losses, theirs.losses))
        weight = max(weight, *weight_differences(ours.weights, theirs.weights).values())
        assert loss <= BOUND and weight <= BOUND and ours.weights.keys() == theirs.weights.keys()
        assert ours.traffic == theirs.traffic
        assert ours.graphs > 0 and theirs.graphs == 0
        assert ours.frames[1] == ours.frames[-1], f"compiled anew: {ours.frames}"
    first = found[0]
    return (
        f"losses within {loss:.0e}, weights within {weight:.0e}; {first.graphs} graphs, {first.breaks} graph breaks, "
        f"{first.frames[-1] - first.frames[1]} compilations after the second step; hops as without"
    )


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=works("Ways to compile", words)) for way, words in IN_WORDS.items()]
)
def test_every_way_trains_like_eager(
    pool: WorkerPool, eager: Callable[[str], list[Seen]], tmp_path: Path, way: str
) -> None:
    backend = "inductor" if way in BY_INDUCTOR else "aot_eager"
    found = pool.run(seen_of, way, reference_of(way), backend, tmp_path, world_size=4, timeout=240)
    check(found, eager(reference_of(way)))
    assert found[0].breaks == (way in WITH_A_GRAPH_BREAK)


def test_every_way_has_words() -> None:
    assert IN_WORDS.keys() == WAYS.keys()


@pytest.mark.campaign
@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_like_eager_by_inductor(
    pool: WorkerPool,
    eager: Callable[[str], list[Seen]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    way: str,
) -> None:
    found = pool.run(seen_of, way, reference_of(way), "inductor", tmp_path, world_size=4, timeout=400)
    record_property("figures", check(found, eager(reference_of(way))))


@pytest.mark.parametrize(
    ("compiles", "loads"),
    [("wrap_then_shard", "eager"), ("eager", "wrap_whole_then_shard"), ("regions_then_shard", "shard_then_wrap_whole")],
)
def test_checkpoints_have_the_names_of_plain_models(
    pool: WorkerPool, tmp_path: Path, compiles: str, loads: str
) -> None:
    for differences in pool.run(through_a_checkpoint, compiles, loads, tmp_path / "saved", world_size=4):
        assert set(differences.values()) == {0.0}
