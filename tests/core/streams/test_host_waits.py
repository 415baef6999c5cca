"""The host never waits for the device in a window, but where this file says so."""

from __future__ import annotations

import pytest
from stream_checker import StreamChecker
from stream_windows import CONFIGURATIONS, WINDOWS

# Who may wait, and why; what is not in here fails, and so does what nobody needs any more.
_EVERY_WINDOW = {
    "core/gradients/agreement.py (agree)": "TODAY: what was used is sent to the device, and the answer is read",
}
_SOME_WINDOWS = {
    "core/replicas.py (differing)": "the self-check, once, in the first window",
    "core/replicas.py (raise_together)": "the self-check: objects travel by the device if NCCL is alone",
}


def where(checker: StreamChecker) -> set[str]:
    return {wait.where for wait in checker.host_waits}


@pytest.mark.parametrize("configuration", ["flat", "hierarchical", "bf16 parameters", "p=1"])
@pytest.mark.parametrize("window", ["accumulation", "clipped", "replaced everywhere", "unused on this rank only"])
def test_the_host_does_not_wait_in_a_window(window: str, configuration: str) -> None:
    checker = WINDOWS[window].run(CONFIGURATIONS[configuration])
    assert where(checker) == set(_EVERY_WINDOW), "\n".join(map(str, checker.host_waits))


def test_what_waits_on_purpose_is_listed() -> None:
    checker = WINDOWS["self-check"].run(CONFIGURATIONS["flat"])
    assert where(checker) == {*_EVERY_WINDOW, *_SOME_WINDOWS}


@pytest.mark.parametrize("window", ["clipped, norm read"])
def test_what_a_user_reads_is_counted(window: str) -> None:
    waits = where(WINDOWS[window].run(CONFIGURATIONS["flat"])) - set(_EVERY_WINDOW)
    assert waits == {"stream_windows.py (_clip_and_read)"}
