"""Training by the Trainer, by Fabric and by Accelerate: no races, and the host waits only where others have it wait."""

from __future__ import annotations

import pytest
from stream_clocks import Settings
from stream_front_ends import Training, fit_by_accelerate, fit_by_fabric, fit_by_trainer

_TRAINER = {
    "training_epoch_loop.py (_broadcast_sigterm_tensor)": "Lightning asks all ranks before each batch who is to stop",
    "apply_func.py (batch_to)": "Lightning makes a logged value's memory when it is first logged",
}
_SCALED = "whether a step was skipped is Python's to decide: a loss scaler has to know"
# Each front-end, with what waits and why.
TRAININGS = {
    "Trainer": (Training(fit_by_trainer), _TRAINER),
    "Trainer, bf16": (Training(fit_by_trainer, "bf16-mixed"), _TRAINER),
    "Trainer, fp16": (Training(fit_by_trainer, "16-mixed"), {**_TRAINER, "amp.py (optimizer_step)": _SCALED}),
    "Fabric": (
        Training(fit_by_fabric, "bf16-mixed"),
        {"core/clipping.py (clip_parameters_)": "error_if_nonfinite, Fabric's default, reads the norm"},
    ),
    "Fabric, fp16": (
        Training(fit_by_fabric, "16-mixed", options=(("error_if_nonfinite", False),)),
        {"amp.py (optimizer_step)": _SCALED},
    ),
    "Accelerate": (Training(fit_by_accelerate, "no"), {}),
    "Accelerate, bf16": (Training(fit_by_accelerate, "bf16"), {}),
    "Accelerate, fp16": (Training(fit_by_accelerate, "fp16"), {"optimizer.py (step)": _SCALED}),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_front_ends_neither_race_nor_wait(name: str) -> None:
    training, allowed = TRAININGS[name]
    checker = training.run()
    assert checker.num_operators > 1000
    assert not checker.races, "\n".join(map(str, checker.races))
    waits = {wait.where for wait in checker.host_waits}
    assert waits == set(allowed), "\n".join(map(str, checker.host_waits))


@pytest.mark.parametrize("name", ["Trainer, fp16", "Fabric, fp16", "Accelerate, fp16"])
@pytest.mark.parametrize("wait", ["(_hand_back)", "(wait)"])
def test_a_wait_left_out_is_found(name: str, wait: str) -> None:
    training, _ = TRAININGS[name]
    sites = frozenset(site for site in training.run().timeline.waits.of_package if wait in site)
    assert sites
    assert training.run(Settings(left_out=sites)).races


@pytest.mark.campaign
@pytest.mark.parametrize("name", TRAININGS)
def test_no_races_in_other_models_of_the_device(name: str) -> None:
    training, _ = TRAININGS[name]
    for settings in (Settings(sync_on_current=False), Settings(host_waits=False)):
        checker = training.run(settings)
        assert not checker.races, "\n".join(map(str, checker.races))
