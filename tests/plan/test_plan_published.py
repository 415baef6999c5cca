import importlib.util
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "planner" / "published.py"


@pytest.fixture(scope="module")
def published():
    spec = importlib.util.spec_from_file_location("published", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["published"]


def test_published_figures_are_predicted_within_ten_percent(published):
    figures = [*published.mics_figures(), *published.hsdp_figures()]
    assert len(figures) == 7
    errors = {figure.what: figure.error for figure in figures}
    assert all(abs(error) < 0.1 for error in errors.values()), errors
