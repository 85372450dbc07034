"""Schedulers of PyTorch and schedules with TensorFlow's base class as rates; tests/on_keras_schedules.py has Keras's."""

from __future__ import annotations

import copy

import fastadam
import numpy as np
import pytest
from absent import stand_in

F32 = np.float32
W = (3,)


def scheduler_of(torch, kind, *arguments, groups=1, **options):
    parameters = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(groups)]
    return getattr(torch.optim.lr_scheduler, kind)(torch.optim.SGD(parameters, lr=0.5), *arguments, **options)


def step_of(optimizer, w):
    """How far one step of ``w`` goes: with both betas 0 the rate."""
    w[...] = 0
    optimizer.apply_gradients([(np.ones(W, F32), w)])
    return -float(w[0])


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("StepLR", (1, 0.5)),
        ("ExponentialLR", (0.5,)),
        ("CosineAnnealingLR", (4,)),
        ("LambdaLR", (lambda n: 1 / (n + 1),)),
    ],
)
@pytest.mark.parametrize("keyword", ["learning_rate", "lr"])
def test_a_scheduler_of_torch_gives_its_present_rate(kind, arguments, keyword):
    torch = pytest.importorskip("torch")
    scheduler = scheduler_of(torch, kind, *arguments)
    optimizer = fastadam.Adam(**{keyword: scheduler}, beta_1=0.0, beta_2=0.0)
    w = np.zeros(W, F32)
    for _ in range(3):
        assert optimizer.learning_rate == scheduler.get_last_lr()[0]
        np.testing.assert_allclose(step_of(optimizer, w), scheduler.get_last_lr()[0], rtol=1e-5)
        scheduler.optimizer.step()
        scheduler.step()
    assert optimizer.learning_rate != 0.5


def test_a_scheduler_that_waits_for_a_plateau():
    torch = pytest.importorskip("torch")
    scheduler = scheduler_of(torch, "ReduceLROnPlateau", patience=0, factor=0.5)
    optimizer = fastadam.Adam(scheduler)
    for loss in (1.0, 1.0):
        scheduler.step(loss)
    assert optimizer.learning_rate == 0.25


def test_a_scheduler_is_saved_and_copied_as_its_rate(tmp_path):
    torch = pytest.importorskip("torch")
    scheduler = scheduler_of(torch, "StepLR", 1, 0.5)
    optimizer = fastadam.Adam(0.25)
    optimizer.learning_rate = scheduler
    twin = copy.deepcopy(optimizer)
    scheduler.optimizer.step()
    scheduler.step()
    assert twin.learning_rate == optimizer.learning_rate == optimizer.get_config()["learning_rate"] == 0.25


def test_a_scheduler_of_several_groups_is_refused():
    torch = pytest.importorskip("torch")
    optimizer = fastadam.Adam(0.25)
    with pytest.raises(ValueError, match="^learning_rate: StepLR with 2 parameter groups, expected one group$"):
        optimizer.learning_rate = scheduler_of(torch, "StepLR", 1, groups=2)
    assert optimizer.learning_rate == 0.25
    scheduler = scheduler_of(torch, "StepLR", 1)
    optimizer.learning_rate = scheduler
    scheduler.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="^learning_rate: StepLR with 2 parameter groups"):
        step_of(optimizer, np.zeros(W, F32))
    assert optimizer.iterations == 0


BASES = [
    "keras.src.optimizers.schedules.learning_rate_schedule",
    "keras.optimizers.schedules.learning_rate_schedule",
    "tensorflow.python.keras.optimizer_v2.learning_rate_schedule",
    "tf_keras.src.optimizers.schedules.learning_rate_schedule",
]


def schedule_of(module, name, call, config, base="LearningRateSchedule"):
    kind = type(base, (), {"__module__": module})
    methods = {"__call__": lambda self, step: call(step), "get_config": lambda self: config}
    return type(name, (kind,), {"__module__": module if name != "Mine" else "__main__", **methods})()


@pytest.mark.parametrize("module", BASES)
def test_classes_of_keras_old_and_new_become_their_namesakes(module):
    config = {"initial_learning_rate": np.array(0.5), "decay_steps": 4, "decay_rate": F32(0.5), "name": None}
    schedule = schedule_of(module, "ExponentialDecay", None, config)
    optimizer = fastadam.Adam(schedule)
    assert optimizer.learning_rate == fastadam.schedules.ExponentialDecay(0.5, 4, 0.5)
    assert type(optimizer.learning_rate.initial_learning_rate) is float


@pytest.mark.parametrize("module", BASES)
@pytest.mark.parametrize("name", ["Mine", "NoisyLinearCosineDecay"])
def test_other_classes_are_called_with_the_step(module, name):
    seen = []
    schedule = schedule_of(module, name, lambda step: seen.append(step) or np.array([0.5, 0.25][step]), {"a": 1})
    optimizer = fastadam.Adam(schedule, beta_1=0.0, beta_2=0.0)
    w = np.zeros(W, F32)
    np.testing.assert_allclose([step_of(optimizer, w) for _ in range(2)], [0.5, 0.25], rtol=1e-5)
    assert seen == [0, 1]
    assert optimizer.get_config()["learning_rate"] == {"class_name": name, "config": {"a": 1}}


def test_a_class_of_that_name_alone_is_none():
    with pytest.raises(TypeError, match="^learning_rate: Mine, expected a number"):
        fastadam.Adam(stand_in("elsewhere", "Mine"))
    with pytest.raises(TypeError, match="^learning_rate: StepLR, expected a number"):
        fastadam.Adam(stand_in("elsewhere", "StepLR"))


@pytest.mark.parametrize("hyper", ["beta_1", "beta_2", "epsilon", "decay"])
def test_only_the_rate_takes_them(hyper):
    config = {"initial_learning_rate": 0.5, "decay_steps": 4, "decay_rate": 0.5}
    given = [schedule_of(BASES[0], "ExponentialDecay", None, config), schedule_of(BASES[0], "Mine", abs, {})]
    for schedule in given:
        with pytest.raises(TypeError, match=f"^{hyper}: {type(schedule).__name__}, expected a number"):
            fastadam.Adam(**{hyper: schedule})


def test_what_the_namesake_refuses_is_refused():
    config = {"initial_learning_rate": 0.5, "decay_steps": -4, "decay_rate": 0.5}
    with pytest.raises(ValueError, match="decay_steps: -4.0, expected decay_steps > 0"):
        fastadam.Adam(schedule_of(BASES[0], "ExponentialDecay", None, config))
