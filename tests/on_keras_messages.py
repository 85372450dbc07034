"""What fastadam.keras shows and refuses in words: settings, plots, wrong optimizers, variables and backends.

test_keras_adam.py runs this file on each backend.
"""

from __future__ import annotations

import doctest
from importlib.util import find_spec

import fastadam.keras
import keras
import numpy as np
import pytest
from matplotlib import pyplot as plt
from on_keras_steps import only
from test_wrong_optimizer import KERAS, TORCH


@only("numpy")  # whose gradients the examples have
def test_examples_of_the_docstrings_run():
    result = doctest.testmod(fastadam.keras, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert result.attempted > 0


def test_optimizers_show_their_settings():
    assert repr(fastadam.keras.Adam()) == "fastadam.keras.Adam(learning_rate=0.001)"
    assert repr(fastadam.keras.AdamW(0.5, beta_1=0.8)) == "fastadam.keras.AdamW(learning_rate=0.5, beta_1=0.8)"
    assert repr(fastadam.keras.Adam(name="mine")) == "fastadam.keras.Adam(learning_rate=0.001, name='mine')"
    scheduled = fastadam.keras.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5))
    assert repr(scheduled).startswith(
        "fastadam.keras.Adam(learning_rate=ExponentialDecay(initial_learning_rate=0.1, decay_step"
    )
    without_init = fastadam.keras.Adam.__new__(fastadam.keras.Adam)
    assert repr(without_init).startswith(("<fastadam.keras.Adam object", "fastadam.keras.Adam("))


def test_plot_draws_schedules_of_keras():
    plt.switch_backend("Agg")
    axes = fastadam.schedules.plot(keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.25]), 4)
    (line,) = axes.get_lines()
    assert line.get_label() == "PiecewiseConstantDecay"
    assert list(line.get_ydata()) == [0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_other_backends_are_refused_with_what_to_use(kind, monkeypatch):
    """TensorFlow and Keras 3 are seldom installed together: the backend's name is all that counts."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(RuntimeError) as caught:
        getattr(fastadam.keras, kind)(0.5)
    assert str(caught.value) == (
        f"fastadam.keras.{kind}: Keras runs on tensorflow. KERAS_BACKEND must be torch | jax | numpy, set "
        f'before keras is first imported: os.environ["KERAS_BACKEND"] = "torch"; or use keras.optimizers.{kind}, which '
        f"loads the same states, or fastadam.{kind} on NumPy arrays"
    )


def test_a_variable_as_the_gradient_of_an_array_is_refused():
    w = keras.Variable(np.ones(3, np.float32))
    with pytest.raises(TypeError, match=r"grads_and_vars\[0\]: Variable '\w+' as the gradient of a ndarray"):
        fastadam.Adam().apply_gradients([(w, np.ones(3, np.float32))])


def optimizers():
    yield fastadam.Adam(0.5)
    yield fastadam.AdamW()
    yield fastadam.LossScaleOptimizer(fastadam.Adam(0.5))
    if find_spec("torch") is not None:
        import torch

        yield fastadam.torch.Adam(torch.nn.Linear(3, 2).parameters())


def test_compile_is_told_which_optimizer_it_takes():
    model = keras.Sequential([keras.layers.Dense(2)])
    for optimizer in optimizers():
        with pytest.raises(ValueError, match=r"\. For Keras 3 models use fastadam\.keras\.Adam or AdamW$"):
            model.compile(optimizer=optimizer)
        assert f"{optimizer}" == str(optimizer)


def variables_by_mistake():
    yield KERAS, keras.Sequential([keras.layers.Dense(2)])
    yield KERAS, [keras.Variable([1.0])]
    if find_spec("torch") is not None:
        import torch

        linear = torch.nn.Linear(3, 2)
        yield from ((TORCH, given) for given in (linear, linear.parameters(), list(linear.parameters())))


def test_variables_in_the_place_of_the_learning_rate_are_refused():
    for hint, given in variables_by_mistake():
        with pytest.raises(TypeError, match=f"^learning_rate: .*, expected a number or a schedule; {hint}"):
            fastadam.keras.Adam(given)
