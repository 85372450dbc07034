"""Steps of tables in JAX with gradients of some rows."""

from __future__ import annotations

import contextlib
import functools
import itertools

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from test_jax_adam import KERAS, assert_same_bits, in_float64

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
jnp = jax.numpy
import fastadam.jax as fj  # noqa: E402  after importorskip


@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "ids_dtype"), [("float32", "int32"), ("float32", "uint8"), ("float16", "int32"), ("float64", "int64")]
)
def test_it_has_the_bits_of_the_optimizer(mode, amsgrad, dtype, ids_dtype):
    rng = np.random.RandomState(0)
    with in_float64() if dtype == "float64" else contextlib.nullcontext():
        own = random_array(rng, (40, 3, 5), dtype=dtype)
        optimizer = fastadam.Adam(0.01, amsgrad=amsgrad, weight_decay=0.1, sparse_update=mode)
        table, state = jnp.array(own), fj.init(jnp.array(own), amsgrad=amsgrad)
        options = {"learning_rate": 0.01, "weight_decay": 0.1, "mode": mode, **KERAS}
        update = jax.jit(functools.partial(fj.sparse_update, **options))
        for _ in range(4):
            ids = rng.randint(0, 40, size=(2, 6)).astype(ids_dtype)
            rows = random_array(rng, (2, 6, 3, 5), -8, dtype=dtype)
            slices = fastadam.IndexedSlices(rows.reshape(12, 3, 5), ids.reshape(-1).astype(np.int64))
            optimizer.apply_gradients([(slices, own)])
            table, state = update(table, ids, rows, state)
        assert_same_bits(table, own)
        for name, moment in zip(["m", "v", "vhat"], state[1:], strict=False):
            assert_same_bits(moment, optimizer.get_slot(own, name))


def test_the_modes_are_the_dense_step_and_the_step_of_the_rows_alone():
    """Against formulas in float64, with an id that comes twice."""
    with in_float64():
        table, rows = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.sin(jnp.arange(9.0)).reshape(3, 3)
        ids = jnp.array([2, 0, 2])
        m, v = jnp.full((4, 3), 0.3), jnp.full((4, 3), 0.2)
        state = fj.init(table)._replace(count=4, mu=m, nu=v)
        gradient = jnp.zeros((4, 3)).at[ids].add(rows)
        new_m, new_v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = 0.1 * new_m / (1 - 0.9**5) / (jnp.sqrt(new_v / (1 - 0.999**5)) + 1e-8)
        touched = jnp.array([[True], [False], [True], [False]])
        for mode, moves in (("dense", jnp.ones_like(touched)), ("lazy", touched)):
            got, got_state = fj.sparse_update(table, ids, rows, state, learning_rate=0.1, mode=mode)
            np.testing.assert_allclose(got, jnp.where(moves, table - step, table), rtol=1e-13, atol=1e-15)
            np.testing.assert_allclose(got_state.mu, jnp.where(moves, new_m, m), rtol=1e-14)
            np.testing.assert_allclose(got_state.nu, jnp.where(moves, new_v, v), rtol=1e-14)
            assert int(got_state.count) == 5


def test_the_dense_mode_learns_what_optax_learns_of_the_gradient_of_the_table():
    optax = pytest.importorskip("optax")
    with in_float64():
        table, target = jnp.linspace(-1, 1, 20).reshape(10, 2), jnp.array([0.3, -0.2])
        adam = optax.adam(0.05)
        whole, whole_state = table, adam.init(table)
        state = fj.init(table)

        def loss(rows):
            return jnp.sum((rows - target) ** 2)

        for step in range(20):
            ids = jnp.array([step % 10, (3 * step) % 10, step % 10])
            gradient = jax.grad(lambda table, ids=ids: loss(table[ids]))(whole)
            updates, whole_state = adam.update(gradient, whole_state)
            whole = optax.apply_updates(whole, updates)
            table, state = fj.sparse_update(table, ids, jax.grad(loss)(table[ids]), state, learning_rate=0.05)
        np.testing.assert_allclose(table, whole, rtol=1e-11)


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_without_ids_only_what_moves_anyway_moves(mode):
    table = jnp.ones((4, 2))
    state = fj.init(table)._replace(count=3, mu=jnp.ones((4, 2)), nu=jnp.ones((4, 2)))
    before, rows = state, jnp.zeros((0, 2))
    got, state = fj.sparse_update(table, jnp.zeros(0, int), rows, before, learning_rate=0.1, mode=mode)
    assert (got == fj.sparse_update(table, [], rows, before, learning_rate=0.1, mode=mode)[0]).all()
    assert bool((got != table).all()) == (mode == "dense")
    assert bool((got == table).all()) == (mode == "lazy")
    assert int(state.count) == 4


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 3), (0, 2)])
def test_an_empty_table_takes_a_step(shape):
    table, ids = jnp.ones(shape), jnp.zeros(min(shape[0], 2), int)
    got, state = fj.sparse_update(table, ids, jnp.ones(ids.shape + shape[1:]), fj.init(table), learning_rate=0.1)
    assert got.shape == shape
    assert int(state.count) == 1


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
def test_an_id_that_is_no_row_is_an_error_that_names_it(bad):
    table = jnp.ones((10, 2))
    step = jax.jit(functools.partial(fj.sparse_update, learning_rate=0.1, mode="lazy"))
    given = np.array(table)
    message = rf"fastadam: indices\[1\]: {bad} is not a row, expected 0 <= index < 10"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(step(table, jnp.array([3, bad]), jnp.ones((2, 2)), fj.init(table)))
    np.testing.assert_array_equal(bits(np.asarray(table)), bits(given))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "deferred"}, ValueError, "mode: 'deferred', expected 'dense' or 'lazy'"),
        ({"ids": jnp.ones(3)}, TypeError, "ids: float32, expected integers"),
        (
            {"ids": np.array([0, 2**32 + 1, 2])},
            ValueError,
            "ids: 0 to 4294967297, expected integers in the range of int32",
        ),
        ({"ids": np.array([0, 1, 2])}, None, ""),
        ({"ids": [0, 1, 2]}, None, ""),
        ({"ids": jnp.ones(2, int)}, ValueError, r"grads: shape \(3, 2\), expected \(2, 2\), ids.shape \+ table.shape"),
        ({"grads": jnp.ones((3, 3))}, ValueError, r"grads: shape \(3, 3\), expected \(3, 2\)"),
        ({"table": {"w": jnp.ones((4, 2))}}, TypeError, "table: dict, expected an array"),
        ({"epsilon_corrected": None}, TypeError, "epsilon_corrected: None, expected True or False"),
        ({"table": jnp.ones((0, 2))}, ValueError, "ids: 3, expected none for a table without rows"),
        ({"table": jnp.ones(())}, ValueError, "table: a scalar, expected rows along a first axis"),
        ({"table": jnp.ones((4, 2), int)}, TypeError, "table: int32, expected one of"),
        ({"table": jnp.ones((5, 2))}, ValueError, r"state.mu: shape \(4, 2\), expected \(5, 2\)"),
        ({"table": jnp.ones((4, 2), jnp.float16)}, None, ""),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(change, error, message):
    table = jnp.ones((4, 2))
    arguments = {"table": table, "ids": jnp.ones(3, int), "grads": jnp.ones((3, 2)), "state": fj.init(table)}
    with pytest.raises(error, match=message) if error else contextlib.nullcontext():
        fj.sparse_update(**{**arguments, **change}, learning_rate=0.1)


ORDER = r"the order is sparse_update\(table, ids, grads, state\)"


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:], ids=str)
@pytest.mark.parametrize("traced", [False, True])
def test_arguments_in_another_order_are_refused_with_the_right_one(order, traced):
    table = jnp.ones((4, 2))
    given = [table, jnp.array([0, 1, 2]), jnp.ones((3, 2)), fj.init(table)]

    def step(*arguments):
        return fj.sparse_update(*arguments, learning_rate=0.1)

    with pytest.raises((TypeError, ValueError), match=ORDER):
        (jax.jit(step) if traced else step)(*[given[place] for place in order])


def test_a_gradient_of_every_row_may_have_the_shape_of_the_table():
    table = jnp.ones((4, 2))
    fj.sparse_update(table, jnp.arange(4), jnp.ones((4, 2)), fj.init(table), learning_rate=0.1)
