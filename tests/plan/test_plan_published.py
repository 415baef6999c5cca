import importlib.util
import sys
from pathlib import Path

import pytest

_SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "planner"


@pytest.fixture
def script(request):
    spec = importlib.util.spec_from_file_location(request.param, _SCRIPTS / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[request.param] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[request.param]


@pytest.mark.parametrize("script", ["published"], indirect=True)
def test_published_figures_are_predicted_within_ten_percent(script):
    figures = [*script.mics_figures(), *script.hsdp_figures()]
    assert len(figures) == 7
    errors = {figure.what: figure.error for figure in figures}
    assert all(abs(error) < 0.1 for error in errors.values()), errors


@pytest.mark.campaign
@pytest.mark.parametrize("script", ["card"], indirect=True)
def test_memory_of_a_card_is_predicted_within_three_percent_and_hardly_ever_too_low(script):
    errors = list(script.errors())
    assert len(errors) == 6
    assert all(-0.01 < error < 0.03 for error in errors), errors
