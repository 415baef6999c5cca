"""The host never waits for the device in a window, but where this file says so."""

from __future__ import annotations

import pytest
from stream_checker import StreamChecker
from stream_windows import CONFIGURATIONS, WINDOWS, Run
from stream_world import pretended_device

from lightning_mics.core.runtime import runtime_of

# Who may wait, and why; what is not in here fails, and so does what nobody needs any more.
_WITHOUT_GLOO = {
    "core/gradients/agreement.py (maximum)": "hosts wait for one another's message, on a stream of its own",
}
_SELF_CHECK = {
    "core/replicas.py (differing)": "the self-check, once, in the first window",
}
_SELF_CHECK_WITHOUT_GLOO = {
    "core/replicas.py (raise_together)": "the self-check: objects travel by the device if NCCL is alone",
}
_VERIFY_EVERY = {
    "core/drift.py (read)": "fingerprints behind the last step, with a forward pass launched since",
}


def where(checker: StreamChecker) -> set[str]:
    return {wait.where for wait in checker.host_waits}


@pytest.mark.parametrize("configuration", ["flat", "hierarchical", "bf16 parameters", "p=1"])
@pytest.mark.parametrize("window", ["accumulation", "clipped", "replaced everywhere", "unused on this rank only"])
def test_the_host_does_not_wait_in_a_window(window: str, configuration: str) -> None:
    checker = WINDOWS[window].run(CONFIGURATIONS[configuration], has_gloo=True)
    assert not checker.host_waits, "\n".join(map(str, checker.host_waits))
    assert not checker.races


@pytest.mark.parametrize("configuration", ["flat", "p=1"])
@pytest.mark.parametrize("window", ["accumulation", "clipped", "unused on this rank only"])
def test_without_gloo_it_waits_for_no_computation(window: str, configuration: str) -> None:
    checker = WINDOWS[window].run(CONFIGURATIONS[configuration])
    assert where(checker) == set(_WITHOUT_GLOO), "\n".join(map(str, checker.host_waits))
    streams = {name for wait in checker.host_waits for name in wait.streams}
    assert not streams & {"compute", "gather", "copy-in", "reduce"}


@pytest.mark.parametrize("has_gloo", [False, True])
def test_hosts_talk_over_no_group_of_a_hop(has_gloo: bool) -> None:
    for configuration in (CONFIGURATIONS["flat"], CONFIGURATIONS["p=1"]):
        with pretended_device(configuration.world_size, configuration.rank, has_gloo=has_gloo):
            mesh = runtime_of(Run(configuration, {}).model).mesh
            is_free = mesh.host_group not in (mesh.partition_group, mesh.replication_group)
            assert mesh.host_group.size() == configuration.world_size
            assert is_free or has_gloo


def test_what_waits_on_purpose_is_listed() -> None:
    assert where(WINDOWS["self-check"].run(CONFIGURATIONS["flat"], has_gloo=True)) == set(_SELF_CHECK)
    without = where(WINDOWS["self-check"].run(CONFIGURATIONS["flat"]))
    assert without == {*_WITHOUT_GLOO, *_SELF_CHECK, *_SELF_CHECK_WITHOUT_GLOO}


@pytest.mark.parametrize("configuration", ["flat", "hierarchical", "p=1"])
def test_fingerprints_are_read_when_the_device_has_more_to_do(configuration: str) -> None:
    chosen = CONFIGURATIONS[configuration]
    checker = WINDOWS["verify_every"].run(chosen, has_gloo=True)
    has_replicas = chosen.world_size > chosen.settings.get("shard_size", 2)
    assert where(checker) <= set(_VERIFY_EVERY), "\n".join(map(str, checker.host_waits))
    assert {wait.kind for wait in checker.host_waits} <= {"synchronize"}  # of an event, before anything later
    assert bool(checker.host_waits) is has_replicas and not checker.races
    assert not WINDOWS["verify_every, repair"].run(chosen, has_gloo=True).races


@pytest.mark.parametrize("window", ["clipped, norm read"])
def test_what_a_user_reads_is_counted(window: str) -> None:
    waits = where(WINDOWS[window].run(CONFIGURATIONS["flat"], has_gloo=True))
    assert waits == {"stream_windows.py (_clip_and_read)"}
