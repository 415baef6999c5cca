import builtins
import itertools

import pytest
from plan_examples import GIB, make_cluster, make_profile

from lightning_mics.errors import MiCSConfigError, MiCSError
from lightning_mics.plan.scaling import default_nodes, weak_scaling
from lightning_mics.plan.search import Choices, search
from lightning_mics.plan.settings import Training

pytest.importorskip("matplotlib")
from lightning_mics.cli.plan import figures

TRAINING = Training(param_dtype="bfloat16", optimizer="AdamW")


def find(num_nodes=2, *, layers=4, batches=((1, 4),), limit=None, **choices):
    choices = Choices(batches=batches, memory_limit=limit, **choices)
    return search(make_profile(layers), make_cluster(num_nodes), TRAINING, choices)


def draw(planning, target):
    return figures.draw(planning, weak_scaling(planning, default_nodes(planning.cluster.num_nodes)), target)


def texts(path):
    return path.read_text(encoding="utf-8")


def test_a_folder_gets_a_picture_of_each(tmp_path):
    files = draw(find(), tmp_path / "new" / "figures")
    assert [file.name for file in files] == ["scaling.png", "sensitivity.png", "timeline.png", "memory.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_file_gets_all_in_one(tmp_path):
    (file,) = draw(find(2, layers=16, limit=4 * GIB), tmp_path / "plan.svg")
    text = texts(file)
    assert "38%" in text and ">nothing" in text  # what it rests on
    for words in ("linear scaling", "full sharding", "2-D mesh", "compute waits", "limit 4.0 GiB", "GiB", "as planned"):
        assert f">{words}" in text, words


def test_ways_that_fit_nowhere_are_named(tmp_path):
    planning = find(2, layers=16, limit=3.2 * GIB)
    assert not planning.contenders[-1].fits
    (file,) = draw(planning, tmp_path / "plan.svg")
    assert "DDP needs" in texts(file)


def test_long_steps_show_their_last_microstep():
    best = find(layers=96, batches=((1, 8),), shard_sizes=[4]).best
    events, numbers = figures._window(best)
    assert len(numbers) == 1 and {event.microstep for event in events} == {2}
    assert figures._which(numbers, best) == "only the last microstep of 8, and the optimizer"


def test_short_steps_show_as_many_microsteps_as_can_be_told_apart():
    best = find(layers=2, batches=((1, 2),), shard_sizes=[4]).best
    assert len(figures._window(best)[1]) == 2


@pytest.mark.parametrize("values", [[5.01, 5.0, 4.9, 0.0, 0.0], [5.0, 5.0], [9.0, 2.0, 1.9], [3.0]])
def test_labels_that_would_meet_are_moved_apart(values):
    places = figures._spread(values, 0.6)
    assert all(before - after >= 0.599 for before, after in itertools.pairwise(places))
    assert min(places) >= 0.299
    assert max(abs(place - value) for place, value in zip(places, values, strict=True)) < 1


def test_many_partition_sizes_are_cut_to_those_around_the_best():
    planning = search(make_profile(), make_cluster(1024, 8), TRAINING, Choices(batches=[(1, 1)], hierarchical=False))
    rows = figures._memory_rows(planning)
    sizes = [row.candidate.shard_size for row in rows]
    assert len(rows) == 12 and planning.best.candidate.shard_size in sizes and sizes == sorted(sizes)


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name == "matplotlib":
            raise ImportError
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MiCSError, match=r"pip install 'lightning-mics\[plan\]'"):
        figures.draw(find(), [], tmp_path)


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MiCSConfigError, match="cannot be written"):
        draw(find(), tmp_path / "file" / "figures")


def test_a_node_alone_has_no_links_to_others(tmp_path):
    (file,) = draw(find(1), tmp_path / "plan.svg")
    assert "as predicted" in texts(file) and "38%" not in texts(file)
