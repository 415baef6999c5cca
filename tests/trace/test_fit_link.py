import random

import pytest

from lightning_mics.trace.links import Point, fit_link


def points(latency, rate, *, noise=0.0, burst=0.0, seed=0):
    generator = random.Random(seed)
    for size in (2**power for power in range(12, 24, 2)):
        for steps, factor in ((3, 1), (6, 2)):
            sent = factor * size
            seconds = steps * latency + max(0.0, sent - burst) / rate
            yield Point(steps, sent, seconds * (1 + generator.uniform(-noise, noise)))


@pytest.mark.parametrize("latency", [1e-5, 5e-4, 2e-3])
@pytest.mark.parametrize("rate", [12.5e6, 1e9])
def test_constants_are_recovered(latency, rate):
    fit = fit_link([*points(latency, rate)])
    assert fit.rate == pytest.approx(rate, rel=0.02 if latency * rate < 1e5 else 0.2)
    assert fit.latency == pytest.approx(latency, rel=0.25 if latency > 1e-4 else 4, abs=1e-5)
    assert fit.error < 0.1


def test_noise_is_averaged_out():
    fit = fit_link([*points(1e-3, 12.5e6, noise=0.1)])
    assert fit.rate == pytest.approx(12.5e6, rel=0.1)
    assert fit.latency == pytest.approx(1e-3, rel=0.15)


def test_bursts_of_small_messages_do_not_pull_the_rate():
    fit = fit_link([*points(1e-4, 12.5e6, burst=128 * 1024)])
    assert fit.rate == pytest.approx(12.5e6, rel=0.1)


def test_without_latency_it_is_none():
    assert fit_link([*points(0.0, 1e9)]).latency == pytest.approx(0.0, abs=1e-12)
