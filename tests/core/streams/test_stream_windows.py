"""Windows of every kind put their work on streams in the right order."""

from __future__ import annotations

import itertools

import pytest
from stream_clocks import Settings
from stream_windows import CONFIGURATIONS, WINDOWS

_SETTINGS = {
    "as on devices": Settings(),
    "collectives on their group's stream": Settings(sync_on_current=False),
    "the host waits for nothing": Settings(host_waits=False),
}
# By default each window runs in one configuration, all of which take turns, in an order that suits the windows.
_ORDER = [
    *("flat", "bf16 parameters", "hierarchical", "offload", "mixed bf16"),
    *("bf16 parameters, hierarchical", "p=1", "bf16 parameters, offload"),
]
_NEEDED = [
    ("failed first backward pass, scaled", "offload"),
    ("evaluated before a step", "offload"),
    ("evaluated before a step, asynchronous gathers", "offload"),
]
_SAMPLE = list(dict.fromkeys([*zip(WINDOWS, itertools.cycle(_ORDER), strict=False), *_NEEDED]))


def check(window: str, configuration: str, settings: Settings) -> None:
    checker = WINDOWS[window].run(CONFIGURATIONS[configuration], settings)
    assert checker.num_operators > 500
    assert not checker.races, "\n".join(map(str, checker.races))


@pytest.mark.parametrize(("window", "configuration"), _SAMPLE)
def test_no_races(window: str, configuration: str) -> None:
    check(window, configuration, Settings())


@pytest.mark.campaign
@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("window", WINDOWS)
def test_no_races_in_any_configuration(window: str, configuration: str, settings: str) -> None:
    check(window, configuration, _SETTINGS[settings])
