"""Each wait of lightning_mics is needed: without it, the checker finds a race."""

from __future__ import annotations

import pytest
from stream_clocks import Settings
from stream_memory import Race
from stream_windows import CONFIGURATIONS, WINDOWS

# Together they run every wait.
_RUNS = [
    ("accumulation", "flat"),
    ("replaced everywhere", "flat"),
    ("unused on this rank only", "flat"),
    ("two forward passes, one backward pass", "flat"),
    ("replaced between microsteps", "bf16 parameters"),
    ("failed backward pass, syncing", "flat"),
    ("failed backward pass, syncing, scaled", "flat"),
    ("failed backward pass, replaced", "bf16 parameters"),
    ("asynchronous gathers", "hierarchical"),
    ("no backward pass", "flat"),
    ("failed first backward pass, scaled", "offload"),
    ("evaluated before a step", "offload"),
    ("evaluated before a step, asynchronous gathers", "offload"),
]

# On a device a pass that failed has waited for hop two already; where there are no streams it has not.
_NEEDED_ON_CPUS = "(abandon) <"


# Further paths need waits as well: window, configuration, and what the waits left out have in their sites.
_PATHS = [
    ("two models by turns", "flat", "(launch)"),
    ("one loss of two models", "flat", "(_hand_back)"),
    ("adversaries", "hierarchical", "(wait)"),
    ("two models, one fails", "flat", "(_hand_back)"),
    ("objects between microsteps", "flat", "(_hand_back)"),
    ("objects before sync", "hierarchical", "(launch)"),
    ("clipped", "offload", "(wait)"),
    ("failed first backward pass, scaled", "offload", "(keep_what_was_reduced)"),
]


def places(races: list[Race]) -> set[tuple[str, str, str]]:
    return {race.places for race in races}


@pytest.mark.campaign
def test_each_wait_left_out_is_found() -> None:
    whole = {run: WINDOWS[run[0]].run(CONFIGURATIONS[run[1]]) for run in _RUNS}
    sites = {site for checker in whole.values() for site in checker.timeline.waits.of_package}
    assert sites

    def is_found(site: str) -> bool:
        settings = Settings(left_out=frozenset([site]))
        for (window, configuration), checker in whole.items():
            if site in checker.timeline.waits.sites:
                found = WINDOWS[window].run(CONFIGURATIONS[configuration], settings)
                if places(found.races) - places(checker.races):
                    return True
        return False

    missed = [site for site in sorted(sites) if not is_found(site)]
    assert not [site for site in missed if _NEEDED_ON_CPUS not in site]
    assert len(missed) <= 1


@pytest.mark.parametrize(("window", "configuration", "part"), _PATHS)
def test_waits_left_out_are_found_on_further_paths(window: str, configuration: str, part: str) -> None:
    whole = WINDOWS[window].run(CONFIGURATIONS[configuration])
    assert not whole.races
    sites = frozenset(site for site in whole.timeline.waits.of_package if part in site)
    assert sites
    assert WINDOWS[window].run(CONFIGURATIONS[configuration], Settings(left_out=sites)).races
