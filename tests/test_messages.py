"""Errors name the argument, say what came and what was expected, and hide nothing that the caller's own code raised."""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest

F32 = np.float32
W, G = np.ones(2, F32), np.ones(2, F32)


class MyError(TypeError):
    """A TypeError of the caller's code: easily taken for one of the argument."""


def failing(error):
    yield (G, np.ones(2, F32))
    raise error


class FailingIndex:
    def __len__(self):
        return 2

    def __getitem__(self, at):
        raise MyError("mine")


class FailingIter:
    def __iter__(self):
        raise MyError("mine")


def of_arrays(pairs):
    return (variable for _, variable in pairs)


TAKES_LISTS = {
    "apply_gradients": lambda items: fastadam.Adam().apply_gradients(items),
    "LossScaleOptimizer": lambda items: fastadam.LossScaleOptimizer(fastadam.Adam()).apply_gradients(items),
    "build": lambda items: fastadam.Adam().build(of_arrays(items)),
    "set_weights": lambda items: fastadam.Adam().set_weights(of_arrays(items)),
    "global_norm": lambda items: fastadam.global_norm(of_arrays(items)),
    "var_list": lambda items: fastadam.Adam().exclude_from_weight_decay(of_arrays(items)),
    "var_names": lambda items: fastadam.Adam().exclude_from_weight_decay(None, of_arrays(items)),
    "finalize": lambda items: fastadam.Adam(use_ema=True).finalize_variable_values(of_arrays(items)),
    "minimize": lambda items: fastadam.Adam().minimize(lambda: 1.0, of_arrays(items), gradient=lambda *_: [G]),
    "save": lambda items: fastadam.Adam().save("unused", of_arrays(items)),
    "load": lambda items: fastadam.Adam.load("unused", of_arrays(items)),
    "dense_shape": lambda items: fastadam.IndexedSlices(G, [0, 1], (2 for _ in items)),
}


@pytest.mark.parametrize(
    "error", [MyError("mine"), ValueError("mine"), RuntimeError("mine"), KeyError("mine")], ids=repr
)
@pytest.mark.parametrize("place", TAKES_LISTS)
def test_an_exception_of_the_callers_generator_comes_through(place, error):
    with pytest.raises(type(error), match="mine") as found:
        TAKES_LISTS[place](failing(error))
    assert found.value is error


def test_exceptions_of_other_iterables_come_through():
    with pytest.raises(MyError, match="mine"):
        fastadam.Adam().apply_gradients(FailingIndex())
    for call in (fastadam.Adam().apply_gradients, fastadam.Adam().build, fastadam.Adam().set_weights):
        with pytest.raises(MyError, match="mine"):
            call(FailingIter())


def test_an_iter_that_returns_no_iterator_is_refused():
    class NoIterator:
        def __iter__(self):
            return 3

    for values in (NoIterator(), 3):
        with pytest.raises(TypeError, match="var_list: .*, expected a list"):
            fastadam.Adam().build(values)


class FailingArray:
    def __array__(self, dtype=None, copy=None):
        raise MyError("mine")


@pytest.mark.parametrize(
    "use",
    [
        lambda array: fastadam.Adam().apply_gradients([(array, np.ones(2, F32))]),
        lambda array: fastadam.Variable([1.0, 2.0]).assign(array),
        fastadam.Variable,
        lambda array: fastadam.IndexedSlices(G, array),
        lambda array: fastadam.global_norm([array]),
    ],
    ids=["gradient", "assign", "Variable", "indices", "global_norm"],
)
def test_an_exception_of_the_callers_array_is_the_cause(use):
    with pytest.raises(TypeError, match="mine") as error:
        use(FailingArray())
    assert isinstance(error.value, MyError) or isinstance(error.value.__cause__, MyError)


PATHS = (
    fastadam.Adam().save,
    fastadam.LossScaleOptimizer(fastadam.Adam()).save,
    lambda path: fastadam.Adam.load(path, []),
)


def step(*lists, **options):
    return fastadam.adam_step(*lists, step=1, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: step([], [G], [], []), ValueError, "grads: 1 arrays, expected 0, one for each variable"),
        (lambda: step([], [], [], [], grad_factor=[1.0]), ValueError, "grad_factor: 1 numbers, expected 0, one for"),
        (lambda: step([], [], [], [], grad_factor="a"), TypeError, "grad_factor: 'a', expected a number"),
        (lambda: step([W], [G], [G], [G], grad_factor=[[1], [1, 2]]), TypeError, "grad_factor[0]: [1], expected a"),
        *(
            (lambda s=s: fastadam.schedules.CosineDecay(0.1, 10)(s), TypeError, f"step: {s!r}, expected a number or an")
            for s in ("a", "3", 1j, None, ["a"], [1j], {}, b"1")
        ),
        (lambda: fastadam.schedules.CosineDecay(0.1, 10)([[1], [1, 2]]), ValueError, "step: [[1], [1, 2]] ("),
        *(
            (
                lambda s=s: fastadam.schedules.serialize(s),
                TypeError,
                f"learning_rate_schedule: {s!r}, expected a schedule",
            )
            for s in (3, 0.1, None, "CosineDecay", abs, fastadam.schedules.CosineDecay)
        ),
        *((lambda call=call: call(""), ValueError, "path: '', expected the name of a file") for call in PATHS),
        *(
            (
                lambda call=call: call("a\0.safetensors"),
                ValueError,
                "path: 'a\\x00.safetensors', expected the name of a",
            )
            for call in PATHS
        ),
        (lambda: fastadam.global_norm(None), TypeError, "grads: NoneType, expected a list of arrays"),
        (lambda: fastadam.global_norm({"a": G}), TypeError, "grads: dict, expected a list of arrays"),
        (lambda: fastadam.global_norm(b"ab"), TypeError, "grads: bytes, expected a list of arrays"),
        (
            lambda: fastadam.global_norm(np.array("2020", "M8")),
            TypeError,
            "grads[0]: dtype datetime64[Y], expected real",
        ),
        (lambda: fastadam.IndexedSlices(G, [[0], [1, 2]]), TypeError, "indices: list that is not an array of integers"),
        (lambda: fastadam.Adam().build("ab"), TypeError, "var_list: str, expected a list"),
        (lambda: fastadam.Adam().build({"w": W}), TypeError, "var_list: dict, expected a list"),
        (
            lambda: fastadam.Adam().set_weights([[[1], [1, 2]]]),
            TypeError,
            "weights[0]: [[1], [1, 2]], expected a number",
        ),
        (lambda: fastadam.Adam().save(None), TypeError, "path: NoneType, expected a string or a path"),
        (lambda: fastadam.Adam.load(3.5, []), TypeError, "path: float, expected a string or a path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages_name_the_argument(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}") as found:
        call()
    assert type(found.value) is error


def test_an_empty_step_and_the_norm_of_one_number_are_none_of_them():
    assert step([], [], [], []) is None
    assert fastadam.global_norm(np.array(-3.0)) == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((float("inf"), 2), "dense_shape[0]: inf, expected an integer"),
        ((2.7, 2), "dense_shape[0]: 2.7, expected an integer"),
        ((2, 2.0), "dense_shape[1]: 2.0, expected an integer"),
        ((float("nan"), 2), "dense_shape[0]: nan, expected an integer"),
        ((True, 2), "dense_shape[0]: True, expected an integer"),
        (("2", 2), "dense_shape[0]: '2', expected an integer"),
        ((None, 2), "dense_shape[0]: None, expected an integer"),
        (np.array([2.0, 2.0]), "dense_shape[0]: np.float64(2.0), expected an integer"),
        ([[2, 2]], "dense_shape[0]: [2, 2], expected an integer"),
        ("22", "dense_shape: str, expected the shape of the variable"),
        ({2: 2}, "dense_shape: dict, expected the shape of the variable"),
        (2, "dense_shape: int, expected the shape of the variable"),
        ((-1, 2), "dense_shape: (-1, 2), expected no negative length"),
    ],
    ids=str,
)
def test_a_dense_shape_that_is_no_shape(shape, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        fastadam.IndexedSlices(np.ones((1, 2), F32), [0], shape)


@pytest.mark.parametrize(
    "shape",
    [(2, 3), [2, 3], np.array([2, 3]), (np.int64(2), np.uint8(3)), iter((2, 3))],
    ids=lambda shape: type(shape).__name__,
)
def test_a_dense_shape_of_integers_of_any_kind(shape):
    assert fastadam.IndexedSlices(np.ones((1, 3), F32), [0], shape).dense_shape == (2, 3)


ARRAYS = [np.zeros(2), np.array([1]), np.array(1.0), np.array("1"), np.array(None)]


@pytest.mark.parametrize("value", ARRAYS, ids=repr)
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("gradient_accumulation_steps", lambda value: fastadam.Adam(gradient_accumulation_steps=value)),
        ("max_staleness", lambda value: fastadam.Adam(max_staleness=value)),
        ("ema_overwrite_frequency", lambda value: fastadam.Adam(use_ema=True, ema_overwrite_frequency=value)),
        ("dynamic_growth_steps", lambda value: fastadam.LossScaleOptimizer(fastadam.Adam(), 1.0, value)),
        ("step", lambda value: fastadam.adam_step([], [], [], [], step=value)),
        ("steps", lambda value: fastadam.schedules.plot(fastadam.schedules.CosineDecay(0.1, 10), value)),
    ],
)
def test_an_array_as_a_count_is_refused_by_its_name(name, use, value):
    with pytest.raises(TypeError, match=rf"^{name}: array\(.*, expected an integer of at least [12]"):
        use(value)


@pytest.mark.parametrize(
    "loss",
    [None, "a", [1.0], {}, np.array(["a"]), np.datetime64("2020"), object()],
    ids=lambda loss: type(loss).__name__,
)
def test_a_loss_that_cannot_be_scaled_is_named(loss):
    for optimizer in (fastadam.LossScaleOptimizer(fastadam.Adam()), fastadam.Adam(loss_scale_factor=2.0)):
        with pytest.raises(TypeError, match=r"^loss: .*, expected a number or an array of numbers") as error:
            optimizer.scale_loss(loss)
        assert type(error.value) is TypeError  # and not NumPy's UFuncTypeError
