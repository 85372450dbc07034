"""Schedules of fastadam in Keras and of Keras in fastadam: test_keras_adam.py runs this file on each backend of Keras."""

from __future__ import annotations

import fastadam.keras
import keras
import numpy as np
import pytest
from on_keras_models import assert_same, fit, model_with, state, train
from on_keras_steps import F32, array, assert_near, only, trained

OURS, KERAS = fastadam.schedules, keras.optimizers.schedules
ARGUMENTS = {
    "ExponentialDecay": {"initial_learning_rate": 0.1, "decay_steps": 4, "decay_rate": 0.5, "staircase": True},
    "InverseTimeDecay": {"initial_learning_rate": 0.1, "decay_steps": 4, "decay_rate": 0.5},
    "PiecewiseConstantDecay": {"boundaries": [1, 3], "values": [0.1, 0.2, 0.05]},
    "PolynomialDecay": {"initial_learning_rate": 0.1, "decay_steps": 4, "power": 2.0, "cycle": True},
    "CosineDecay": {"initial_learning_rate": 0.0, "decay_steps": 4, "warmup_target": 0.1, "warmup_steps": 2},
    "CosineDecayRestarts": {"initial_learning_rate": 0.1, "first_decay_steps": 3, "alpha": 0.1},
}


@keras.saving.register_keras_serializable(package="tests")
class Halving(OURS.LearningRateSchedule):
    """Of a user: what JAX cannot trace."""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start if int(step) < 2 else 0.5 * self.start

    def get_config(self):
        return {"start": self.start}


@keras.saving.register_keras_serializable(package="tests")
class Square(KERAS.LearningRateSchedule):
    """Of a user, for Keras."""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start / keras.ops.square(keras.ops.cast(step, "float32") + 1)

    def get_config(self):
        return {"start": self.start}


# ---- those of fastadam in Keras --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_schedule_of_fastadam_is_its_namesake_in_keras(name):
    mine = fastadam.keras.Adam(getattr(OURS, name)(**ARGUMENTS[name]))
    theirs = keras.optimizers.Adam(getattr(KERAS, name)(**ARGUMENTS[name]))
    assert mine.get_config()["learning_rate"] == theirs.get_config()["learning_rate"]
    assert_near(trained(mine), trained(theirs), update=1e-6)


@pytest.mark.parametrize("schedule", [OURS.LinearCosineDecay(0.1, 5), Halving(0.1)], ids=["linear", "of a user"])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_a_schedule_without_a_namesake_is_called_with_the_step(schedule, kind):
    optimizer = getattr(fastadam.keras, kind)(schedule)
    for step in range(4):
        optimizer.iterations.assign(step)
        assert float(array(keras.ops.convert_to_tensor(optimizer.learning_rate))) == F32(schedule(step))


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_steps_with_a_schedule_of_a_user(kind):
    found = getattr(fastadam.keras, kind)(Halving(0.03125))
    expected = getattr(fastadam.keras, kind)(KERAS.PiecewiseConstantDecay([1], [0.03125, 0.015625]))
    assert_same([array(v) for v in trained(found)], [array(v) for v in trained(expected)])


@only("torch", "jax")  # Keras's NumPy backend has no fit
@pytest.mark.parametrize("options", [{}, {"jit_compile": False}, {"run_eagerly": True}])
def test_fit_with_a_schedule_of_a_user(options):
    found = model_with(fastadam.keras.Adam(Halving(0.03125)), **options)
    expected = model_with(fastadam.keras.Adam(KERAS.PiecewiseConstantDecay([1], [0.03125, 0.015625])), **options)
    fit(found)
    fit(expected)
    assert_same(state(found), state(expected))


@pytest.mark.parametrize("schedule", [OURS.CosineDecay(0.1, 9), OURS.LinearCosineDecay(0.1, 5), Halving(0.1)])
def test_a_file_holds_the_schedule(tmp_path, schedule):
    model = train(model_with(fastadam.keras.Adam(schedule)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert_same(state(loaded), state(model))
    assert_same(state(train(loaded)), state(train(model)))


def test_a_schedule_may_be_set_later():
    optimizer = fastadam.keras.Adam(0.5)
    optimizer.learning_rate = OURS.ExponentialDecay(0.25, 1, 0.5)
    assert float(array(keras.ops.convert_to_tensor(optimizer.learning_rate))) == 0.25
    optimizer.learning_rate = Halving(0.125)
    assert float(array(keras.ops.convert_to_tensor(optimizer.learning_rate))) == 0.125


# ---- those of Keras in fastadam --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_schedule_of_keras_becomes_its_namesake(name):
    schedule = getattr(KERAS, name)(**ARGUMENTS[name])
    optimizer = fastadam.Adam(schedule)
    assert type(optimizer.learning_rate) is getattr(OURS, name)
    for step in range(8):
        np.testing.assert_allclose(optimizer.learning_rate(step), float(array(schedule(step))), rtol=1e-5, atol=1e-8)
    again = fastadam.Adam.from_config(optimizer.get_config())
    assert again.learning_rate == optimizer.learning_rate


def test_a_schedule_of_a_user_is_called_with_the_step(tmp_path):
    pytest.importorskip("safetensors")
    optimizer, w = fastadam.Adam(Square(0.5), beta_1=0.0, beta_2=0.0), np.zeros(1, F32)
    for step in range(3):
        before = w.copy()
        optimizer.apply_gradients([(np.ones(1, F32), w)])
        np.testing.assert_allclose(before - w, 0.5 / (step + 1) ** 2, rtol=1e-5)
    optimizer.save(tmp_path / "adam")
    again = fastadam.Adam.load(tmp_path / "adam", [w], custom_objects={"Square": Square})
    assert again.learning_rate(3) == optimizer.learning_rate(3)
    with pytest.raises(ValueError, match=r"Unknown decay: Square, expected one of .* or a name in custom_objects"):
        fastadam.Adam.load(tmp_path / "adam", [w])


def test_a_namesake_of_a_user_is_the_users():
    class CosineDecay(KERAS.CosineDecay):
        def __call__(self, step):
            return 0.125

    assert fastadam.Adam(CosineDecay(0.5, 3)).learning_rate(2) == 0.125


def test_a_schedule_that_has_no_configuration_is_refused_when_it_is_saved(tmp_path):
    class Nameless(KERAS.LearningRateSchedule):
        def __call__(self, step):
            return 0.5

    optimizer = fastadam.Adam(Nameless())
    with pytest.raises(NotImplementedError, match="'Nameless' must override `get_config"):
        optimizer.save(tmp_path / "adam")
    assert not list(tmp_path.iterdir())


# ---- an optimizer of Keras becomes one of fastadam -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("rate", [0.0078125, KERAS.CosineDecay(0.0078125, 9)], ids=["number", "schedule"])
def test_from_optimizer_takes_settings_and_state(kind, rate):
    options = {"beta_1": 0.875, "beta_2": 0.9375, "amsgrad": True, "use_ema": True, "weight_decay": 0.125}
    given = getattr(keras.optimizers, kind)(rate, **options)
    given.exclude_from_weight_decay(var_names=["bias"])
    model = train(model_with(given))
    optimizer = getattr(fastadam.keras, kind).from_optimizer(model.optimizer)
    assert optimizer.get_config() == given.get_config()
    assert_same([array(v) for v in optimizer.variables], [array(v) for v in given.variables])
    before = model.get_weights()
    expected = [keras.Variable(array(v)) for v in train(model).trainable_variables]
    model.set_weights(before)
    model.compile(optimizer, "mse")
    assert_near(train(model).trainable_variables, expected, update=1e-6)


def test_from_optimizer_of_one_that_has_not_stepped():
    optimizer = fastadam.keras.Adam.from_optimizer(keras.optimizers.Adam(0.5, beta_1=0.25))
    assert (optimizer.beta_1, optimizer.built) == (0.25, False)


def test_from_optimizer_refuses_other_optimizers():
    for other in (keras.optimizers.SGD(), keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "adam"):
        with pytest.raises(TypeError, match=r"^optimizer: \w+, expected a keras.optimizers.Adam or AdamW"):
            fastadam.keras.Adam.from_optimizer(other)
    with pytest.raises(ValueError, match=r"^optimizer: has no weight_decay, expected fastadam.keras.Adam"):
        fastadam.keras.AdamW.from_optimizer(keras.optimizers.Adam())


def rate_of_mine():
    return 0.25


def test_from_optimizer_takes_subclasses_and_rates_as_they_are():
    class Mine(keras.optimizers.Adam):
        pass

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.25

        def get_config(self):
            return {}

    assert float(fastadam.keras.Adam.from_optimizer(Mine(0.25)).learning_rate) == 0.25
    for rate in (rate_of_mine, lambda: 0.25, Schedule()):
        own = fastadam.keras.Adam.from_optimizer(keras.optimizers.Adam(rate))
        assert float(own.learning_rate) == 0.25


def test_rates_that_need_arguments_are_refused_at_construction():
    for rate in (fastadam.schedules.CosineDecay, lambda step: 0.1):
        with pytest.raises(TypeError, match=r"^learning_rate: "):
            fastadam.keras.Adam(rate)
