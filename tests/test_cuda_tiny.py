"""Float32 results at the border of what is flushed to zero: a GPU flushes the same ones as an x86 CPU, after rounding."""

from __future__ import annotations

import platform

import fastadam
import numpy as np
import pytest
from test_cuda import F32
from test_cuda_graph import COUNTER
from test_cuda_numbers import HYPER, Plans

SMALLEST = 2.0**-126  # that is not flushed
SCALE = 2.0**100
PRODUCTS = {  # of a gradient and its factor
    "rounds up to the smallest": ("0x1.000002p-63", "0x1.fffffcp-64", SMALLEST),
    "is exact and below it": ("0x1.fffffep-1", "0x1p-126", 0.0),
}
CONVERSIONS = {  # of a factor that the GPU has computed in float64
    "rounds up to the smallest": ("0x1.ffffffp-127", SMALLEST),
    "is exact and below it": ("0x1.fffffep-127", 0.0),
}


def moment_of(gpu, gradient, factor, grad_scale=None):
    """The first moment with beta_1 = 0: the gradient times its factor, in float32."""
    plans = Plans(gpu, [np.zeros(40, F32)])
    numbers = {} if grad_scale is None else {"grad_scale": gpu.array(np.asarray(grad_scale, F32))}
    plans.set_numbers(**numbers)
    hyper = HYPER._replace(beta_1=0.0, gradient_scale=factor)
    assert not plans.plans[1][1].step([gpu.array(np.full(40, gradient, F32))], hyper, [], COUNTER.copy())
    found = gpu.get(plans.device[1][0])
    assert (found == found[0]).all()
    return float(found[0])


def expected_of(gpu, value):
    """An ARM CPU, on which the fake one runs, flushes before it rounds."""
    return (value,) if gpu.name == "real" or platform.machine() in ("x86_64", "AMD64") else (value, 0.0)


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_that(gpu, case):
    gradient, factor, expected = (float.fromhex(x) if isinstance(x, str) else x for x in PRODUCTS[case])
    assert moment_of(gpu, gradient, factor) in expected_of(gpu, expected)


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_on_the_cpu_that(isa, case):
    gradient, factor, expected = (float.fromhex(x) if isinstance(x, str) else x for x in PRODUCTS[case])
    w, m, v = (np.zeros(40, F32) for _ in range(3))
    fastadam.adam_step(w, np.full(40, gradient, F32), m, v, step=1, beta_1=0.0, grad_factor=factor)
    assert expected == m[0] or platform.machine() not in ("x86_64", "AMD64")


@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_conversion_from_float64_that(gpu, case):
    factor, expected = CONVERSIONS[case]
    found = moment_of(gpu, 1.0, float.fromhex(factor) * SCALE, grad_scale=SCALE)
    assert found in expected_of(gpu, expected)
