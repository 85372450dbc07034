"""TensorFlow's keras/optimizer_v2/learning_rate_schedule_test.py: the same cases under the same names.

Each runs with the schedule and with what comes back from its configuration. TensorFlow compares to 1e-6, here the rates
are those of the formula in double, to a few roundings.
"""

from __future__ import annotations

import math

import fastadam
import numpy as np
import pytest
from checked import Checked
from fastadam import schedules
from fastadam.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LinearCosineDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)


@pytest.fixture(params=[False, True], ids=["as made", "serialized"])
def passed(request):
    """The schedule itself, or through its configuration."""
    return (lambda s: schedules.deserialize(schedules.serialize(s))) if request.param else lambda s: s


def near(value):
    return pytest.approx(value, rel=1e-14, abs=1e-15)


# LRDecayTestV2


def test_continuous(passed):
    assert passed(ExponentialDecay(0.05, 10, 0.96))(5) == near(0.05 * 0.96 ** (5 / 10))


def test_staircase(passed):
    schedule = passed(ExponentialDecay(0.1, 3, 0.96, staircase=True))
    assert [schedule(step) for step in (1, 2)] == [0.1, 0.1]
    assert schedule(100) == near(0.1 * 0.96 ** (100 // 3))


def test_variables(passed):
    """The step is a variable that is assigned to."""
    step = np.array(1)
    schedule = passed(ExponentialDecay(0.1, 3, 0.96, staircase=True))
    assert schedule(step) == 0.1
    step[...] = 2
    assert schedule(step) == 0.1
    step[...] = 100
    assert schedule(step) == near(0.1 * 0.96 ** (100 // 3))


def test_piecewise_constant(passed):
    schedule = passed(PiecewiseConstantDecay([100, 110, 120], [1.0, 0.1, 0.01, 0.001]))
    assert schedule([0, 100, 105, 110, 111, 120, 999]).tolist() == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.001]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_piecewise_function(passed, dtype):
    """The schedule in an optimizer that minimizes v * v; float32 has the bits of tensorflow-cpu 2.15.1."""
    checked = Checked(1.0, dtype=dtype)
    (v,) = checked.variables
    optimizer = fastadam.Adam(passed(PiecewiseConstantDecay([1.0], [1.0, 0.1])))
    golden = [1.5497208e-06, -0.67005455, -0.6774866, -0.6542619]
    for step, (rate, value) in enumerate(zip([1.0, 1.0, 0.1, 0.1], golden, strict=True), start=1):
        gradient = 2 * v
        optimizer.minimize(lambda: v * v, v, gradient=lambda *_, g=gradient: [g])
        checked.check([gradient], [value], step=step, learning_rate=rate)


def test_piecewise_constant_edge_cases(passed):
    with pytest.raises(ValueError, match="The length of boundaries should be 1 less than the length of values"):
        PiecewiseConstantDecay([1, 2], [1.0])
    equal = passed(PiecewiseConstantDecay([3, 3], [1.0, 2.0, 3.0]))
    assert equal([3, 4]).tolist() == [1.0, 3.0]
    assert passed(PiecewiseConstantDecay([], [0.5]))([0, 9]).tolist() == [0.5, 0.5]
    large = passed(PiecewiseConstantDecay([2**40], [0.5, 0.25]))
    assert large([2**40, 2**40 + 1]).tolist() == [0.5, 0.25]


# LinearDecayTestV2 and SqrtDecayTestV2

LINEAR_AND_SQRT = pytest.mark.parametrize("power", [1.0, 0.5], ids=["linear", "sqrt"])


@LINEAR_AND_SQRT
def test_half_way(passed, power):
    assert passed(PolynomialDecay(0.05, 10, 0.0, power))(5) == near(0.05 * 0.5**power)


@LINEAR_AND_SQRT
def test_end(passed, power):
    assert passed(PolynomialDecay(0.05, 10, 0.001, power))(10) == 0.001


@LINEAR_AND_SQRT
def test_half_way_with_end(passed, power):
    assert passed(PolynomialDecay(0.05, 10, 0.001, power))(5) == near((0.05 - 0.001) * 0.5**power + 0.001)


@LINEAR_AND_SQRT
def test_beyond_end(passed, power):
    assert passed(PolynomialDecay(0.05, 10, 0.001, power))(15) == 0.001


@LINEAR_AND_SQRT
def test_beyond_end_with_cycle(passed, power):
    schedule = passed(PolynomialDecay(0.05, 10, 0.001, power, cycle=True))
    assert schedule(15) == near((0.05 - 0.001) * 0.25**power + 0.001)
    assert schedule(20) == 0.001  # a multiple still ends its cycle


# PolynomialDecayTestV2


def test_begin_with_cycle(passed):
    assert passed(PolynomialDecay(0.001, 10, 0.0001, cycle=True))(0) == near(0.001)


# InverseDecayTestV2


def test_inverse_decay(passed):
    schedule = passed(InverseTimeDecay(0.1, 10, 0.96))
    assert [schedule(step) for step in range(25)] == near([0.1 / (1 + 0.96 * step / 10) for step in range(25)])


def test_inverse_staircase(passed):
    schedule = passed(InverseTimeDecay(0.1, 10, 0.96, staircase=True))
    assert [schedule(step) for step in range(25)] == near([0.1 / (1 + 0.96 * (step // 10)) for step in range(25)])


# CosineDecayTestV2, CosineDecayRestartsTestV2

STEPS = range(0, 1500, 250)


def cosine(step, decay_steps, alpha=0.0):
    return (1 - alpha) * 0.5 * (1 + math.cos(math.pi * min(step, decay_steps) / decay_steps)) + alpha


def restarted(step, first, t_mul=2.0, m_mul=1.0, alpha=0.0):
    height, length = 1.0, first
    while step >= length:
        step, height, length = step - length, height * m_mul, length * t_mul
    return (1 - alpha) * height * cosine(step, length) + alpha


@pytest.mark.parametrize("alpha", [0.0, 0.1], ids=["decay", "alpha"])
def test_cosine(passed, alpha):
    """testDecay and testAlpha."""
    schedule = passed(CosineDecay(1.0, 1000, alpha))
    assert [schedule(step) for step in STEPS] == near([cosine(step, 1000, alpha) for step in STEPS])


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.1}, {"m_mul": 0.9}, {"t_mul": 1.0}], ids=["decay", "alpha", "m_mul", "t_mul"]
)
def test_cosine_restarts(passed, options):
    """testDecay, testAlpha, testMMul and testTMul."""
    schedule = passed(CosineDecayRestarts(1.0, 350, **options))
    assert [schedule(step) for step in STEPS] == near([restarted(step, 350, **options) for step in STEPS])


# LinearCosineDecayTestV2


@pytest.mark.parametrize(
    "options", [{}, {"num_periods": 5.0, "alpha": 0.1, "beta": 1e-4}], ids=["default", "non default"]
)
def test_linear_cosine(passed, options):
    """testDefaultDecay and testNonDefaultDecay."""
    num_periods, alpha, beta = {"num_periods": 0.5, "alpha": 0.0, "beta": 0.001, **options}.values()

    def expected(step):
        done = min(step, 1000) / 1000
        return (alpha + 1 - done) * 0.5 * (1 + math.cos(2 * math.pi * num_periods * done)) + beta

    schedule = passed(LinearCosineDecay(1.0, 1000, **options))
    assert [schedule(step) for step in STEPS] == near([expected(step) for step in STEPS])
