"""TensorFlow's keras/optimizer_v2/optimizer_v2_test.py, OptimizerTest and OptimizerWithFunctionTest, by their names.

Where the original takes SGD, Adam is used, and its first moment is looked at where the original looks at the step.
float32 values are those of tensorflow-cpu 2.15.1 (legacy.Adam, asked once), to the bit; float64 ones are those of the
reference. Cases of options and configurations are in test_tf_optimizer_v2_options.py.
"""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from checked import Checked
from fastadam.schedules import InverseTimeDecay, PiecewiseConstantDecay

F32 = np.float32
SUMMED = pytest.mark.filterwarnings("ignore:loss. returned an array of shape")  # TF sums it without a word
SINGLE_AND_DOUBLE = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def linear_loss(factors):
    """The gradients of a sum of products with constants."""
    return lambda loss, variables: [np.full(v.shape, c, v.dtype) for c, v in zip(factors, variables, strict=True)]


# OptimizerTest


@SUMMED
def test_basic(provider):
    checked = Checked([1.0, 2.0], [3.0, 4.0])
    a, b = map(fastadam.Variable, checked.variables)
    assert fastadam.Adam(3.0).minimize(lambda: 5 * a.value + 3 * b.value, [a, b], gradient=provider.name) == 1
    golden = [-1.9999981, -0.9999981], [2.861023e-06, 1.0000029]
    checked.check(([5, 5], [3, 3]), golden, step=1, learning_rate=3.0)


@SINGLE_AND_DOUBLE
def test_adaptive_learning_rate(dtype):
    """A number, another number, a schedule; and a number again."""
    checked = Checked([1.0, 2.0], [3.0, 4.0], dtype=dtype)
    optimizer = fastadam.Adam(1.0)
    schedule = InverseTimeDecay(0.5, decay_steps=1.0, decay_rate=0.5)
    # The schedule is asked for the steps made before, 2 and 3.
    for step, rate, value, golden in [
        (1, 1.0, 1.0, ([6.556511e-07, 1.0000007], [2.000001, 3.000001])),
        (2, 0.5, 0.5, ([-0.4999974, 0.5000026], [1.5000031, 2.500003])),
        (3, schedule, 0.25, ([-0.74999803, 0.250002], [1.2500025, 2.2500024])),
        (4, schedule, 0.2, ([-0.94999737, 0.05000265], [1.0500033, 2.050003])),
        (5, 0.5, 0.5, ([-1.449996, -0.449996], [0.5500048, 1.5500045])),
    ]:
        optimizer.learning_rate = rate
        assert optimizer.lr == rate
        optimizer.apply_gradients(checked.pairs([5, 5], [3, 3]))
        checked.check(([5, 5], [3, 3]), golden, step=step, learning_rate=value)


@SUMMED
def test_precomputed_gradient(provider):
    """The gradients of 5 * a + 3 * b with grad_loss (42, -42)."""
    a, b = fastadam.Variable([1.0, 2.0]), fastadam.Variable([3.0, 4.0])
    loss = lambda: 5 * a.value + 3 * b.value  # noqa: E731
    optimizer = fastadam.Adam()
    found = optimizer.get_gradients(loss, [a, b], grad_loss=[42, -42], gradient=provider.name)
    assert [g.tolist() for g in found] == [[210.0, -210.0], [126.0, -126.0]]
    found = optimizer.get_gradients(loss, [a, b], gradient=provider.name)
    assert [g.tolist() for g in found] == [[5.0, 5.0], [3.0, 3.0]]
    optimizer.minimize(loss, [a, b], np.array([42.0, -42.0]), gradient=provider.name)
    # 1 - 0.9 in float32 is 0.1 to 2e-7.
    np.testing.assert_allclose(optimizer.get_slot(a, "m"), [21, -21], rtol=1e-6)


@SUMMED
def test_no_gradients(provider):
    a, b = fastadam.Variable([1.0, 2.0]), fastadam.Variable([3.0, 4.0])
    with pytest.raises(ValueError, match="No gradients"):
        fastadam.Adam().minimize(lambda: 5 * a.value, [b], gradient=provider.name)


def test_no_gradients_for_any_variables_minimize():
    a, b = fastadam.Variable([1.0, 2.0], name="a"), np.ones(2, F32)
    optimizer = fastadam.Adam()
    message = re.escape("No gradients provided for any variable: ['a', 'vars[1]'].")
    with pytest.raises(ValueError, match=message):
        optimizer.minimize(lambda: 5.0, [a, b], gradient=lambda *_: [None, None])
    assert (optimizer.iterations, len(optimizer.weights)) == (0, 1)


def test_no_gradients_for_any_variables_apply_gradients():
    pairs = [(None, np.ones(5, F32)), (None, fastadam.Variable([1.0], name="w"))]
    optimizer = fastadam.Adam()
    with pytest.raises(ValueError, match=re.escape("No gradients provided for any variable: ['vars[0]', 'w'].")):
        optimizer.apply_gradients(pairs)
    assert (optimizer.iterations, len(optimizer.weights)) == (0, 1)


@pytest.mark.parametrize("hold", [fastadam.Variable, memoryview], ids=["Variable", "memoryview"])
def test_gradients_as_variables(hold):
    """Gradients that are held in buffers, and computed anew into them."""
    checked = Checked([1.0, 2.0], [3.0, 4.0])
    buffers = [np.zeros(2, F32), np.zeros(2, F32)]
    gradients = [hold(buffer) for buffer in buffers]
    optimizer = fastadam.Adam(3.0)
    buffers[0][...], buffers[1][...] = 5, 3
    variables = map(fastadam.Variable, checked.variables)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    golden = [-1.9999981, -0.9999981], [2.861023e-06, 1.0000029]
    checked.check(([5, 5], [3, 3]), golden, step=1, learning_rate=3.0)


def test_iteration_without_minimize():
    assert fastadam.Adam(3.0).iterations == 0


@SINGLE_AND_DOUBLE
def test_weights(dtype):
    def minimize(optimizer, variables):
        optimizer.minimize(lambda: None, variables, gradient=linear_loss([3.0, 5.0][: len(variables)]))

    first = fastadam.Adam(1.0)
    second = fastadam.Adam.from_config(first.get_config())
    a = np.array([1.0, 2.0], dtype)
    minimize(first, [a])
    b = a.copy()
    second.build([b])
    second.set_weights(first.get_weights())
    minimize(first, [a])
    minimize(second, [b])
    np.testing.assert_array_equal(bits(a), bits(b))
    np.testing.assert_allclose(a, [-1.0, 0.0], atol=1e-4)  # two steps of nearly 1
    assert first.iterations == second.iterations == 2

    # Variables that come later: their state is not expected before they are known.
    later = [[np.array([1.0, 2.0, 3.0], dtype), np.array([4.0, 5.0, 6.0], dtype)] for _ in range(2)]
    first.build(later[0])
    with pytest.raises(ValueError, match="length 7, but the optimizer was expecting 3 weights"):
        second.set_weights(first.get_weights())
    second.build(later[1])
    second.set_weights(first.get_weights())
    minimize(first, later[0])
    minimize(second, later[1])
    for one, other in zip([*later[0], *first.weights], [*later[1], *second.weights], strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


def test_optimizer_set_iterations():
    """The next step uses them."""
    checked = Checked(random_array(np.random.RandomState(0), 5), dtype=np.float64)
    (w,) = checked.variables
    gradient = np.full(5, 0.25)
    optimizer = fastadam.Adam(0.1)
    optimizer.iterations = 5
    assert optimizer.apply_gradients([(gradient, w)]) == 6
    assert isinstance(optimizer.iterations, np.int64)
    checked.check([gradient], [None], step=6, learning_rate=0.1)


def test_optimizer_with_callable_var_list(provider):
    """It is called after the loss, which makes the variables."""
    made = []

    def loss():
        if not made:
            made.append(fastadam.Variable([3.0]))
        return (made[0].value * made[0].value).sum()

    optimizer = fastadam.Adam(0.5)
    optimizer.minimize(loss, lambda: made, gradient=provider.name)
    assert made[0].value.round(4).tolist() == [2.5]
    assert optimizer.get_slot(made[0], "m") != 0
    made.clear()
    fastadam.Adam(0.5).minimize(loss, lambda: made, gradient=lambda _, variables: [2 * v.value for v in variables])
    assert made[0].value.round(4).tolist() == [2.5]


def test_var_key():
    """Variables of one name are two variables."""
    a, b = fastadam.Variable([1.0, 2.0], name="var"), fastadam.Variable([1.0, 2.0], name="var")
    optimizer = fastadam.Adam()
    optimizer.apply_gradients([([1.0, 1.0], a), ([2.0, 2.0], b)])
    assert len(optimizer.weights) == 5
    assert (optimizer.get_slot(b, "m") == 2 * optimizer.get_slot(a, "m")).all()


def test_var_name():
    """The order in which TF's names come: iter, then all m, all v, all vhat; later variables follow likewise."""
    a, b, c = np.ones(3, F32), np.ones((2, 2), F32), np.ones(4, F32)
    optimizer = fastadam.Adam(amsgrad=True)
    ones = linear_loss([1, 1, 1])
    optimizer.get_updates(lambda: None, [a, b], gradient=lambda loss, v: ones(loss, [*v, c])[:2])
    optimizer.get_updates(lambda: None, [a, b, c], gradient=ones)
    expected = [optimizer.get_slot(x, name) for x, name in
                [(a, "m"), (b, "m"), (a, "v"), (b, "v"), (a, "vhat"), (b, "vhat"), (c, "m"), (c, "v"), (c, "vhat")]]  # fmt: skip
    weights = optimizer.weights
    assert int(weights[0]) == 2
    assert weights[0].dtype == np.int64
    assert all(x is y for x, y in zip(weights[1:], expected, strict=True))
    assert all(x is y for x, y in zip(optimizer.variables(), weights, strict=True))
    assert optimizer.get_slot_names() == ["m", "v", "vhat"]


def test_empty_var_list(provider):
    w = fastadam.Variable([1.0])
    optimizer = fastadam.Adam(1.0)
    assert optimizer.minimize(lambda: w.value.sum(), [], gradient=provider.name) is None
    assert optimizer.apply_gradients([]) is None
    assert (optimizer.iterations, len(optimizer.weights)) == (0, 1)


@pytest.mark.parametrize("aggregate", [True, False])
def test_aggregation(aggregate):
    """testAggregationTrue, testAggregationFalse: gradients in lists, and nothing to sum over."""
    checked = Checked([1.0, 2.0])
    pairs = [([0.1, 0.1], checked.variables[0])]
    fastadam.Adam(3.0).apply_gradients(pairs, experimental_aggregate_gradients=aggregate)
    checked.check([[0.1, 0.1]], [[-1.9999053, -0.99990535]], step=1, learning_rate=3.0)


# OptimizerWithFunctionTest

TWO_STEPS = [[1.0728836e-06, 1.0000011]], [[-0.9999947, 5.3048134e-06]]


@SINGLE_AND_DOUBLE
@pytest.mark.parametrize(
    "rate", [1.0, PiecewiseConstantDecay([5], [1.0, 1.0])], ids=["basic", "basic with constant decay"]
)
def test_with_function_basic(rate, dtype):
    """testBasic and testBasicWithConstantDecay: a step in a function; it returns the variable."""
    checked = Checked([1.0, 2.0], dtype=dtype)
    optimizer = fastadam.Adam(rate)

    def step():
        optimizer.minimize(lambda: None, checked.variables, gradient=linear_loss([3.0]))
        return checked.variables[0]

    for t, golden in enumerate(TWO_STEPS, start=1):
        np.testing.assert_allclose(step(), [1 - t, 2 - t], atol=1e-4)  # the original's tolerance: epsilon and beta_2
        checked.check([[3, 3]], golden, step=t, learning_rate=1.0)


@SINGLE_AND_DOUBLE
def test_learning_rate_decay_used_in_two_functions(dtype):
    """One optimizer for two lists of variables: iterations, and with them the rate, are shared."""
    checked = Checked([1.0, 2.0], [1.0], dtype=dtype)
    optimizer = fastadam.Adam(InverseTimeDecay(0.5, decay_steps=1.0, decay_rate=0.5))
    steps = [(0, [3, 3], [0.50000054, 1.5000005]), (1, [2], [0.7519556]), (0, [3, 3], [0.28538442, 1.2853844])]
    for t, (i, gradient, golden) in enumerate(steps, start=1):
        optimizer.minimize(lambda: None, [checked.variables[i]], gradient=linear_loss(gradient[:1]))
        rate = 0.5 / (1 + 0.5 * (t - 1))
        checked.check([gradient], [golden], which=[i], step=t, learning_rate=rate)
