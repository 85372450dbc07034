"""Schedules against TensorFlow's in double, their rules, and their way through configs."""

from __future__ import annotations

import copy
import json
import pickle
import re

import fastadam
import numpy as np
import pytest
from cases import GOLDEN, SCHEDULE_STEPS, SCHEDULES, bits, random_array
from fastadam import schedules
from fastadam._core.common.checks import shown
from fastadam.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)
from helpers import Halving, assert_moved

IDS = [f"{i}_{name}" for i, (name, _) in enumerate(SCHEDULES)]
ALL = [getattr(schedules, name)(**arguments) for name, arguments in SCHEDULES]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return [file[f"rates/{i}"] for i in range(len(SCHEDULES))]


@pytest.mark.parametrize("i", range(len(SCHEDULES)), ids=IDS)
def test_rates_are_those_of_tensorflow_in_double(i, golden):
    assert golden[i].dtype == np.float64
    np.testing.assert_allclose(ALL[i](SCHEDULE_STEPS), golden[i], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=IDS)
def test_an_array_of_steps_gives_the_rates_of_its_steps(schedule):
    rates = schedule(SCHEDULE_STEPS)
    assert rates.dtype == np.float64
    one_by_one = [schedule(step) for step in SCHEDULE_STEPS]
    assert all(isinstance(rate, float) for rate in one_by_one)
    np.testing.assert_allclose(rates, one_by_one, rtol=1e-15)
    assert schedule(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert schedule(np.int64(3)) == schedule(3) == schedule(3.0) == schedule(np.array(3))


@pytest.mark.parametrize("schedule", ALL, ids=IDS)
@pytest.mark.parametrize("form", ["tf", "keras3"])
def test_configs_round_trip_through_json(schedule, form):
    config = schedules.serialize(schedule)
    if form == "keras3":
        config = {"module": "keras.optimizers.schedules", **config, "registered_name": None}
    before = copy.deepcopy(config)
    again = schedules.deserialize(json.loads(json.dumps(config)))
    assert type(again) is type(schedule)
    assert again.get_config() == schedule.get_config()
    schedules.deserialize(config)
    assert config == before
    assert pickle.loads(pickle.dumps(schedule)).get_config() == schedule.get_config()
    assert schedule.from_config(schedule.get_config()).get_config() == schedule.get_config()


def test_config_keys_are_those_of_keras():
    assert list(CosineDecay(0.1, 10).get_config()) == [
        "initial_learning_rate", "decay_steps", "alpha", "name", "warmup_target", "warmup_steps"]  # fmt: skip
    assert list(PiecewiseConstantDecay(np.array([1]), [np.float32(0.5), 0.25]).get_config().items()) == [
        ("boundaries", [1]), ("values", [0.5, 0.25]), ("name", None)]  # fmt: skip
    assert list(CosineDecayRestarts(0.1, 10).get_config()) == [
        "initial_learning_rate", "first_decay_steps", "t_mul", "m_mul", "alpha", "name"]  # fmt: skip


def test_cosine_warmup_ends_exactly_at_the_target():
    schedule = CosineDecay(0.0, 100, warmup_target=0.3, warmup_steps=10)
    assert schedule(10) == 0.3
    assert CosineDecay(0.0, 100, warmup_target=0.3, warmup_steps=0)(0) == 0.3


def test_every_restart_has_the_full_rate():
    """TF's float32 logarithm gives 0 at steps 81910 (first 10) and 57337 (first 7)."""
    for first, missed in ((10, 81910), (7, 57337)):
        schedule = CosineDecayRestarts(0.1, first)
        restarts = first * (2 ** np.arange(1, 30) - 1)
        assert missed in restarts
        np.testing.assert_allclose(schedule(restarts), 0.1, rtol=1e-12)
        assert (schedule(restarts - 1) < 0.05).all()
    for t_mul in (1.0, 1.1, 1.5, 3.0):
        starts = np.cumsum(t_mul ** np.arange(20)) * 16
        np.testing.assert_allclose(CosineDecayRestarts(0.1, 16, t_mul)(np.ceil(starts)), 0.1, rtol=0.02)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ExponentialDecay(0.1, 0, 0.5), ValueError, "decay_steps: 0.0, expected decay_steps > 0"),
        (lambda: ExponentialDecay(0.1, 10, -0.5), ValueError, "decay_rate: -0.5, expected decay_rate >= 0"),
        (lambda: ExponentialDecay(np.nan, 10, 0.5), ValueError, "initial_learning_rate: nan, expected a finite number"),
        (lambda: ExponentialDecay("0.1", 10, 0.5), TypeError, "initial_learning_rate: '0.1', expected a number"),
        (lambda: InverseTimeDecay(0.1, -1, 0.5), ValueError, "decay_steps: -1.0, expected decay_steps > 0"),
        (lambda: PolynomialDecay(0.1, 0), ValueError, "decay_steps: 0.0, expected decay_steps > 0"),
        (lambda: PolynomialDecay(0.1, 10, power=-1), ValueError, "power: -1.0, expected power >= 0"),
        (lambda: PiecewiseConstantDecay([2, 1], [1, 2, 3]), ValueError, "boundaries: [2.0, 1.0], expected numbers that do not decrease"),
        (lambda: PiecewiseConstantDecay(5, [1, 2]), TypeError, "boundaries: int, expected a list of numbers"),
        (lambda: PiecewiseConstantDecay([1], [1, None]), TypeError, "values[1]: None, expected a number"),
        (lambda: CosineDecay(0.1, 0), ValueError, "decay_steps: 0.0, expected decay_steps > 0"),
        (lambda: CosineDecay(0.1, 10, warmup_steps=-1), ValueError, "warmup_steps: -1.0, expected warmup_steps >= 0"),
        (lambda: CosineDecayRestarts(0.1, 10, t_mul=0.5), ValueError, "t_mul: 0.5, expected t_mul >= 1"),
        (lambda: CosineDecayRestarts(0.1, 10, m_mul=-1), ValueError, "m_mul: -1.0, expected m_mul >= 0"),
        (lambda: schedules.LinearCosineDecay(0.1, 0), ValueError, "decay_steps: 0.0, expected decay_steps > 0"),
        (lambda: schedules.deserialize({"class_name": "Nope", "config": {}}), ValueError, "Unknown decay: Nope"),
        (lambda: schedules.deserialize({"config": {}}), ValueError, "Improper config format"),
        (lambda: schedules.deserialize("CosineDecay"), ValueError, "Improper config format"),
        (lambda: schedules.LearningRateSchedule()(0), NotImplementedError, "Learning rate schedule must override __call__"),
        (lambda: schedules.LearningRateSchedule().get_config(), NotImplementedError, "must override get_config"),
        (lambda: fastadam.Adam(beta_1=CosineDecay(0.1, 10)), TypeError, "beta_1: CosineDecay, expected a number"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_at_construction(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def trajectory(optimizer, steps=6, change=None):
    rng = np.random.RandomState(0)
    w = random_array(rng, 33)
    start = w.copy()
    for step in range(steps):
        if change and step in change:
            change[step](optimizer)
        optimizer.apply_gradients([(random_array(rng, 33), w)])
    assert_moved(w, start)
    return bits(w)


def test_a_schedule_is_called_with_the_steps_made_before():
    expected = trajectory(
        fastadam.Adam(0.8), change={i: lambda o, i=i: setattr(o, "lr", 0.8 * 0.5**i) for i in range(6)}
    )
    np.testing.assert_array_equal(trajectory(fastadam.Adam(Halving(0.8))), expected)
    np.testing.assert_array_equal(trajectory(fastadam.Adam(ExponentialDecay(0.8, 1, 0.5))), expected)
    np.testing.assert_array_equal(trajectory(fastadam.Adam(0.1, lr=Halving(0.8))), expected)


def test_decay_comes_on_top_of_a_schedule():
    twice = fastadam.Adam(InverseTimeDecay(0.5, 1.0, 0.5), decay=0.5)
    assert twice.lr(2) == 0.25
    expected = trajectory(
        fastadam.Adam(0.5), change={i: lambda o, i=i: setattr(o, "lr", 0.5 / (1 + 0.5 * i) ** 2) for i in range(6)}
    )
    difference = np.abs(trajectory(twice).view(np.float32) - expected.view(np.float32))
    assert difference.max() < 1e-6


def test_a_schedule_that_returns_nonsense_changes_nothing():
    class Broken(schedules.LearningRateSchedule):
        def __call__(self, step):
            return np.nan

    w = np.ones(3, np.float32)
    optimizer = fastadam.Adam(Broken())
    with pytest.raises(ValueError, match="learning_rate: nan, expected a finite number"):
        optimizer.apply_gradients([(np.ones(3, np.float32), w)])
    assert w.tolist() == [1, 1, 1]
    assert optimizer.iterations == 0


def test_a_schedule_of_the_user_comes_back_from_an_optimizer_config_by_custom_objects():
    own = fastadam.Adam(Halving(0.8)).get_config()
    assert fastadam.Adam.from_config(own, custom_objects={"Halving": Halving}).lr(1) == 0.4
    with pytest.raises(ValueError, match="Unknown decay: Halving, expected one of"):
        fastadam.Adam.from_config(own)


@pytest.fixture
def pyplot(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    plt.close("all")  # of examples that ran before
    yield plt
    plt.close("all")


def drawn(axes):
    return {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}


def test_plot_draws_where_pyplot_shows_it(pyplot):
    axes = schedules.plot(Halving(0.8), 5)
    assert axes is pyplot.gca()
    assert drawn(axes) == {"Halving": [0.8, 0.4, 0.2, 0.1, 0.05]}
    assert schedules.plot(CosineDecay(0.1, 10), 5) is axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Halving", "CosineDecay"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "learning rate")
    _, other = pyplot.subplots()
    assert schedules.plot(CosineDecay(0.1, 10), 5, axes=axes) is axes
    assert drawn(other) == {}


def test_plot_on_axes_of_ones_own_leaves_pyplot_alone(pyplot):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert schedules.plot(CosineDecay(0.1, 10), 3, axes) is axes
    assert pyplot.get_fignums() == []


class Called:
    def __call__(self, step):
        return np.float32(step)


def warm_up(step):
    return np.array(step / 4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (warm_up, {"warm_up": [0.0, 0.25, 0.5]}),
        (lambda step: 2 * step, {"<lambda>": [0.0, 2.0, 4.0]}),
        (Called(), {"Called": [0.0, 1.0, 2.0]}),
    ],
    ids=["function", "lambda", "object"],
)
def test_plot_draws_functions_of_the_step(schedule, expected, pyplot):
    assert drawn(schedules.plot(schedule, 3)) == expected


@pytest.mark.parametrize("steps", [1, 2, 9999, 10_000, 10_001, 123_456, 2**62])
def test_plot_of_any_number_of_steps_goes_from_the_first_to_the_last(steps, pyplot):
    asked = []
    line = schedules.plot(lambda step: asked.append(step) or 0.5, steps).get_lines()[0]
    assert len(asked) == len(line.get_xdata()) == min(steps, 10_000)
    assert asked == sorted(set(asked))
    assert (asked[0], asked[-1]) == (0, steps - 1)


@pytest.mark.parametrize(
    ("schedule", "steps", "error", "message"),
    [
        (0.1, 5, TypeError, "schedule: 0.1, expected a schedule or a function of the step"),
        (CosineDecay, 5, TypeError, "schedule: the class CosineDecay, expected a schedule or a function of the step"),
        (Halving(1), 0, ValueError, "steps: 0, expected an integer of at least 1"),
        (Halving(1), 2.5, TypeError, "steps: 2.5, expected an integer of at least 1"),
        (Halving(1), "5", TypeError, "steps: '5', expected an integer of at least 1"),
        (lambda step: "x" if step else 1.0, 3, TypeError, "schedule(1): 'x', expected a number"),
        (lambda step: "0.1", 3, TypeError, "schedule(0): '0.1', expected a number"),
        (lambda step: 10 ** (400 * step), 3, TypeError, f"schedule(1): {shown(10**400)}, expected a number"),
        (lambda step: None, 3, TypeError, "schedule(0): None, expected a number"),
        (lambda step: [0.1], 3, TypeError, "schedule(0): [0.1], expected a number"),
    ],
)
def test_plot_refuses_what_it_cannot_draw_and_draws_nothing(schedule, steps, error, message, pyplot):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        schedules.plot(schedule, steps)
    assert pyplot.get_fignums() == []
