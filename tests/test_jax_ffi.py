"""Adam as an operation of JAX: in place when donated, transformed, and late to register."""

from __future__ import annotations

import functools
import pickle
import re
import threading
from pathlib import Path

import fastadam
import numpy as np
import pytest
from absent import need
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


def test_many_leaves_are_stepped_in_several_calls():
    """XLA takes minutes to compile one call of a thousand leaves."""
    values = [random_array(np.random.RandomState(i), (1 + i % 5, 2)) for i in range(150)]
    gradients = [np.cos(w) for w in values]
    params = [jnp.array(w) for w in values]
    state = fj.init(params, amsgrad=True)
    mask = [i % 3 == 0 for i in range(150)]
    options = {"weight_decay": 0.02, "mask": mask, "eps": 1e-7, "epsilon_corrected": False}
    step = jax.jit(functools.partial(STEP, **options), donate_argnums=(0, 2))
    text = step.lower(params, gradients, state).compile().as_text()
    assert text.count("custom_call_target") == 3
    assert MOVES.findall(text) == []
    names = ["decays" if decays else "stays" for decays in mask]
    variables = [fastadam.Variable(w, name=name) for w, name in zip(values, names, strict=True)]
    optimizer = fastadam.AdamW(0.1, weight_decay=0.02, amsgrad=True)
    optimizer.exclude_from_weight_decay(var_names=["stays"])
    for _ in range(3):
        params, state = step(params, [jnp.array(g) for g in gradients], state)
        optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
    assert_same_bits(params, [np.array(w) for w in variables])
    assert_same_bits(state.nu_max, [optimizer.get_slot(w, "vhat") for w in variables])


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


def test_importing_it_registers_nothing_and_starts_no_backend():
    code = """
import sys
import fastadam
assert "jax" not in sys.modules
import fastadam.jax
from fastadam.jax import _operation as operation
from jax._src import xla_bridge
assert operation.register.cache_info().currsize == 0
assert not xla_bridge._backends
import jax.numpy as jnp
fastadam.jax.step_arrays([jnp.ones(3)], [jnp.ones(3)], [jnp.zeros(3)], [jnp.zeros(3)], step=1, learning_rate=0.1)
assert operation.register.cache_info().currsize == 1
print("late")
"""
    result = run_python(code)
    assert result.stdout.split() == ["late"], result.stderr


def test_what_is_loaded_from_a_file_finds_the_handlers_once_registered(tmp_path):
    from jax.experimental import serialize_executable

    w, g = arrays(5, count=2)
    state = fj.init(w)
    compiled = jax.jit(STEP).lower(w, g, state).compile()
    (tmp_path / "step").write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    (tmp_path / "arguments").write_bytes(pickle.dumps([np.asarray(x) for x in (w, g)]))
    code = f"""
import pathlib, pickle
import fastadam.jax, jax.numpy as jnp, numpy as np
from jax.experimental import serialize_executable

fastadam.jax.register()
folder = pathlib.Path({str(tmp_path)!r})
step = serialize_executable.deserialize_and_load(*pickle.loads((folder / "step").read_bytes()))
w, g = map(jnp.asarray, pickle.loads((folder / "arguments").read_bytes()))
print(np.asarray(step(w, g, fastadam.jax.init(w))[0]).tobytes().hex())
"""
    result = run_python(code)
    assert result.stdout.split() == [np.asarray(compiled(w, g, state)[0]).tobytes().hex()], result.stderr


def dense_step(state, w, g, ids):
    return STEP(w, g, state)


def sparse_step(state, w, g, ids):
    return fj.sparse_update(w, ids, g[:3], state, learning_rate=0.1, mode="lazy")


def optax_step(state, w, g, ids):
    updates, state = fj.scale_by_adam().update(g, state, w)
    return optax.apply_updates(w, updates), state


REGISTER = """
jax.export.register_namedtuple_serialization(optax.ScaleByAdamState, serialized_name="optax.ScaleByAdamState")
""".strip()


@functools.cache
def register_states():
    exec(REGISTER, {"jax": jax, "optax": optax})


@pytest.mark.parametrize("step", [dense_step, sparse_step, optax_step])
def test_an_exported_step_has_the_same_bits_in_a_fresh_process(step, tmp_path):
    """With the check and the calls that the guide names."""
    need("flatbuffers")
    from jax import export

    arguments = (*arrays(5, 4, count=2), jnp.array([4, 0, 4]))
    state = STEP(*arguments[:2], fj.init(arguments[0]))[1]
    target = "fastadam_sparse_step" if step is sparse_step else "fastadam_dense_step"
    guide = (Path(__file__).parents[1] / "python" / "README.md").read_text()
    assert f'"{target}"' in guide
    assert REGISTER in guide
    with pytest.raises(ValueError, match=target):
        export.export(jax.jit(step))(state, *arguments)
    check = export.DisabledSafetyCheck.custom_call(target)
    exported = export.export(jax.jit(step), disabled_checks=[check])(state, *arguments)
    expected = jax.tree.leaves(jax.jit(step)(state, *arguments))
    assert_same_bits(exported.call(state, *arguments), expected)
    register_states()
    (tmp_path / "step").write_bytes(exported.serialize())
    np.savez(tmp_path / "arguments.npz", *map(np.asarray, [*state, *arguments]))
    code = f"""
import pathlib
import fastadam.jax, jax, numpy as np, optax
from jax import export

fastadam.jax.register()
{REGISTER}
folder = pathlib.Path({str(tmp_path)!r})
step = export.deserialize(bytearray((folder / "step").read_bytes()))
count, mu, nu, *arguments = np.load(folder / "arguments.npz").values()
found = step.call(optax.ScaleByAdamState(count, mu, nu), *arguments)
print(*[np.asarray(x).tobytes().hex() for x in jax.tree.leaves(found)])
"""
    result = run_python(code)
    assert result.stdout.split() == [np.asarray(x).tobytes().hex() for x in expected], result.stderr


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
