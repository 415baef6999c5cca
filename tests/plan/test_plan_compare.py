import json

import pytest
from plan_examples import make_cluster, make_profile

from lightning_mics.cli.plan.write import to_json
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.compare import Figures, PlannedRun, Run
from lightning_mics.plan.search import Choices, search
from lightning_mics.plan.settings import Training
from lightning_mics.text import format_bytes, format_number

RUN = Run(
    world_size=8,
    shard_size=4,
    optimizer_shard_size=None,
    accumulation=4,
    activation_checkpointing=False,
    reshard_after_forward=True,
)


@pytest.fixture
def written(tmp_path):
    planning = search(make_profile(), make_cluster(), Training(optimizer="AdamW"), Choices(batches=[(2, 4), (1, 4)]))
    file = tmp_path / "plan.json"
    file.write_text(to_json(planning))
    return planning, file


def changed(**settings):
    return Run(**{**vars(RUN), **settings})


def test_the_line_and_the_table_say_how_far_off_it_was(written):
    planning, file = written
    plan = next(
        plan
        for plan in planning.plans
        if (plan.candidate.shard_size, plan.candidate.micro_batch, plan.candidate.slices) == (4, 2, 1)
        and plan.candidate.reshard_after_forward
        and not plan.candidate.activation_checkpointing
    )
    memory = plan.memory.total - plan.memory.reserve
    seconds = 1.5 * plan.time.seconds
    waits = {"gather": 0.1 * seconds, "reduce": 0.02 * seconds, "replicate": 0.005 * seconds}
    measured = Figures(seconds=seconds, memory=0.8 * memory, inter_bytes=plan.inter_bytes, exposed=waits)
    said, head, step, peak, sent, exposed, *parts = PlannedRun(file, RUN).compare(2, measured).splitlines()
    assert said == (
        f"A step takes {format_number(measured.seconds)} s, 50% more than {file} says; a rank needs "
        f"{format_bytes(measured.memory)}, 20% less."
    )
    assert head.split() == ["planned", "measured"]
    assert step.split()[0] == "step" and step.split()[-1] == "+50%" and format_number(plan.time.seconds) in step
    assert peak.split()[-1] == "-20%" and format_bytes(memory) in peak
    assert sent.split()[-1] == "+0%" and sent.count(format_bytes(plan.inter_bytes)) == 2
    assert exposed.split()[-2:] == [f"{plan.time.waiting:.1%}", "12.5%"]
    shares = [f"{plan.time.exposed[part] / plan.time.seconds:.1%}" for part in waits]
    assert [line.split() for line in parts] == [
        [part, share, found] for part, share, found in zip(waits, shares, ("10.0%", "2.0%", "0.5%"), strict=True)
    ]
    assert max(map(len, (head, step, peak, sent, exposed))) <= 80
    unknown = PlannedRun(file, RUN).compare(2, Figures(seconds=1.0, memory=None, inter_bytes=0))
    assert "a rank needs" not in unknown and "peak" not in unknown and unknown.endswith("-         ")


def test_other_micro_batches_are_not_compared(written):
    said = PlannedRun(written[1], RUN).compare(3, Figures(seconds=1.0, memory=None, inter_bytes=0))
    assert "plans for micro-batches of 1, 2, and this run has 3" in said and "\n" not in said


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (changed(world_size=16), "plans for 8 ranks, and this run has 16"),
        (changed(accumulation=3), "has no plan with shard_size=4, accumulation=3, activation_checkpointing=False"),
        (changed(optimizer_shard_size=8), "optimizer_shard_size=8"),
        (changed(activation_checkpointing=["Block"]), "choose blocks by activation_checkpointing=True, a number or"),
    ],
)
def test_what_was_not_planned_is_refused(written, run, words):
    with pytest.raises(MiCSConfigError, match=words):
        PlannedRun(written[1], run)


@pytest.mark.parametrize("text", ["", "[]", "{}", "instance: p4d", json.dumps({"plans": []})])
def test_what_is_no_plan_is_refused(tmp_path, text):
    file = tmp_path / "plan.json"
    with pytest.raises(MiCSConfigError, match="cannot be read"):
        PlannedRun(file, RUN)
    file.write_text(text)
    with pytest.raises(MiCSConfigError, match="is not what mics plan --json writes"):
        PlannedRun(file, RUN)
