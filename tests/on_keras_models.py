"""Models that fastadam.keras trains, and their files: test_keras_adam.py runs this file on each backend of Keras."""

from __future__ import annotations

import pickle

import fastadam.keras
import keras
import numpy as np
import pytest
from on_keras_steps import EXACT, F32, array, assert_near, only

pytest.importorskip("h5py")
KINDS = ["Adam", "AdamW"]
SUFFIXES = [".keras", ".weights.h5"]


def model_with(optimizer, **options):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(10, 3),
            layers.Flatten(),
            layers.Dense(8, "tanh"),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse", **options)
    return model


def fit(model, epochs=2):
    return fit_with(model, [], epochs)


def fit_with(model, callbacks, epochs, validates=False, **options):
    rng = np.random.RandomState(0)
    x = rng.randint(0, 10, (32, 4)).astype(np.int32)
    y = x.mean(1, keepdims=True).astype(F32)
    options |= {"validation_data": (x, y)} if validates else {}
    return model.fit(x, y, 8, epochs, verbose=0, shuffle=False, callbacks=callbacks, **options).history["loss"]


def train(model, steps=3):
    """Without a loss, for every backend."""
    rng = np.random.RandomState(0)
    for _ in range(steps):
        gradients = [rng.uniform(-1, 1, v.shape).astype(F32) for v in model.trainable_variables]
        model.optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], model.trainable_variables)
    return model


def state(model):
    return [array(v) for v in [*model.weights, *model.optimizer.variables]]


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# ---- fit -------------------------------------------------------------------------------------------------------------


@only("torch", "jax")  # Keras's NumPy backend has no fit
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True, "clipnorm": 0.5},
        {"use_ema": True, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0},
    ],
    ids=["plain", "clipped", "average", "accumulated"],
)
def test_fit_reaches_the_weights_of_keras(kind, options):
    """A difference in the last digit of a weight comes back in each gradient, and grows: hence the 1e-6."""
    found = model_with(getattr(fastadam.keras, kind)(0.0078125, **EXACT, **options))
    expected = model_with(getattr(keras.optimizers, kind)(0.0078125, **EXACT, **options))
    first, second = fit(found), fit(expected)
    assert_near(found.trainable_variables, expected.trainable_variables, steps=1, update=1e-6)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert first[-1] < first[0]
    assert int(array(found.optimizer._iterations)) == 8


@only("jax")  # on_keras_memory.py has torch.compile
@pytest.mark.parametrize("options", [{"jit_compile": False}, {"run_eagerly": True}, {"steps_per_execution": 2}])
def test_compiled_or_not_the_weights_are_the_same(options):
    plain, other = model_with(fastadam.keras.AdamW(0.01)), model_with(fastadam.keras.AdamW(0.01), **options)
    fit(plain)
    fit(other)
    assert_near(other.trainable_variables, plain.trainable_variables, steps=1, update=1e-6)


@only("torch", "jax")  # Keras's NumPy backend has no fit
def test_mixed_precision_scales_the_loss():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        found, expected = (
            model_with(kind(0.0078125, **EXACT)) for kind in (fastadam.keras.Adam, keras.optimizers.Adam)
        )
    finally:
        keras.config.set_dtype_policy(before)
    assert isinstance(found.optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(found.optimizer.inner_optimizer, fastadam.keras.Adam)
    fit(found)
    fit(expected)
    # Activations of float16: a weight that rounds otherwise changes a gradient by 2**-11 of itself.
    assert_near(found.trainable_variables, expected.trainable_variables, steps=1, update=2.0**-11 * 8 * 0.0078125)
    assert {v.dtype for v in found.trainable_variables} == {"float32"}


@only("torch", "jax")  # Keras's NumPy backend has no fit
def test_a_frozen_layer_stays():
    model = model_with(fastadam.keras.Adam(0.01))
    model.layers[0].trainable = False
    model.compile(fastadam.keras.Adam(0.01), "mse")
    before = array(model.layers[0].embeddings)
    fit(model)
    assert np.array_equal(array(model.layers[0].embeddings), before)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_saved_model_goes_on_where_it_was(tmp_path, kind, suffix):
    model = train(model_with(getattr(fastadam.keras, kind)(0.01, beta_1=0.5, amsgrad=True)))
    path = tmp_path / f"model{suffix}"
    (model.save if suffix == ".keras" else model.save_weights)(path)
    if suffix == ".keras":
        loaded = keras.saving.load_model(path)
    else:
        loaded = model_with(getattr(fastadam.keras, kind)(0.5, beta_1=0.5, amsgrad=True))
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(path)
    assert type(loaded.optimizer) is getattr(fastadam.keras, kind)
    assert {**loaded.optimizer.get_config(), "name": ""} == {**model.optimizer.get_config(), "name": ""}
    assert_same(state(loaded), state(model))
    assert_same(state(train(loaded)), state(train(model)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("to_keras", [True, False])
def test_states_go_to_keras_and_back(tmp_path, kind, suffix, to_keras):
    libraries = (fastadam.keras, keras.optimizers) if to_keras else (keras.optimizers, fastadam.keras)
    given, taker = (getattr(library, kind) for library in libraries)
    model = train(model_with(given(0.0078125, **EXACT, amsgrad=True, use_ema=True)))
    path = tmp_path / f"model{suffix}"
    (model.save if suffix == ".keras" else model.save_weights)(path)
    loaded = model_with(taker(0.5, **EXACT, amsgrad=True, use_ema=True))
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(path)
    assert_same(state(loaded), state(model))
    assert_near(train(loaded).weights, train(model).weights, steps=3)
    back, store = model_with(given(0.5, **EXACT, amsgrad=True, use_ema=True)), {}
    loaded.optimizer.save_own_variables(store)
    back.optimizer.build(back.trainable_variables)
    back.optimizer.load_own_variables(store)
    assert_same([array(v) for v in back.optimizer.variables], [array(v) for v in loaded.optimizer.variables])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_file_of_keras_is_read_as_ours(tmp_path, kind, monkeypatch):
    """And the reverse, where fastadam.keras is not imported."""
    model = train(model_with(getattr(keras.optimizers, kind)(0.0078125, **EXACT)))
    model.save(tmp_path / "theirs.keras")
    taken = keras.saving.load_model(tmp_path / "theirs.keras", compile=False)
    taken.compile(getattr(fastadam.keras, kind).from_config(model.optimizer.get_config()), "mse")
    taken.optimizer.build(taken.trainable_variables)
    taken.load_weights(tmp_path / "theirs.keras")
    assert_same(state(taken), state(model))
    taken.save(tmp_path / "ours.keras")
    monkeypatch.delitem(keras.saving.get_custom_objects(), f"fastadam>{kind}")
    replaced = {f"fastadam>{kind}": getattr(keras.optimizers, kind)}
    again = keras.saving.load_model(tmp_path / "ours.keras", custom_objects=replaced)
    assert type(again.optimizer).__name__ == kind
    assert not isinstance(again.optimizer, fastadam.keras.Adam)
    assert_same(state(again), state(model))


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_and_pickles(kind):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 4)
    optimizer = getattr(fastadam.keras, kind)(schedule, beta_1=0.8, epsilon=1e-5, clipvalue=0.5, weight_decay=0.125)
    again = pickle.loads(pickle.dumps(optimizer))
    serialized = keras.saving.serialize_keras_object(optimizer)
    assert (serialized["registered_name"], serialized["class_name"]) == (f"fastadam>{kind}", kind)
    for other in (
        again,
        keras.saving.deserialize_keras_object(serialized),
        type(optimizer).from_config(optimizer.get_config()),
    ):
        assert type(other) is type(optimizer)
        assert other.get_config() == optimizer.get_config()
    theirs = getattr(keras.optimizers, kind)(schedule, beta_1=0.8, epsilon=1e-5, clipvalue=0.5, weight_decay=0.125)
    assert {**optimizer.get_config(), "name": ""} == {**theirs.get_config(), "name": ""}


def test_the_kinds_are_those_of_keras():
    assert issubclass(fastadam.keras.AdamW, fastadam.keras.Adam)
    assert issubclass(fastadam.keras.AdamW, keras.optimizers.AdamW)
    assert (fastadam.keras.AdamW(0.5).weight_decay, fastadam.keras.AdamW(0.5, 0.25).weight_decay) == (0.004, 0.25)
