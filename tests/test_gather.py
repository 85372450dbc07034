"""Variable.gather: rows in a loss, whose gradient is IndexedSlices and never an array of the table's shape."""

from __future__ import annotations

import importlib
import re

import fastadam
import numpy as np
import pytest

F32 = np.float32
LIBRARIES = {"autograd": "autograd.numpy", "jax": "jax.numpy", "torch": "torch"}
IDS = np.array([[1, 2, 1], [7, 0, 7]])


@pytest.fixture(params=LIBRARIES)
def provider(request):
    pytest.importorskip(request.param)
    return request.param


def table(dtype=F32, rows=10):
    values = np.random.RandomState(0).standard_normal((rows, 4)).astype(dtype)
    return fastadam.Variable(values, name="table")


def dense_of(slices, shape):
    total = np.zeros(shape)
    np.add.at(total, slices.indices, slices.values)
    return total


def get_gradients(loss, variables, provider):
    return fastadam.Adam().get_gradients(loss, variables, gradient=provider)


@pytest.mark.parametrize("dtype", [F32, np.float64])
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS.tolist(), IDS.astype(np.int32)], ids=["2-D", "1-D", "list", "int32"])
def test_the_gradient_of_a_gather_is_slices(ids, dtype, provider):
    e, w = table(dtype), fastadam.Variable(np.array([1.0, -2.0, 0.5, 3.0], dtype))
    for _ in range(2):  # JAX learns in the first what it may expect in the second
        of_e, of_w = get_gradients(lambda: ((e.gather(ids) * w.value) ** 2).sum(), [e, w], provider)
        assert isinstance(of_e, fastadam.IndexedSlices)
        assert of_e.values.shape == (np.size(ids), 4)
        assert (of_e.values.dtype, of_e.dense_shape) == (dtype, (10, 4))
        np.testing.assert_array_equal(of_e.indices, np.ravel(ids))
        expected = np.zeros((10, 4))
        np.add.at(expected, np.ravel(ids), 2 * e.numpy()[np.ravel(ids)] * w.numpy() ** 2)
        np.testing.assert_allclose(dense_of(of_e, (10, 4)), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(of_w, (2 * e.numpy()[ids] ** 2 * w.numpy()).reshape(-1, 4).sum(0), rtol=1e-5)


def test_several_gathers_are_one_gradient_and_a_read_of_the_value_makes_it_dense(provider):
    e = table()
    (found,) = get_gradients(lambda: (e.gather([1, 2]) * e.gather([2, 3])).sum(), [e], provider)
    expected = np.zeros((10, 4))
    expected[[1, 2]] += e.numpy()[[2, 3]]
    expected[[2, 3]] += e.numpy()[[1, 2]]
    np.testing.assert_allclose(dense_of(found, (10, 4)), expected, rtol=1e-6)
    (found,) = get_gradients(lambda: (e.gather([3, 3]) ** 2).sum() + (e.value**2).sum(), [e], provider)
    expected = 2 * e.numpy()
    expected[3] *= 3
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_training_on_rows_gives_the_bits_of_the_slices(provider):
    e, plain = table(), table()
    optimizer, expected = fastadam.Adam(0.1), fastadam.Adam(0.1)
    for step in range(4):
        variables = (lambda: [e]) if step % 2 else [e]
        optimizer.minimize(lambda: 0.5 * (e.gather(IDS) ** 2).sum(), variables, gradient=provider)
        slices = fastadam.IndexedSlices(plain.gather(IDS.ravel()), IDS.ravel())
        expected.apply_gradients([(slices, plain)])
        np.testing.assert_array_equal(e.numpy().view(np.uint32), plain.numpy().view(np.uint32))
    assert optimizer.iterations == 4
    assert (e.numpy() != table().numpy()).any()


def test_rows_of_a_variable_that_is_not_asked_for_are_constants(provider):
    e, w = table(), fastadam.Variable(np.ones(4, F32))
    (found,) = get_gradients(lambda: (e.gather([1, 2]) * w.value).sum(), [w], provider)
    np.testing.assert_allclose(found, e.numpy()[[1, 2]].sum(0), rtol=1e-6)


def test_a_large_table_is_never_made_dense(provider):
    """Ten million rows of 4: a dense gradient, or a copy in the provider, takes 160 MB."""
    import resource

    e = table(rows=10_000_000)
    get_gradients(lambda: (e.gather([5, 5]) ** 2).sum(), [e], provider)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        (found,) = get_gradients(lambda: (e.gather([5, 9_999_999]) ** 2).sum(), [e], provider)
    assert found.values.shape == (2, 4)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (
        100_000 if importlib.import_module("sys").platform == "linux" else 100_000_000
    )  # KiB; bytes on macOS


CHANGES = {  # what the loss reads in its first run and in its second
    "other rows": (["e1"], ["e2"], "gathers other rows"),
    "another table": (["e1"], ["f1"], "gathers other rows"),
    "more rows": (["e1"], ["e1", "e1"], "gathers other rows"),
    "fewer rows": (["e1", "f1"], ["e1"], "gathers other rows"),
    "another variable": (["e"], ["f"], "reads other variables"),
    "more variables": (["e1"], ["e1", "f"], "reads other variables"),
    "fewer variables": (["e", "f"], ["e"], "reads other variables"),
}


@pytest.mark.parametrize("late", [False, True], ids=["variables known", "variables asked for after the loss"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_jax_reads_must_not_change_between_its_runs(change, late):
    pytest.importorskip("jax")
    first, second, message = CHANGES[change]
    tables, runs = {"e": table(), "f": table()}, iter([first, second])

    def loss():
        names = next(runs)
        reads = [tables[name[0]].gather([int(name[1:])]) if name[1:] else tables[name].value for name in names]
        return sum((read**2).sum() for read in reads)

    variables = list(tables.values())
    with pytest.raises(ValueError, match=f"loss: {message} in its second run, expected the same"):
        get_gradients(loss, (lambda: variables) if late else variables, "jax")


def test_outside_of_a_loss_rows_are_a_copy():
    e = table()
    rows = e.gather(IDS)
    np.testing.assert_array_equal(rows, e.numpy()[IDS])
    rows[...] = 0
    assert (e.gather(IDS) != 0).any()
    assert e.gather([]).shape == (0, 4)
    assert fastadam.Variable([1.0, 2.0]).gather([1]).tolist() == [2.0]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([10], ValueError, "ids: 10 is not a row of variable 'table', expected 0 <= id < 10"),
        ([[3, -1]], ValueError, "ids: -1 is not a row of variable 'table'"),
        ([1.0], TypeError, "ids: dtype float64, expected integers"),
        ([True], TypeError, "ids: dtype bool, expected integers"),
    ],
)
def test_bad_ids_are_refused(ids, error, message):
    with pytest.raises(error, match=re.escape(message)):
        table().gather(ids)
    with pytest.raises(ValueError, match=re.escape("ids: this variable has shape (), expected at least one axis")):
        fastadam.Variable(1.0).gather([0])


@pytest.mark.parametrize("mode", ["lazy", "deferred"])
@pytest.mark.parametrize("begin", ["built", "stepped"])
def test_the_system_is_told_once_that_rows_are_read_at_random(begin, mode, monkeypatch):
    told = []
    monkeypatch.setattr(
        "fastadam._core.deferred.tables.expect_random_rows", lambda array, **_: told.append(array.ctypes.data)
    )
    table, other = np.ones((50, 3), np.float32), np.ones((40, 3), np.float32)
    optimizer = fastadam.Adam(sparse_update=mode)
    optimizer.build([table, other])
    if begin == "stepped":
        optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((1, 3), np.float32), [1]), table)])
    for _ in range(3):
        optimizer.gather(table, [1])
    assert len(told) == (0 if (mode, begin) == ("deferred", "stepped") else 1)
    optimizer.gather(other, [1])
    assert told.count(other.ctypes.data) == 1
    optimizer.forget(other)
    optimizer.build([other])
    optimizer.gather(other, [1])
    assert told.count(other.ctypes.data) == 2
