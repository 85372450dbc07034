"""State from and to Keras 3: files that it made, and Keras itself where it is installed."""

from __future__ import annotations

import os
import re
import sys
import zipfile

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import KERAS3, KERAS3_CASES, KERAS3_FILE
from fastadam import exchange
from helpers import assert_same, listed

F32 = np.float32
CASES = {case.name: case for case in KERAS3_CASES}
BINARY = [name for name in CASES if name != "keras3_defaults"]
# Keras's variables do not take the `copy` of NumPy 2's `__array__`.
QUIET = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
PLAIN, AMSGRAD_EMA = CASES["keras3_plain"], CASES["keras3_amsgrad_ema"]


@pytest.fixture(scope="module")
def golden():
    with np.load(KERAS3) as file:
        return dict(file)


@pytest.fixture(scope="module")
def keras():
    """With its NumPy backend, which needs no other framework."""
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "numpy"
    yield pytest.importorskip("keras")
    os.environ.pop("KERAS_BACKEND") if before is None else os.environ.update(KERAS_BACKEND=before)


def stored(golden, name):
    return {str(i): array for i, array in enumerate(listed(golden, name, "store"))}


def optimizer_like(case, module=fastadam):
    options = {key: value for key, value in case.options.items() if key != "gradient_accumulation_steps"}
    if isinstance(options["learning_rate"], tuple):
        schedules = module.schedules if module is fastadam else module.optimizers.schedules
        name, arguments = options["learning_rate"]
        options["learning_rate"] = getattr(schedules, name)(**arguments)
    return (module if module is fastadam else module.optimizers).Adam(**options)


def second_half(case):
    """Its gradients; with accumulation their means, which are exact, for 4 is a power of two."""
    gradients = case.arrays()[1][case.steps // 2 :]
    if "gradient_accumulation_steps" not in case.options:
        return gradients
    return [[sum(step[i] for step in gradients) / F32(4) for i in range(len(case.shapes))]]


def without_accumulators(case, weights):
    """What the docstring of `from_keras3_variables` advises."""
    calls, rate, *arrays = weights
    count = len(case.shapes)
    assert not any(array.any() for array in arrays[:count])
    return [calls // case.options["gradient_accumulation_steps"], rate, *arrays[count:]]


def resumed(golden, case):
    optimizer, variables = optimizer_like(case), listed(golden, case.name, "variables")
    weights = listed(golden, case.name, "store")
    if "gradient_accumulation_steps" in case.options:
        weights = without_accumulators(case, weights)
    exchange.from_keras3_variables(optimizer, weights, variables)
    return optimizer, variables


def test_the_committed_files_are_small():
    assert KERAS3.stat().st_size < 30_000
    assert KERAS3_FILE.stat().st_size < 30_000


@pytest.mark.parametrize("name", BINARY)
def test_steps_after_an_import_are_those_of_keras(golden, name):
    """To the bit where float32 holds the betas: both then make the same IEEE operations (Keras's file is from JAX)."""
    case = CASES[name]
    optimizer, variables = resumed(golden, case)
    for step in second_half(case):
        optimizer.apply_gradients(zip(step, variables, strict=True))
    assert_same(variables, listed(golden, name, "after"))


def test_steps_with_betas_that_float32_rounds_are_near_those_of_keras(golden):
    """Keras multiplies by 0.001 where TF has 1 - float32(0.999), 1.3e-5 more: half of that in the root of v.

    An update is at most lr (1 - beta_1) / sqrt(1 - beta_2) = 3.2 lr; a variable is rounded once in a step.
    """
    case = CASES["keras3_defaults"]
    optimizer, variables = resumed(golden, case)
    for step in second_half(case):
        optimizer.apply_gradients(zip(step, variables, strict=True))
    for found, expected in zip(variables, listed(golden, case.name, "after"), strict=True):
        update = 0.65e-5 * 3.2 * case.options["learning_rate"]
        bound = 4 * (update + np.spacing(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", BINARY)
def test_a_round_trip_gives_the_list_of_keras_to_the_bit(golden, name):
    case = CASES[name]
    optimizer, variables = resumed(golden, case)
    expected = listed(golden, name, "store")
    if name == "keras3_accumulated":
        assert (int(expected[0]), int(optimizer.iterations)) == (4, 1)
        expected = [np.array(1, np.int32), expected[1], *expected[5:]]
    assert_same(exchange.to_keras3_variables(optimizer, variables).values(), expected)


def test_a_list_and_a_dict_are_the_same(golden):
    variables = listed(golden, PLAIN.name, "variables")
    first, second = optimizer_like(PLAIN), optimizer_like(PLAIN)
    exchange.from_keras3_variables(first, stored(golden, PLAIN.name), variables)
    exchange.from_keras3_variables(second, iter(listed(golden, PLAIN.name, "store")), variables)
    assert_same(first.get_weights(), second.get_weights())


def test_the_learning_rate_comes_with_the_state(golden):
    optimizer, variables = fastadam.Adam(0.5), listed(golden, PLAIN.name, "variables")
    exchange.from_keras3_variables(optimizer, stored(golden, PLAIN.name), variables)
    assert (optimizer.learning_rate, optimizer.iterations) == (0.015625, 4)


def test_a_weights_file_of_keras_is_read_in_order(golden):
    pytest.importorskip("h5py")
    found = exchange.read_keras3_file(KERAS3_FILE)
    assert list(found) == [str(i) for i in range(14)]  # HDF5 lists "10" before "2"
    assert_same(found.values(), listed(golden, "file", "store"))
    variables = listed(golden, "file", "variables")
    optimizer = optimizer_like(AMSGRAD_EMA)
    exchange.from_keras3_variables(optimizer, found, variables)
    assert optimizer.iterations == 3
    assert_same([optimizer.get_slot(variables[2], "m")], [found["9"]])
    assert_same([optimizer.get_slot(variables[0], "average")], [found["2"]])


def test_an_archive_of_keras_is_read(golden, tmp_path):
    pytest.importorskip("h5py")
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(KERAS3_FILE, "model.weights.h5")
    assert_same(exchange.read_keras3_file(path).values(), listed(golden, "file", "store"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=re.escape(f"{path}: an archive without 'model.weights.h5'")):
        exchange.read_keras3_file(path)


def test_files_that_are_none_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with pytest.raises(FileNotFoundError):
        exchange.read_keras3_file(tmp_path / "absent.weights.h5")
    (tmp_path / "text").write_text("text")
    with pytest.raises(OSError, match="text|signature"):
        exchange.read_keras3_file(tmp_path / "text")
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = np.zeros(2)
    with pytest.raises(ValueError, match=re.escape(f"{path}: no group 'optimizer/vars'")):
        exchange.read_keras3_file(path)
    with h5py.File(path, "a") as file:
        file["optimizer/vars/0"] = h5py.ExternalLink("elsewhere.h5", "/secret")
    with pytest.raises(ValueError, match="optimizer/vars/0: not an array in this file"):
        exchange.read_keras3_file(path)
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["optimizer"] = h5py.ExternalLink(str(KERAS3_FILE), "/optimizer")
    with pytest.raises(ValueError, match="'optimizer/vars' is a link to .*keras3_adam.weights.h5, expected it in this"):
        exchange.read_keras3_file(tmp_path / "linked.h5")


def test_bfloat16_in_a_file_becomes_float32(tmp_path):
    h5py = pytest.importorskip("h5py")
    values = np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16)
    with h5py.File(tmp_path / "file", "w") as file:  # as keras/src/saving/saving_lib.py writes it
        file.create_dataset("optimizer/vars/0", data=values).attrs["dtype"] = "bfloat16"
    assert_same(exchange.read_keras3_file(tmp_path / "file").values(), [values.astype(F32)])


def test_without_h5py_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="needs h5py: pip install h5py"):
        exchange.read_keras3_file(KERAS3_FILE)


def refused(optimizer, variables, weights, error, match):
    """The call raises, and nothing has changed."""
    before, config = optimizer.get_weights(), optimizer.get_config()
    with pytest.raises(error, match=match):
        exchange.from_keras3_variables(optimizer, weights, variables)
    assert optimizer.get_config() == config
    assert_same(optimizer.get_weights(), before)


def test_another_layout_is_refused(golden):
    weights, variables = stored(golden, AMSGRAD_EMA.name), listed(golden, AMSGRAD_EMA.name, "variables")
    schedule = fastadam.schedules.ExponentialDecay(0.1, 4, 0.5)
    for options in ({}, {"amsgrad": True}, {"use_ema": True}, {"amsgrad": True, "use_ema": True, "lr": schedule}):
        rate = options.pop("lr", 0.1)
        refused(fastadam.Adam(rate, **options), variables, weights, ValueError, "weights: 14 arrays, expected")
    optimizer = optimizer_like(AMSGRAD_EMA)
    text = "weights: 14 arrays, expected 10 (1 iteration, 1 learning_rate, 2 average, 2 m, 2 v, 2 vhat) for 2 variables"
    text += ", learning_rate a number, amsgrad=True, use_ema=True"
    refused(optimizer, variables[:2], weights, ValueError, re.escape(text))
    refused(optimizer, variables[::-1], weights, ValueError, re.escape("m[0]: float32 (3, 5), expected floats ()"))
    refused(optimizer, [variables[0]] * 3, weights, ValueError, re.escape("variables[1]: the same as variables[0]"))
    gap = {"0": weights["0"], "2": weights["1"]}
    refused(optimizer, variables, gap, ValueError, re.escape("keys ['0', '2'], expected '0', '1', ... without gaps"))
    refused(optimizer, variables, {"m": 1}, ValueError, "key 'm', expected '0', '1'")
    refused(optimizer, variables, 3, TypeError, "weights: int, expected a list")


def test_numbers_that_are_none_are_refused(golden):
    weights, variables = listed(golden, PLAIN.name, "store"), listed(golden, PLAIN.name, "variables")
    for at, wrong, match in (
        (0, -1, "weights\\[0\\]"),
        (0, 2.5, "weights\\[0\\]"),
        (1, np.nan, "weights\\[1\\]: nan"),
        (1, np.zeros(3), "weights\\[1\\]"),
        (7, np.zeros((), np.int32), "v\\[2\\]: int32"),
        (3, np.full((3, 5), 1e300), "v\\[0\\]: numbers too large for float32"),
    ):
        changed = [*weights[:at], wrong, *weights[at + 1 :]]
        refused(optimizer_like(PLAIN), variables, changed, (ValueError, TypeError), match)


@pytest.mark.parametrize("accumulated", [0, 1])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"use_ema": True}, {"gradient_accumulation_steps": 4}])
def test_accumulators_are_refused(golden, accumulated, options):
    case = CASES["keras3_accumulated"]
    iteration, rate, *arrays = listed(golden, case.name, "store")
    variables, count = listed(golden, case.name, "variables"), len(case.shapes)
    accumulators = [array + F32(accumulated) for array in arrays[:count]]
    averages = variables if "use_ema" in options else []
    largest = variables if "amsgrad" in options else []
    weights = [iteration, rate, *averages, *accumulators, *arrays[count:], *largest]
    text = "if the other 3 are gradient accumulators, which cannot be imported, finish the accumulation cycle"
    refused(fastadam.Adam(**options), variables, weights, ValueError, text)


def test_an_optimizer_that_accumulates_takes_the_state(golden):
    variables = listed(golden, PLAIN.name, "variables")
    optimizer, plain = fastadam.Adam(gradient_accumulation_steps=2), optimizer_like(PLAIN)
    for each in (optimizer, plain):
        exchange.from_keras3_variables(each, stored(golden, PLAIN.name), variables)
    assert optimizer.iterations == plain.iterations == 4
    for slot in ("m", "v"):
        assert_same([optimizer.get_slot(w, slot) for w in variables], [plain.get_slot(w, slot) for w in variables])


def test_what_keras_has_no_place_for_is_refused():
    optimizer, w = fastadam.Adam(0.1, decay=0.5), np.ones(2, F32)
    optimizer.build([w])
    with pytest.raises(ValueError, match=re.escape("decay: 0.5, expected 0")):
        exchange.to_keras3_variables(optimizer, [w])
    optimizer = fastadam.Adam(0.1)
    with pytest.raises(ValueError, match=re.escape("variables[0]: slots [], expected ['m', 'v']")):
        exchange.to_keras3_variables(optimizer, [w])
    optimizer.build([w])
    optimizer.iterations = 2**31
    with pytest.raises(ValueError, match=r"iterations: 2147483648, expected less than 2\*\*31"):
        exchange.to_keras3_variables(optimizer, [w])


# ---- Keras itself ----------------------------------------------------------------------------------------------------


@QUIET
@pytest.mark.parametrize("name", ["keras3_plain", "keras3_amsgrad_ema", "keras3_decayed_schedule"])
def test_training_goes_on_in_keras_and_back(keras, name):
    case = CASES[name]
    values, gradients = case.arrays()
    mine, theirs = optimizer_like(case), optimizer_like(case, keras)
    for step in gradients[:4]:
        mine.apply_gradients(zip(step, values, strict=True))
    variables = [keras.Variable(value) for value in values]
    theirs.build(variables)
    given = exchange.to_keras3_variables(mine, values)
    theirs.load_own_variables(given)
    assert_same([v.numpy() for v in theirs.variables], given.values())
    for step in gradients[4:]:
        mine.apply_gradients(zip(step, values, strict=True))
        theirs.apply(step, variables)
    for a, b in zip(values, variables, strict=True):  # the betas are in float32: an ulp for NumPy's pow, 4 times
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=4 * np.spacing(np.abs(a).max(initial=1)))
    back, copies, store = optimizer_like(case), [np.array(v.numpy()) for v in variables], {}
    theirs.save_own_variables(store)
    exchange.from_keras3_variables(back, store, copies)
    assert_same(exchange.to_keras3_variables(back, copies).values(), store.values())


@QUIET
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_a_file_that_keras_has_just_written(keras, tmp_path, suffix):
    pytest.importorskip("h5py")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.AdamW(0.01, amsgrad=True), loss="mse")
    model.optimizer.apply([np.ones((3, 2), F32), np.ones(2, F32)], model.trainable_variables)
    path, store = tmp_path / f"model{suffix}", {}
    (model.save if suffix == ".keras" else model.save_weights)(path)
    model.optimizer.save_own_variables(store)
    found = exchange.read_keras3_file(path)
    assert_same(found.values(), store.values())
    optimizer, variables = fastadam.AdamW(amsgrad=True), [np.array(v.numpy()) for v in model.trainable_variables]
    exchange.from_keras3_variables(optimizer, found, variables)
    assert (optimizer.iterations, optimizer.learning_rate) == (1, F32(0.01))
