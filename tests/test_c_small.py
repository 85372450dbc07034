"""Small states in the C interface: the bits of the Python package, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from c_twins import DTYPES, OK
from fastadam._core.native.buffers import buffers_of
from fastadam._core.native.plan import Plan, StepHyper
from test_c_checks import Case, library  # noqa: F401 - a fixture

WIDE, HALF, BFLOAT16, EIGHT_BITS = range(4)  # fastadam_moments
MOMENTS = {WIDE: np.float32, BFLOAT16: ml_dtypes.bfloat16, EIGHT_BITS: np.uint8}


def address(array):
    return array.ctypes.data


class Small(Case):
    """A tensor of `size` elements with small states."""

    def __init__(self, library, moments, *, is_split, size):  # noqa: F811
        super().__init__(library)
        rng = np.random.default_rng(size)
        dtype = ml_dtypes.bfloat16 if is_split else np.float32
        self.arrays = {
            "var": rng.standard_normal(size).astype(dtype),
            "grad": rng.standard_normal(size).astype(dtype),
            "m": np.zeros(size, MOMENTS[moments]),
            "v": np.zeros(size, MOMENTS[moments]),
        }
        if moments == EIGHT_BITS:
            scales = {name: np.zeros((size + 127) // 128, np.uint8) for name in ("m_scales", "v_scales")}
            self.arrays |= scales
        if is_split:
            self.arrays["low"] = np.zeros(size, np.int16)
        self.tensor.vhat = self.tensor.average = self.tensor.accumulator = None
        for name, array in self.arrays.items():
            setattr(self.tensor, name, address(array))
        self.tensor.dtype = self.tensor.grad_dtype = DTYPES["bfloat16" if is_split else "float32"]
        self.tensor.size = self.tensor.grad_size = size
        self.tensor.moments, self.tensor.parameter = moments, 5
        self.hyper.seed = 2**63 + 9


@pytest.mark.parametrize("size", [1, 128, 1000])
@pytest.mark.parametrize(
    ("moments", "is_split"),
    [(BFLOAT16, False), (EIGHT_BITS, False), (WIDE, True), (BFLOAT16, True), (EIGHT_BITS, True)],
)
def test_steps_have_the_bits_of_the_python_package(library, moments, is_split, size):  # noqa: F811
    case = Small(library, moments, is_split=is_split, size=size)
    twin = {name: array.copy() for name, array in case.arrays.items()}
    slots = {"m": [twin["m"]], "v": [twin["v"]]}
    if moments == EIGHT_BITS:
        slots |= {"m_scale": [twin["m_scales"]], "v_scale": [twin["v_scales"]]}
    if is_split:
        slots["low"] = [twin["low"]]
    plan = Plan(buffers_of([twin["var"]], [0]), slots, stochastic_moments=True, numbers=[5])
    for step in (1, 2, 3):
        case.hyper.step = step
        assert case.step() == OK
        plan.step([twin["grad"]], StepHyper(step, 0.001, 0.9, 0.999, 1e-7, seed=2**63 + 9))
    for name, array in case.arrays.items():
        np.testing.assert_array_equal(array.view(f"u{array.itemsize}"), twin[name].view(f"u{array.itemsize}"), name)


SPARE = np.zeros(64, np.uint8)
REFUSED = {
    "moments: 7": ({"moments": 7}, "moments: 7, expected a fastadam_moments"),
    "codes without scales": ({"moments": EIGHT_BITS}, "m_scales: null"),
    "scales without codes": (
        {"m_scales": address(SPARE)},
        "m_scales, v_scales: not null, expected null unless moments is FASTADAM_MOMENTS_8BIT",
    ),
    "low of float32": ({"low": address(SPARE)}, "low: not null, expected null unless dtype is FASTADAM_BFLOAT16"),
    "stochastic float32": ({"stochastic": True}, "stochastic: true, expected only for a bfloat16 variable without low"),
    "codes with vhat": (
        {"moments": EIGHT_BITS, "m_scales": address(SPARE), "v_scales": address(SPARE[8:])},
        "vhat: not null, expected null with FASTADAM_MOMENTS_8BIT",
    ),
    "scales that are m": (
        {"moments": EIGHT_BITS, "m_scales": "m", "v_scales": address(SPARE), "vhat": None},
        "m_scales: shares memory with m, expected its own",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(library, kind):  # noqa: F811
    fields, text = REFUSED[kind]
    case = Case(library)
    for name, value in fields.items():
        setattr(case.tensor, name, address(case.arrays[value]) if isinstance(value, str) else value)
    case.refuses(case.step, f"tensors[0].{text}")
    assert not SPARE.any()


def test_small_moments_of_float64_are_refused(library):  # noqa: F811
    case = Case(library, "float64")
    case.tensor.moments = BFLOAT16
    case.refuses(case.step, "tensors[0].moments: small ones of a float64 variable, expected a smaller dtype")
