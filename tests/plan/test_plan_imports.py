"""The planner's arithmetic stays pure, and who does not plan does not load it."""

import subprocess
import sys

import pytest


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_module_of_the_planner_loads_torch():
    code = (
        "import importlib, pkgutil, sys\n"
        "import lightning_mics.plan\n"
        "for module in pkgutil.walk_packages(lightning_mics.plan.__path__, 'lightning_mics.plan.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "print(*(name for name in sys.modules if name.startswith('lightning_mics.plan.')))"
    )
    assert {"lightning_mics.plan.hardware", "lightning_mics.plan.search"} <= set(run(code).split())


def test_planning_is_offered_where_it_is_documented():
    import lightning_mics.plan
    from lightning_mics.plan import plan
    from lightning_mics.trace import planning

    assert plan is lightning_mics.plan.plan is planning.plan
    with pytest.raises(AttributeError, match="no attribute 'plann'"):
        _ = lightning_mics.plan.plann


def test_sharding_loads_neither_the_planner_nor_the_tracer():
    loaded = run("import sys, lightning_mics\nlightning_mics.mics_shard\nprint(*sys.modules)").split()
    assert "lightning_mics.sharding" in loaded
    assert not {"lightning_mics.plan", "lightning_mics.trace", "lightning_mics.auto"}.intersection(loaded)
