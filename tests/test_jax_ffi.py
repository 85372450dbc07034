"""Adam as an operation of JAX: in place when donated, transformed, sharded, and late to register."""

from __future__ import annotations

import functools
import re
import textwrap
import threading

import numpy as np
import pytest
from cases import bits, random_array
from helpers import run_python

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
import fastadam.jax as fj  # noqa: E402  after importorskip

STEP = functools.partial(fj.fused_update, learning_rate=0.1)
MOVES = re.compile(r"copy\w*\(|all-\w+\(|collective-\w+\(|reshape\(|transpose\(")


def arrays(*shape, count=1):
    rng = np.random.RandomState(len(shape))
    made = [jnp.array(random_array(rng, shape)) for _ in range(count)]
    return made if count > 1 else made[0]


def assert_same_bits(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(e)))


def addresses(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.ndim]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_donated_step_is_in_place_and_copies_nothing(dtype, amsgrad):
    params = {"w": arrays(100, 300).astype(dtype), "b": arrays(7).astype(dtype)}
    state = fj.init(params, amsgrad=amsgrad)
    gradients = jax.tree.map(jnp.sin, params)
    step = jax.jit(STEP, donate_argnums=(0, 2))
    text = step.lower(params, gradients, state).compile().as_text()
    assert text.count("custom_call_target") == 1
    assert MOVES.findall(text) == []
    before = addresses((params, state))
    for _ in range(3):
        params, state = step(params, gradients, state)
        assert addresses((params, state)) == before


def test_the_transformation_copies_nothing_either():
    params = {"w": arrays(10, 30), "b": arrays(7), "c": arrays(7)}
    transformation = fj.adam(0.1)

    def step(params, gradients, state):
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = transformation.init(params)
    donated = jax.jit(step, donate_argnums=(0, 2))
    text = donated.lower(params, params, state).compile().as_text()
    assert text.count("custom_call_target") == 1
    assert MOVES.findall(text) == []
    gradients = jax.tree.map(jnp.sin, params)
    before = addresses(state)
    _, state = donated(params, gradients, state)
    assert addresses(state) == before


def test_what_is_not_donated_is_left_as_it_was():
    params, gradients = arrays(50, count=2)
    state = fj.init(params)
    given = np.array(params)
    new, _ = jax.jit(STEP)(params, gradients, state)
    eager, _ = STEP(params, gradients, state)
    assert_same_bits([params, state.mu], [given, np.zeros(50, np.float32)])
    assert_same_bits(eager, new)
    assert (np.asarray(new) != given).any()


def test_a_sparse_step_is_in_place_too():
    table, ids, rows = arrays(1000, 8), jnp.array([3, 999, 3]), arrays(3, 8)
    state = fj.init(table)
    step = jax.jit(functools.partial(fj.sparse_update, learning_rate=0.1, mode="lazy"), donate_argnums=(0, 3))
    assert MOVES.findall(step.lower(table, ids, rows, state).compile().as_text()) == []
    before = addresses((table, state))
    table, state = step(table, ids, rows, state)
    assert addresses((table, state)) == before


def test_other_rates_and_counts_do_not_compile_again():
    params = arrays(5)
    step = jax.jit(lambda params, state, rate: fj.fused_update(params, params, state, learning_rate=rate))
    state = fj.init(params)
    for rate in (0.1, 0.2, 0.3):
        params, state = step(params, state, rate)
    assert step._cache_size() == 1


def test_it_runs_in_scan_and_fori_loop_beside_grad():
    w, x = arrays(3), arrays(20, 3)

    def loss(w):
        return jnp.mean((x @ w - 1) ** 2)

    def train(carry, _):
        value, gradient = jax.value_and_grad(loss)(carry[0])
        return STEP(carry[0], gradient, carry[1]), value

    state = fj.init(w)
    (scanned, _), losses = jax.jit(lambda w, s: jax.lax.scan(train, (w, s), length=30))(w, state)
    assert losses[-1] < 0.96 * losses[0]
    looped, _ = jax.lax.fori_loop(0, 30, lambda _, carry: train(carry, None)[0], (w, state))
    one_by_one = (w, state)
    for _ in range(30):
        one_by_one = jax.jit(lambda *carry: train(carry, None)[0])(*one_by_one)
    np.testing.assert_allclose(scanned, one_by_one[0], rtol=1e-5)
    np.testing.assert_allclose(looped, one_by_one[0], rtol=1e-5)


def test_vmap_of_everything_is_the_loop():
    params, gradients = {"w": arrays(4, 6), "s": arrays(4)}, {"w": jnp.sin(arrays(4, 6)), "s": jnp.cos(arrays(4))}
    state = jax.vmap(fj.init)(params)._replace(count=jnp.array([0, 3, 1, 7]))
    rates = jnp.array([0.1, 0.2, 0.3, 0.4])

    def step(params, gradients, state, rate):
        return fj.fused_update(params, gradients, state, learning_rate=rate)

    got = jax.jit(jax.vmap(step))(params, gradients, state, rates)
    for i in range(4):
        one = jax.tree.map(lambda x, i=i: x[i], (params, gradients, state, rates))
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], got), step(*one))


def test_vmap_of_some_operands_and_of_vmap_is_the_loop():
    params, gradients = arrays(3), jnp.sin(arrays(2, 3, 5))
    state = fj.init(params)
    got, got_state = jax.vmap(jax.vmap(STEP, (None, 1, None)), (None, 0, None))(params, gradients, state)
    assert got.shape == (2, 5, 3)
    assert got_state.mu.shape == (2, 5, 3)
    for i in range(2):
        for k in range(5):
            assert_same_bits(got[i, k], STEP(params, gradients[i, :, k], state)[0])


def test_vmap_of_a_sparse_step_is_the_loop():
    tables, ids, rows = arrays(3, 10, 2), jnp.array([[1, 1], [9, 0], [3, 2]]), jnp.sin(arrays(2, 2))
    step = functools.partial(fj.sparse_update, learning_rate=0.1)
    state = jax.vmap(fj.init)(tables)
    got, _ = jax.vmap(step, (0, 0, None, 0))(tables, ids, rows, state)
    for i in range(3):
        assert_same_bits(got[i], step(tables[i], ids[i], rows, fj.init(tables[i]))[0])


def test_a_gradient_through_the_step_is_refused_and_beside_it_is_not():
    params, state = arrays(3), fj.init(arrays(3))

    def through(params):
        return jnp.sum(STEP(params, params, state)[0])

    with pytest.raises(TypeError, match=r"a step cannot be differentiated; .*jax\.lax\.stop_gradient"):
        jax.grad(through)(params)
    with pytest.raises(TypeError, match="a step cannot be differentiated"):
        jax.jit(jax.grad(lambda x: jnp.sum(fj.adam(0.1).update(x, fj.adam(0.1).init(x))[0])))(params)

    def beside(params):
        stopped = jax.lax.stop_gradient(params)
        return jnp.sum(params**2) + jnp.sum(STEP(stopped, stopped, state)[0])

    np.testing.assert_array_equal(jax.jit(jax.grad(beside))(params), 2 * params)


def test_steps_of_several_threads_do_not_disturb_each_other():
    params, gradients = arrays(200_000, count=2)
    step = jax.jit(lambda p, s: STEP(p, gradients, s))
    want = (params, fj.init(params))
    for _ in range(10):
        want = step(*want)
    results = {}

    def run(i):
        carry = (params, fj.init(params))
        for _ in range(10):
            carry = step(*carry)
        results[i] = carry

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    for got in results.values():
        assert_same_bits(got, want)


SHARDED = """
import functools, re
import jax, jax.numpy as jnp, numpy as np
import fastadam.jax as fj
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))

def put(tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

def moved(text):
    assert "fastadam_" in text
    return re.findall(r"(?:copy|all-|collective-)[\\w-]*(?=\\()", text)

def check(want, got):
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()

def values(*shape):
    return jnp.sin(jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32)).reshape(shape)
"""


def run_sharded(code):
    result = run_python(SHARDED + textwrap.dedent(code), XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_on_eight_devices_nothing_is_gathered_or_copied(amsgrad):
    """Each leaf in its own way, in one call."""
    assert run_sharded(f"""
        specs = {{"matrix": P("x", "y"), "rows": P(("x", "y")), "columns": P(None, "y"), "all": P(), "scalar": P()}}
        params = {{"matrix": values(64, 16), "rows": values(32), "columns": values(3, 8), "all": values(5), "scalar": values()}}
        gradients = jax.tree.map(jnp.cos, params)
        step = functools.partial(fj.fused_update, learning_rate=0.1, weight_decay=0.01)
        want = jax.jit(step)(params, gradients, fj.init(params, amsgrad={amsgrad}))
        params, gradients = put(params, specs), put(gradients, specs)
        state = fj.init(params, amsgrad={amsgrad})
        donated = jax.jit(step, donate_argnums=(0, 2))
        text = donated.lower(params, gradients, state).compile().as_text()
        assert text.count("fastadam_dense_step") == 1, text
        assert "f32[16,8]" in text and "f32[64,16]" not in text
        places = [shard.data.unsafe_buffer_pointer() for shard in params["matrix"].addressable_shards]
        got = donated(params, gradients, state)
        assert places == [shard.data.unsafe_buffer_pointer() for shard in got[0]["matrix"].addressable_shards]
        check(want, got)
        for name, spec in specs.items():
            assert got[0][name].sharding.is_equivalent_to(NamedSharding(mesh, spec), got[0][name].ndim)
        print("moved", *moved(text))
    """) == ["moved"]


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_a_sharded_table_takes_its_own_rows(mode):
    assert run_sharded(f"""
        step = functools.partial(fj.sparse_update, learning_rate=0.1, mode={mode!r})
        table, ids, rows = np.array(values(64, 16)), jnp.array([3, 60, 3, 0, 17, 63]), values(6, 16)
        want = jax.jit(step)(table, ids, rows, fj.init(table))
        for spec in (P("x"), P(None, "y"), P("x", "y"), P(("y", "x")), P()):
            sharded = jax.device_put(table, NamedSharding(mesh, spec))
            state = fj.init(sharded)
            donated = jax.jit(step, donate_argnums=(0, 3))
            print(*moved(donated.lower(sharded, ids, rows, state).compile().as_text()))
            got = donated(sharded, ids, rows, state)
            check(want, got)
            assert got[0].sharding.is_equivalent_to(sharded.sharding, 2)
        spread = put((ids[:4], rows[:4]), (P("x"), P("x", "y")))
        state = fj.init(table)
        want = jax.jit(step)(table, ids[:4], rows[:4], state)
        sharded = jax.device_put(table, NamedSharding(mesh, P("x")))
        check(want, jax.jit(step)(sharded, *spread, fj.init(sharded)))
        bad = jnp.array([3, 64, 3, 0, 17, 63])
        try:
            jax.block_until_ready(jax.jit(step)(sharded, bad, rows, fj.init(sharded)))
        except jax.errors.JaxRuntimeError as error:
            assert "indices[1]: 64 is no row, expected 0 <= index < 64" in str(error), error
            print("refused")
    """) == ["refused"]


def test_sharded_in_other_ways():
    """Moments sharded and parameters not (ZeRO), under shard_map, vmapped over a sharded axis."""
    assert run_sharded("""
        step = functools.partial(fj.fused_update, learning_rate=0.1)
        params, gradients = values(64, 16), jnp.cos(values(64, 16))
        state = fj.init(params)
        want = jax.jit(step)(params, gradients, state)
        spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim else P())), state)
        whole = jax.device_put(params, NamedSharding(mesh, P()))
        got = jax.jit(step)(whole, gradients, spread)
        check(want, got)

        ensemble = values(8, 5, 2), jnp.cos(values(8, 5, 2))
        states = jax.vmap(fj.init)(ensemble[0])
        want = jax.jit(jax.vmap(step))(*ensemble, states)
        sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x"))), (*ensemble, states))
        vmapped = jax.jit(jax.vmap(step), donate_argnums=(0, 2))
        print(*moved(vmapped.lower(*sharded).compile().as_text()))
        check(want, vmapped(*sharded))

        shard_map = getattr(jax, "shard_map", None)
        if shard_map is None:
            from jax.experimental.shard_map import shard_map
        spec = fj.init(params)._replace(count=P(), mu=P("x"), nu=P("x"))
        options = {"mesh": mesh, "in_specs": (P("x"), P("x"), spec), "out_specs": (P("x"), spec)}
        mapped = shard_map(step, **options)
        check(jax.jit(step)(params, gradients, state), jax.jit(mapped)(params, gradients, state))
        print("done")
    """) == ["done"]


def test_sharded_over_explicit_axes():
    """The default of `jax.make_mesh`: the sharding is part of the type of an array."""
    assert run_sharded("""
        kinds = (jax.sharding.AxisType.Explicit,) * 2
        explicit = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
        enter = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
        params, gradients, rows = np.array(values(64, 16)), np.cos(values(64, 16)), values(3, 16)
        dense = functools.partial(fj.fused_update, learning_rate=0.1)
        sparse = functools.partial(fj.sparse_update, ids=jnp.array([3, 60, 3]), grads=rows, learning_rate=0.1)
        state = fj.init(params)
        for spec in (P("x", "y"), P("y"), P()):
            sharding = NamedSharding(explicit, spec)
            a, g = (jax.device_put(x, sharding) for x in (params, gradients))
            with enter(explicit):
                step = jax.jit(dense, donate_argnums=(0, 2))
                print(*moved(step.lower(a, g, fj.init(a)).compile().as_text()))
                got = step(a, g, fj.init(a))
                assert got[0].sharding.is_equivalent_to(sharding, 2)
                a = jax.device_put(params, sharding)
                rows_got = jax.jit(lambda table, state: sparse(table, state=state))(a, fj.init(a))
            check(jax.jit(dense)(params, gradients, state), got)
            check(jax.jit(lambda table, state: sparse(table, state=state))(params, state), rows_got)
        print("done")
    """) == ["done"]


def test_importing_it_registers_nothing_and_starts_no_backend():
    code = """
import sys
import fastadam
assert "jax" not in sys.modules
import fastadam.jax
from fastadam import _xla
from jax._src import xla_bridge
assert _xla.register.cache_info().currsize == 0
assert not xla_bridge._backends
import jax.numpy as jnp
fastadam.jax.step_arrays([jnp.ones(3)], [jnp.ones(3)], [jnp.zeros(3)], [jnp.zeros(3)], step=1, learning_rate=0.1)
assert _xla.register.cache_info().currsize == 1
print("late")
"""
    result = run_python(code)
    assert result.stdout.split() == ["late"], result.stderr


def test_a_handler_that_jax_rejects_is_an_error_of_ours_and_jax_goes_on():
    code = """
import ctypes
from unittest import mock
import fastadam._jax, fastadam.jax, jax, jax.numpy as jnp

# A handler that says it has API version 99.0: size, extension, major and minor of the metadata, as c_api.h lays it out.
@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
def too_new(frame):
    extension = ctypes.cast(frame[1], ctypes.POINTER(ctypes.c_void_p))  # struct_size, type, next, metadata
    metadata = extension[3]
    version = ctypes.cast(metadata + 8, ctypes.POINTER(ctypes.c_int32))
    ctypes.cast(metadata + 24, ctypes.POINTER(ctypes.c_int32))[0] = 99
    return None

new = ctypes.pythonapi.PyCapsule_New
new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
capsule = new(ctypes.cast(too_new, ctypes.c_void_p).value, None, None)
one = [jnp.ones(3)]
with mock.patch.object(fastadam._jax, "dense_handler", lambda: capsule):
    for _ in range(2):
        try:
            fastadam.jax.step_arrays(one, one, one, one, step=1, learning_rate=0.1)
        except ImportError as error:
            assert "rejects its handlers" in str(error), error
            assert "99" in str(error), error
            print("rejected")
print(int(jnp.ones(3).sum()), len(jax.devices()))
"""
    result = run_python(code)
    assert result.stdout.split() == ["rejected", "rejected", "3", "1"], result.stderr
