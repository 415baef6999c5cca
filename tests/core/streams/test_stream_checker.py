"""The checker itself: it finds what is unordered, and only that, in small programs and in plain FSDP2."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from stream_checker import StreamChecker
from stream_clocks import Settings, Stream
from stream_device import StandInDevice
from stream_plain import PLAIN, Plain
from stream_world import pretended_device


class Program:
    """Two streams and a tensor, in a run of the checker."""

    def __init__(self, checker: StreamChecker) -> None:
        self.checker = checker
        self.device = StandInDevice(checker.timeline)
        self.compute = self.device.current_stream()
        self.side = Stream(checker.timeline, "side")
        self.tensor = torch.zeros(4, device="cuda")

    def on_side(self, launch: Callable[[], object], *, waits: bool) -> None:
        """Launches something on the other stream."""
        if waits:
            self.side.wait_stream(self.compute)
        with self.device.stream(self.side):
            launch()


def read_what_is_written(program: Program, waits: bool) -> None:
    program.on_side(lambda: program.tensor + 1, waits=waits)


def write_what_is_written(program: Program, waits: bool) -> None:
    program.on_side(lambda: program.tensor.zero_(), waits=waits)


def write_what_is_read(program: Program, waits: bool) -> None:
    program.side.wait_stream(program.compute)
    program.tensor + 1
    program.on_side(lambda: program.tensor.zero_(), waits=waits)


def free_what_is_read(program: Program, waits: bool) -> None:
    program.on_side(lambda: program.tensor + 1, waits=True)
    del program.tensor
    if waits:
        program.compute.wait_stream(program.side)
    torch.ones(4, device="cuda")


def reduce_what_is_written(program: Program, waits: bool) -> None:
    program.side.wait_stream(program.compute)
    with program.device.stream(program.side):
        work = dist.all_reduce(program.tensor, async_op=True)
    if waits:
        work.wait()
    program.tensor + 1


def write_what_is_broadcast(program: Program, waits: bool) -> None:
    work = dist.broadcast(program.tensor, src=dist.get_rank(), async_op=True)
    if waits:
        work.wait()
    program.tensor.zero_()


def read_on_host(program: Program, waits: bool) -> None:
    if waits:
        program.tensor.sum().item()
    program.on_side(lambda: program.tensor + 1, waits=False)


def read_copy_on_host(program: Program, waits: bool) -> None:
    copied = program.tensor.to("cpu", non_blocking=True)
    if waits:
        program.device.current_stream().synchronize()
    copied + 1


def write_on_host_what_is_copied(program: Program, waits: bool) -> None:
    source = torch.zeros(4).pin_memory()
    source.to("cuda", non_blocking=True)
    if waits:
        program.device.current_stream().record_event().synchronize()
    source.zero_()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(
    ("launches", "kinds"),
    [
        (read_what_is_written, {"RAW"}),
        (write_what_is_written, {"WAW"}),
        (write_what_is_read, {"WAR"}),
        (free_what_is_read, {"FREED"}),
        (reduce_what_is_written, {"RAW"}),
        (write_what_is_broadcast, {"WAR"}),
        (read_on_host, {"RAW"}),
        (read_copy_on_host, {"RAW"}),
        (write_on_host_what_is_copied, {"WAR"}),
    ],
)
def test_a_missing_wait_is_a_race_and_a_wait_mends_it(
    launches: Callable[[Program, bool], None], kinds: set[str], waits: bool
) -> None:
    with pretended_device() as checker, checker:
        launches(Program(checker), waits)
    assert {race.kind for race in checker.races} == (set() if waits else kinds)


def test_ranges_that_do_not_meet_are_no_race() -> None:
    with pretended_device() as checker, checker:
        program = Program(checker)
        program.side.wait_stream(program.compute)
        program.tensor[:2].add_(1)
        program.on_side(lambda: program.tensor[2:].add_(1), waits=False)
    assert not checker.races


def test_a_recorded_stream_keeps_memory() -> None:
    with pretended_device() as checker, checker:
        program = Program(checker)
        program.on_side(lambda: program.tensor + 1, waits=True)
        program.tensor.record_stream(program.side)
        del program.tensor
        torch.ones(4, device="cuda")
    assert not checker.races


def test_a_synchronous_collective_runs_where_the_settings_say() -> None:
    def run(settings: Settings) -> set[str]:
        with pretended_device(settings=settings) as checker, checker:
            tensor = torch.zeros(4, device="cuda")
            dist.all_reduce(tensor)
            tensor + 1
        return {race.kind for race in checker.races} | set(checker.timeline.waits.sites)

    (wait,) = run(Settings(sync_on_current=False))
    assert "torch/distributed_c10d.py" in wait
    assert run(Settings()) == set()
    assert "RAW" in run(Settings(sync_on_current=False, left_out=frozenset([wait])))


def test_waits_of_the_host_are_counted() -> None:
    with pretended_device() as checker, checker:
        on_device, on_host = torch.ones(4, device="cuda"), torch.ones(4)
        pinned = on_host.pin_memory()
        (on_host.sum() + 1).item()
        pinned.to("cuda", non_blocking=True)
        on_device.copy_(pinned, non_blocking=True)
        assert not checker.host_waits
        on_device.copy_(pinned)
        on_host.to("cuda", non_blocking=True)
        on_device.cpu()
        torch.tensor([1.0], device="cuda")
        bool(on_device.isfinite().all())
        on_device.tolist()
        on_device.nonzero()
        torch.cuda.synchronize()
    pageable = "copy of pageable memory"
    kinds = ["blocking copy", pageable, pageable, pageable, "item", "tolist", "nonzero", "synchronize"]
    assert [wait.kind for wait in checker.host_waits] == kinds


def test_operators_on_both_host_and_device_are_refused() -> None:
    with pretended_device():
        on_device, on_host = torch.ones(4, device="cuda"), torch.ones(4)
        on_device.add_(on_host.sum())
        with pytest.raises(RuntimeError, match="same device"):
            on_device.add_(on_host)
        with pytest.raises(RuntimeError, match="device type cpu"):
            dist.all_reduce(on_host)


@pytest.mark.parametrize("way", ["gathered", "broadcast"])
def test_objects_travel_as_tensors_of_the_device(way: str) -> None:
    def run(settings: Settings) -> StreamChecker:
        with pretended_device(settings=settings) as checker, checker:
            values = [{"step": 1}]
            if way == "broadcast":
                dist.broadcast_object_list(values, src=0)
            else:
                values = [None] * 4
                dist.all_gather_object(values, {"step": 1})
            assert values[0] == {"step": 1}
        return checker

    whole = run(Settings(sync_on_current=False))
    assert whole.host_waits
    assert not whole.races
    sites = frozenset(site for site in whole.timeline.waits.sites if "Work.wait" in site)
    assert sites
    if way == "gathered":  # who broadcasts reads nothing afterwards
        assert run(Settings(sync_on_current=False, left_out=sites)).races


@pytest.mark.parametrize("name", PLAIN)
def test_plain_fsdp2_has_no_races(name: str) -> None:
    checker = PLAIN[name].run()
    assert not checker.races
    assert checker.num_operators > 1000


@pytest.mark.parametrize(
    "function",
    [
        "foreach_all_gather",
        "foreach_all_gather_copy_out",
        "foreach_reduce",
        "_wait_all_gather_streams_on_event",
        "post_backward",
        "finalize_backward",
        "_root_pre_forward",
        "_post_forward",
    ],
)
def test_waits_of_fsdp2_left_out_are_found(function: str) -> None:
    find_waits_left_out(PLAIN["2-D, mixed"], function)


def test_the_wait_for_offloaded_gradients_left_out_is_found() -> None:
    find_waits_left_out(PLAIN["1-D, offloaded"], "finalize_backward")


def find_waits_left_out(plain: Plain, function: str) -> None:
    names = [function, "_wait_for_post_backward"] if function == "finalize_backward" else [function]  # torch < 2.12
    sites = frozenset(site for site in plain.run().timeline.waits.sites if any(f"({name})" in site for name in names))
    assert sites
    assert plain.run(Settings(left_out=sites)).races


def test_what_pytorch_learns_on_the_device_stays_true_after_it() -> None:
    from torch.utils._device import _device_constructors

    _device_constructors.cache_clear()  # as in a process in which no device has been the current one
    with pretended_device(), torch.device("meta"):
        torch.ones(2)
    with torch.device("meta"):
        assert torch.tensor([]).device == torch.as_tensor([]).device == torch.device("meta")
