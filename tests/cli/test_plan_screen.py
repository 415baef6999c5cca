import dataclasses
import io

import pytest
from plan_examples import GIB, make_cluster, make_profile
from rich.console import Console

from lightning_mics.cli.plan.drawings import last_microstep, layout_lines, timeline_lines
from lightning_mics.cli.plan.screen import print_planning
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import Host
from lightning_mics.plan.scaling import default_nodes, weak_scaling
from lightning_mics.plan.search import Choices, search, what_helps
from lightning_mics.plan.settings import Training
from lightning_mics.plan.simulate import Event
from lightning_mics.topology import ClusterTopology

TRAINING = Training(param_dtype="bfloat16", optimizer="AdamW")


def find(num_nodes=2, node_size=4, *, layers=4, batches=((1, 4),), limit=None, **choices):
    choices = Choices(batches=batches, memory_limit=limit, **choices)
    return search(make_profile(layers, saved=1e6), make_cluster(num_nodes, node_size), TRAINING, choices)


def find_from(shard_size, num_nodes=2, node_size=4, **choices):
    """Plans where partitions of this size fit, and no smaller ones."""
    plain = {"layers": 16, "activation_checkpointing": False, "reshard_after_forward": True, **choices}
    sizes = {plan.candidate.shard_size: plan.memory.total for plan in find(num_nodes, node_size, **plain).plans}
    return find(num_nodes, node_size, **plain, limit=(sizes[shard_size] + sizes[shard_size // 2]) / 2)


def shown(planning, width=80, **options):
    file = io.StringIO()
    scaling = weak_scaling(planning, default_nodes(planning.cluster.num_nodes)) if planning.plans else []
    print_planning(planning, scaling, Console(file=file, width=width, highlight=False), **options)
    return file.getvalue()


# Scaling.


@pytest.mark.parametrize(("nodes", "expected"), [(1, [1, 2, 4]), (2, [1, 2, 4, 8]), (6, [1, 2, 4, 6, 12, 24])])
def test_scaling_goes_up_to_the_cluster_and_beyond(nodes, expected):
    assert default_nodes(nodes) == expected


def test_each_rank_does_the_same_on_every_cluster():
    planning = find(2)
    points = weak_scaling(planning, [1, 2, 4])
    candidates = [point.plan.candidate for point in points]
    assert {(candidate.micro_batch, candidate.accumulation) for candidate in candidates} == {(1, 4)}
    assert [point.plan.candidate.shard_size for point in points if point.label.startswith("full")] == [4, 8, 16]
    assert len({point.plan.candidate.shard_size for point in points if point.label.startswith("MiCS")}) == 1


def test_the_point_of_the_cluster_is_the_plan_itself():
    planning = find(2)
    points = {(point.label, point.num_nodes): point for point in weak_scaling(planning, [1, 2])}
    for plan in (planning.best, *planning.contenders):
        point = points[plan.candidate.label, 2]
        assert point.plan.samples_per_second == pytest.approx(plan.samples_per_second)
        first = points.get((plan.candidate.label, 1), point)
        of_a_node = point.plan.samples_per_second / 2 / (first.plan.samples_per_second / first.num_nodes)
        assert point.efficiency == pytest.approx(of_a_node)


def test_what_does_not_fit_has_no_efficiency_and_what_does_not_divide_no_point():
    planning = find_from(8, 4, 2, optimizer_shard_size="partition")
    points = weak_scaling(planning, [1, 2, 3, 4, 8])
    for point in points:
        assert (point.efficiency is None) is not point.plan.fits
    partition = planning.best.candidate.shard_size
    assert partition == 8
    assert {point.num_nodes for point in points if point.label.startswith("MiCS")} == {4, 8}
    assert {point.efficiency for point in points if point.label == "DDP"} == {None}


# The screen.


def test_everything_is_there_in_80_columns():
    text = shown(find(2, batches=((1, 4), (2, 2))), assumed={"batch", "sequence"})
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "stack: 51.4 M parameters, 4 blocks",
        "bf16-mixed, AdamW",
        "2 nodes x 4 test",
        "(assumed: the longest that the model takes; --sequence)",
        "32 samples in an optimizer step",
        "What fits, the best first",
        "re- GiB of sam- step at at over-",
        "The advice ",
        "Memory of a rank: ",
        "What a node sends in an optimizer step",
        "Timeline of the last of",
        "Compared with other ways to train",
        "Weak scaling",
        "trainer = Trainer(",
        "MiCSPlugin( shard_size=4, optimizer_shard_size=",
        "--write mics.yaml",
    ):
        assert words in " ".join(text.split()), words
    assert "…" not in text  # no cell is cut


def test_a_node_alone_has_columns_without_overlap_only():
    head = shown(find(1)).partition("What fits")[2].partition("───")[0]
    assert "over-" in head and "links" not in head and "50%" not in head


def test_what_does_not_fit_says_what_would_make_it():
    planning = find(2, layers=16, batches=((64, 1),), shard_sizes=[4], optimizer_shard_size="partition")
    total = planning.plans[-1].memory.total
    planning = find(
        2, layers=16, batches=((64, 1),), shard_sizes=[4], optimizer_shard_size="partition", limit=total - 1
    )
    text = " ".join(shown(planning).partition("What does not fit")[2].partition("The best")[0].split())
    assert "micro-batches of 63 or" in text and "optimizer_shard_size='world'" in text
    assert f"memory_limit='{-(-total // (GIB / 10)) / 10} GiB' of the 80.0 GiB that there are" in text
    worse = dataclasses.replace(planning.misfits[0], memory_limit=0.5 * GIB)
    assert "memory_limit" in "".join(what_helps(planning, worse))  # there is more


def test_little_that_is_missing_may_be_taken_from_the_reserve():
    planning = find(2, layers=16, batches=((64, 1),), shard_sizes=[4], activation_checkpointing=True)
    memory = planning.plans[0].memory
    accelerator = dataclasses.replace(planning.cluster.node.accelerator, memory=int(memory.total - 1))
    cluster = dataclasses.replace(
        planning.cluster, node=dataclasses.replace(planning.cluster.node, accelerator=accelerator)
    )
    small = search(planning.profile, cluster, TRAINING, planning.choices)
    closest = next(misfit for misfit in small.misfits if misfit.memory == memory)
    assert "of it are an assumed reserve)" in what_helps(small, closest)[-1]
    far = dataclasses.replace(closest, memory_limit=memory.total - memory.reserve)
    assert "reserve" not in "".join(what_helps(small, far))


def test_what_is_given_is_not_called_assumed():
    assert "assumed" not in shown(find())


def test_the_table_has_as_many_rows_as_asked_for():
    planning = find(batches=((1, 4), (2, 2)))
    table = shown(planning, top=3).partition("p: ranks")[0]
    assert [line.split()[0] for line in table.splitlines()[-3:]] == ["1", "2", "3"]
    assert f"{len(planning.plans) - 3} more plans fit" in " ".join(shown(planning, top=3).split())


def test_what_does_not_fit_is_explained_by_partition():
    planning = find_from(4, batches=((1, 4), (2, 2)), optimizer_shard_size="partition")
    text = shown(planning)
    closest = min(misfit.memory.total for misfit in planning.misfits if misfit.candidate.shard_size == 1)
    limit = planning.misfits[0].memory_limit
    row = next(line for line in text.partition("What does not fit")[2].splitlines() if line.startswith("1 "))
    assert f"{(closest - limit) / GIB:.1f} GiB too much (micro-batches of 1)" in row and "0 of 2" in row
    assert "does not fit" in next(line for line in text.splitlines() if line.startswith("DDP"))


def test_where_nothing_fits_there_is_no_plan_on_the_screen():
    planning = find(limit=100e6)
    text = shown(planning)
    assert "What does not fit into 95.4 MiB" in text
    assert "Weak scaling" not in text and "What fits" not in text
    with pytest.raises(MiCSConfigError, match="What would make it fit"):
        _ = planning.best


def test_bytes_out_of_a_node_are_compared_with_full_sharding():
    planning = find_from(4, shard_sizes=None)
    ours, theirs = (
        sum(traffic.inter_bytes for traffic in plan.traffic.values())
        for plan in (planning.best, planning.contenders[0])
    )
    assert planning.best.candidate.shard_size == 4
    assert f"{theirs / ours:.1f} times less than with full sharding" in shown(planning)
    assert "nothing leaves it" in shown(find(1))


def test_samples_that_are_no_sequences_have_no_tokens():
    profile = make_profile()
    profile = type(profile)(name="net", root=profile.root, blocks=profile.blocks, source="formula")
    text = shown(search(profile, make_cluster(), TRAINING, Choices(batches=[(1, 4)])))
    assert "tokens" not in text and "no sequences" in text and "a formula" in text


def test_what_is_not_known_of_samples_is_said():
    profile = dataclasses.replace(make_profile(saved=0), sequence_length=None, source="shapes only")
    text = shown(search(profile, make_cluster(), TRAINING, Choices(batches=[(1, 4)])))
    assert "64.0 GiB for each rank (20% are kept free for activations)" in text
    assert "a sample. Let the factory" in " ".join(text.split()) and "unknown" in text
    assert "kept free" not in shown(find())


def test_a_terminal_without_unicode_gets_plain_bars():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    planning = find()
    print_planning(planning, weak_scaling(planning, [1, 2]), Console(file=file, width=80, highlight=False))
    file.seek(0)
    assert "####" in file.read()


# Layout and timeline.


def test_the_layout_of_a_large_cluster_is_shortened():
    lines = layout_lines(ClusterTopology(world_size=4096, node_size=8).layout(16), 80)
    assert len(lines) < 12 and max(map(len, lines)) <= 80
    assert any("509 more nodes" in line for line in lines)
    assert lines[0].startswith("4096 ranks = 512 node(s) x 8; 256 replica(s) x 16 shard(s)")


def test_the_layout_of_a_small_cluster_is_whole():
    layout = ClusterTopology(world_size=8, node_size=4).layout(4)
    assert layout_lines(layout, 80) == str(layout).splitlines()


def event(stream, phase, start, end, microstep=0):
    return Event(stream=stream, unit="block", phase=phase, microstep=microstep, start=start, end=end)


def test_a_timeline_shows_what_overlaps_and_what_waits():
    events = [
        event("gather", "forward", 0, 2),
        event("compute", "forward", 2, 6),
        event("compute", "backward", 6, 8),
        event("reduce", "backward", 8, 10),
        event("compute", "step", 10, 10.4),
    ]
    compute, gather, reduce = timeline_lines(events, 11 + 52)
    assert compute == f"compute    {'.' * 10}{'F' * 20}{'B' * 10}{'.' * 10}OO"
    assert gather == f"gather     {'G' * 10}"
    assert reduce == f"reduce     {' ' * 40}{'R' * 10}"


def test_short_events_show_as_small_letters():
    compute, gather = timeline_lines([event("compute", "forward", 0, 10), event("gather", "forward", 5, 5.1)], 21)
    assert compute == "compute    FFFFFFFFFF"
    assert gather == "gather          g"


def test_the_last_microstep_ends_with_the_optimizer():
    time = find(batches=((1, 8),)).best.time
    window = last_microstep(time)
    assert {entry.microstep for entry in window} == {max(entry.microstep for entry in time.events)}
    assert window[-1].phase == "step"


def test_the_screen_says_where_the_host_holds_up_the_device():
    block = dataclasses.replace(make_profile().blocks[0], forward_launches=20, backward_launches=40)
    profile = dataclasses.replace(make_profile(), blocks=(block,) * 4)
    words = []
    for seconds in (1e-9, 1e-3, 0.0):
        cluster = make_cluster().with_host(Host(launch=seconds, unit=seconds, name="tried"))
        planning = search(profile, cluster, TRAINING, Choices(batches=((1, 4),)))
        words.append(" ".join(shown(planning).split()))
    assert "The host (of kind tried: 0.00100 us an operation, 0.00100 us a gather) works for" in words[0]
    assert "ahead of the device." in words[0] and "Bound by the host" not in words[0]
    assert "Bound by the host: a larger micro-batch, compiled blocks or fewer, larger units." in words[1]
    assert "host" not in words[2]
