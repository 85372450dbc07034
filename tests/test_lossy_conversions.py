"""What is not a real number is refused, not parsed, dated, or stripped of its imaginary part; nothing is written."""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import re

import fastadam
import ml_dtypes
import numpy as np
import pytest
from fastadam._core.common.checks import is_real

F32 = np.float32

NOT_NUMBERS = {
    "complex": 1 + 2j,
    "complex128": np.complex128(1 + 2j),
    "complex64 without imaginary part": np.complex64(1),
    "complex array": np.array(1 + 0j),
    "text": "1",
    "bytes": b"1",
    "text of NumPy": np.str_("1"),
    "array of text": np.array("1"),
    "array of bytes": np.array(b"1"),
    "object array of text": np.array("1", object),
    "bytearray": bytearray(b"1"),
    "void": np.void(b"1234"),
    "date": np.datetime64("1970-01-02"),
    "array of dates": np.array("1970-01-02", "M8[D]"),
    "duration": np.timedelta64(1, "s"),
    "duration of Python": dt.timedelta(1),
    "bool": True,
    "bool of NumPy": np.True_,
    "array of bool": np.array(True),
    "list": [1.0],
    "array of one": np.array([1.0]),
    "list of lists": [[1.0], [1.0, 2.0]],
    "dict": {},
}


def set_later(name):
    return lambda value: setattr(fastadam.Adam(), name, value)


PLACES = {
    "learning_rate": fastadam.Adam,
    "lr": lambda value: fastadam.Adam(lr=value),
    "beta_1": lambda value: fastadam.Adam(beta_1=value),
    "epsilon": lambda value: fastadam.Adam(epsilon=value),
    "decay": lambda value: fastadam.Adam(decay=value),
    "clipnorm": lambda value: fastadam.Adam(clipnorm=value),
    "weight_decay": lambda value: fastadam.Adam(weight_decay=value),
    "ema_momentum": lambda value: fastadam.Adam(ema_momentum=value),
    "loss_scale_factor": lambda value: fastadam.Adam(loss_scale_factor=value),
    "iterations": set_later("iterations"),
    "beta_2": set_later("beta_2"),
    "initial_scale": lambda value: fastadam.LossScaleOptimizer(fastadam.Adam(), value),
    "initial_learning_rate": lambda value: fastadam.schedules.CosineDecay(value, 10),
    "grad_factor": lambda value: fastadam.adam_step([], [], [], [], step=1, grad_factor=value),
    "gradient_accumulation_steps": lambda value: fastadam.Adam(gradient_accumulation_steps=value),
    "max_staleness": lambda value: fastadam.Adam(max_staleness=value),
    "ema_overwrite_frequency": lambda value: fastadam.Adam(use_ema=True, ema_overwrite_frequency=value),
    "dynamic_growth_steps": lambda value: fastadam.LossScaleOptimizer(fastadam.Adam(), 1.0, value),
    "step": lambda value: fastadam.adam_step([], [], [], [], step=value),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_what_is_not_a_real_number_is_refused_by_the_name_of_its_argument(kind, place):
    if (place, kind) in LISTS_OF_FACTORS:
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{place}(\[\d\])?: ") as error:
        PLACES[place](NOT_NUMBERS[kind])
    assert type(error.value) in (TypeError, ValueError)  # and not NumPy's UFuncTypeError


LISTS_OF_FACTORS = {("grad_factor", kind) for kind in ("list", "array of one", "list of lists")}  # see below


@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_a_callable_rate_is_held_to_the_same(kind):
    w = np.ones(2, F32)
    with pytest.raises(TypeError, match="^learning_rate: "):
        fastadam.Adam(lambda: NOT_NUMBERS[kind]).apply_gradients([(np.ones(2, F32), w)])
    assert w.tolist() == [1, 1]


@pytest.mark.parametrize(
    "number",
    [
        *(np.float16(0.5), np.float32(0.5), np.longdouble(0.5), ml_dtypes.bfloat16(0.5), np.array(0.5)),
        *(decimal.Decimal("0.5"), fractions.Fraction(1, 2)),
    ],
    ids=lambda number: type(number).__name__,
)
def test_real_numbers_of_every_kind_are_taken(number):
    assert fastadam.Adam(number).learning_rate == 0.5
    assert fastadam.Adam(beta_1=number).beta_1 == 0.5


class DTypeOfTensorFlow:
    name = "float32"

    def __str__(self):
        return "<dtype: 'float32'>"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        *((np.dtype(name), True) for name in ("f2", "f4", "f8", "longdouble", "i1", "u8", ">f4", ml_dtypes.bfloat16)),
        *((np.dtype(name), False) for name in ("?", "c8", "c16", "U1", "S1", "M8[D]", "m8[s]", "O", "V4")),
        *((name, True) for name in ("float32", "torch.float32", "torch.bfloat16", "torch.int64", DTypeOfTensorFlow())),
        *((name, False) for name in ("bool", "complex64", "torch.complex64", "torch.bool", "string")),
    ],
    ids=str,
)
def test_real_dtypes_of_every_library(dtype, expected):
    assert is_real(dtype) is expected


BAD_VALUES = {
    "torn text": ["7", "8", "x"],
    "text": ["7", "8", "9"],
    "mixed text": [7, "8", 9],
    "array of text": np.array(["7", "8", "9"]),
    "bytes": np.array([b"7"] * 3),
    "dates": np.array(["2020"] * 3, "M8[D]"),
    "durations": np.array([1, 2, 3], "m8[s]"),
    "complex": np.array([1 + 1j] * 3),
    "complex list": [1 + 0j] * 3,
    "objects": np.array([7, 8, None], object),
    "objects that are numbers": np.array([7, 8, 9], object),
    "structured": np.zeros(3, "f4,f4"),
    "void": np.zeros(3, "V4"),
    "ragged": [[7, 8], [9]],
    "dates of Python": [dt.date(2020, 1, 1)] * 3,
    "too large": [10**400] * 3,
}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("kind", BAD_VALUES)
def test_assign_refuses_what_does_not_hold_real_numbers_and_writes_nothing(kind, dtype):
    w = fastadam.Variable(np.array([1, 2, 3], dtype))
    with pytest.raises(TypeError, match="^value: "):
        w.assign(BAD_VALUES[kind])
    assert w.value.astype(float).tolist() == [1, 2, 3]
    with pytest.raises(TypeError, match="^value: "):
        fastadam.Variable(BAD_VALUES[kind])


def test_an_assign_that_overflows_under_an_error_state_writes_nothing():
    w = fastadam.Variable(np.array([1, 2, 3], F32))
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        w.assign([7.0, 1e300, 9.0])
    assert w.value.tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, int, bool, ">f4"])
def test_assign_takes_every_real_dtype(dtype):
    w = fastadam.Variable([0.0, 0.0])
    assert w.assign(np.array([1, 0], dtype)) is w
    assert w.value.tolist() == [1, 0]
    assert w.assign(fastadam.Variable([3.0, 4.0])).value.tolist() == [3, 4]


@pytest.mark.parametrize("operator", ["__iadd__", "__isub__", "__imul__", "__itruediv__"])
@pytest.mark.parametrize("other", ["x", np.array(["1", "2"]), np.datetime64("2020"), 1j, None], ids=repr)
def test_a_change_in_place_by_what_is_not_real_is_refused(operator, other):
    w = fastadam.Variable([1.0, 2.0])
    with pytest.raises(TypeError, match=r"^other: .*, expected real numbers that float32 can hold") as error:
        getattr(w, operator)(other)
    assert type(error.value) is TypeError
    assert w.value.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["text", "dates", "complex", "objects", "ragged"])
def test_gradients_slices_and_ids_that_are_not_numbers_are_refused(kind):
    w, bad = np.ones(3, F32), BAD_VALUES[kind]
    for gradient in (bad, fastadam.IndexedSlices(bad, [0, 1, 2])):
        with pytest.raises(TypeError, match=r"^grads\[0\]"):
            fastadam.Adam().apply_gradients([(gradient, w)])
    with pytest.raises(TypeError, match="^indices: "):
        fastadam.IndexedSlices(w.copy(), bad)
    with pytest.raises(TypeError, match="^ids: "):
        fastadam.Variable(w).gather(bad)
    with pytest.raises(TypeError, match="^indices: "):
        fastadam.Adam().gather(w, bad)
    with pytest.raises(TypeError, match=re.escape("grads[0]: ")):
        fastadam.global_norm([bad])
    assert w.tolist() == [1, 1, 1]


@pytest.mark.parametrize("called", [False, True], ids=["value", "callable"])
@pytest.mark.parametrize("kind", BAD_VALUES)
def test_slots_and_weights_start_from_real_numbers(kind, called):
    bad = BAD_VALUES[kind]
    initializer = (lambda shape, dtype: bad) if called else bad
    w, optimizer = np.ones(3, F32), fastadam.Adam()
    for make in (
        lambda: optimizer.add_slot(w, "extra", initializer),
        lambda: optimizer.add_weight("extra", (3,), F32, initializer),
    ):
        with pytest.raises(TypeError, match="^initializer: "):
            make()
    assert len(optimizer.weights) == 1


@pytest.mark.parametrize("kind", [kind for kind in BAD_VALUES if kind not in ("ragged",)])
def test_weights_that_are_set_are_real_numbers(kind):
    w, optimizer = np.ones(3, F32), fastadam.Adam()
    optimizer.build([w])
    with pytest.raises(TypeError, match=r"^weights\[1\]: "):
        optimizer.set_weights([1, BAD_VALUES[kind], np.ones(3)])
    assert optimizer.get_weights()[1].tolist() == [0, 0, 0]


def test_names_of_slots_are_strings():
    w, optimizer = np.ones(3, F32), fastadam.Adam()
    optimizer.build([w])
    with pytest.raises(TypeError, match=r"^slot_name: \['m'\], expected a string"):
        optimizer.get_slot(w, ["m"])
