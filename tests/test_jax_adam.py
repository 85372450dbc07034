"""Adam for JAX against fastadam's own bits, optax, and references in float64."""

from __future__ import annotations

import contextlib
import functools

import fastadam
import numpy as np
import pytest
from cases import bits, random_array

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
import fastadam.jax as fj  # noqa: E402  after importorskip

F32 = np.float32
SHAPES = {"layer": {"bias": (5,), "kernel": (33, 31)}, "scale": (), "nothing": (0, 3)}
KERAS = {"eps": 1e-7, "epsilon_corrected": False}
# 1 - beta is exact in float32. Of 0.999 it is not, and optax takes it of the float64: 1e-5 of the second moment.
BETAS = {"b1": 0.875, "b2": 1 - 2**-10}


def trees(seed, dtype=F32, low=-20):
    rng = np.random.RandomState(seed)
    return jax.tree.map(
        lambda shape: random_array(rng, shape, low, dtype=dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def to_jax(tree):
    return jax.tree.map(jnp.array, tree)


def in_float64():
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        np.testing.assert_array_equal(bits(a), bits(e))


def assert_within(actual, expected, ulps, floor=0.0):
    """In ulps of the expected value, or of `floor` where that is smaller."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape
        if a.dtype.kind == "i":
            np.testing.assert_array_equal(a, e)
            continue
        info = jnp.finfo(a.dtype)
        scale = np.maximum(np.abs(e.astype(np.float64)), max(floor, float(info.tiny)))
        error = np.abs(a.astype(np.float64) - e.astype(np.float64))
        np.testing.assert_array_less(error, ulps * float(info.eps) * scale)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_fused_update_has_the_bits_of_the_optimizer(amsgrad, weight_decay, dtype):
    with in_float64() if dtype == "float64" else contextlib.nullcontext():
        values = trees(0, dtype)
        optimizer = fastadam.Adam(0.01, amsgrad=amsgrad, weight_decay=weight_decay)
        params = to_jax(values)
        state = fj.init(params, amsgrad=amsgrad)
        update = jax.jit(functools.partial(fj.fused_update, learning_rate=0.01, weight_decay=weight_decay, **KERAS))
        for seed in range(1, 5):
            gradients = trees(seed, dtype, low=-8)
            pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(values), strict=True)
            optimizer.apply_gradients(list(pairs))
            params, state = update(params, to_jax(gradients), state)
        assert_same_bits(params, values)
        moments = {"m": state.mu, "v": state.nu} | ({"vhat": state.nu_max} if amsgrad else {})
        for name, tree in moments.items():
            slots = jax.tree.map(lambda w, name=name: optimizer.get_slot(w, name), values)
            assert_same_bits(tree, slots)
        assert int(state.count) == 4


def test_step_arrays_has_kerass_conventions():
    values = [random_array(np.random.RandomState(i), 17) for i in range(3)]
    w, m, v, vhat = (
        list(map(jnp.array, part))
        for part in ([values[0]], [np.zeros(17, F32)], [np.zeros(17, F32)], [np.zeros(17, F32)])
    )
    own = [values[0].copy(), *(np.zeros(17, F32) for _ in range(3))]
    step_arrays = jax.jit(fj.step_arrays)
    for step in (1, 2):
        w, m, v, vhat = step_arrays(w, [values[step]], m, v, vhat, step=step, learning_rate=jnp.float32(0.1))
        fastadam.adam_step(own[0], values[step], *own[1:], step=step, learning_rate=0.1)
    assert_same_bits([w, m, v, vhat], [[x] for x in own])
    *_, no_vhat = step_arrays(w, [values[1]], m, v, step=3, learning_rate=0.1)
    assert no_vhat is None
    assert fj.step_arrays([], [], [], [], step=1, learning_rate=0.1) == ([], [], [], None)


def test_a_gradient_factor_and_a_mask_are_those_of_the_optimizer():
    values, gradients = trees(0), trees(1)
    mask = {"layer": {"bias": False, "kernel": True}, "scale": False, "nothing": True}
    for given in (mask, lambda params: mask, {"layer": mask["layer"], "scale": False, "nothing": True}):
        own = jax.tree.map(np.copy, values)
        for w, g, decays in zip(*map(jax.tree.leaves, (own, gradients, mask)), strict=True):
            slots = [np.zeros_like(w) for _ in range(2)]
            fastadam.adam_step(
                w, g, *slots, step=1, learning_rate=0.1, grad_factor=0.3, weight_decay=0.1 if decays else 0.0
            )
        options = {"learning_rate": 0.1, "grad_factor": 0.3, "weight_decay": 0.1, "mask": given}
        params, _ = fj.fused_update(to_jax(values), to_jax(gradients), fj.init(values), **options, **KERAS)
        assert_same_bits(params, own)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("gradient_dtype", ["own", "float32"])
def test_half_parameters_have_float32_moments_or_their_own(dtype, wide, gradient_dtype):
    values, gradients = trees(0), trees(1, low=-6)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), values)
    state = fj.init(params)
    assert {x.dtype.name for x in jax.tree.leaves((state.mu, state.nu))} == {"float32"}
    if not wide:
        narrow = jax.tree.map(jnp.zeros_like, params)
        state = state._replace(mu=narrow, nu=narrow)
    given = jax.tree.map(lambda x: jnp.asarray(x, dtype if gradient_dtype == "own" else F32), gradients)
    new, state = fj.fused_update(params, given, state, learning_rate=0.1)
    assert {x.dtype.name for x in jax.tree.leaves(new)} == {dtype}
    assert {x.dtype.name for x in jax.tree.leaves(state.mu)} == {"float32" if wide else dtype}

    def expected(w, g):
        w, g = np.asarray(w).astype(np.float64), np.asarray(g).astype(np.float64)
        return w - 0.1 * g / (np.abs(g) + 1e-8)

    wanted = jax.tree.map(expected, params, given)
    # One rounding of the parameter; besides, m / sqrt(v) of two half moments is off by 1.5 of their ulps.
    assert_within(new, wanted, 0.51 if wide else 1.0, floor=0.0 if wide else 0.4)


def test_the_epsilon_is_optaxs_unless_it_is_tensorflows():
    def float64(corrected):
        m, v, w = 0.0, 0.0, 1.0
        for t in range(1, 4):
            m, v = 0.9 * m + 0.1 * 1e-3, 0.999 * v + 0.001 * 1e-6
            root = np.sqrt(v / (1 - 0.999**t)) + 1e-3 if corrected else np.sqrt(v) + 1e-3
            w -= 0.1 * m / (1 - 0.9**t) / root * (1 if corrected else np.sqrt(1 - 0.999**t))
        return w

    for corrected in (True, False):
        with in_float64():
            params = jnp.ones(3, jnp.float64)
            state = fj.init(params)
            for _ in range(3):
                params, state = fj.fused_update(
                    params, 1e-3 * jnp.ones(3), state, learning_rate=0.1, eps=1e-3, epsilon_corrected=corrected
                )
            np.testing.assert_allclose(params, float64(corrected), rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["adam", "adamw", "scheduled"])
def test_a_trajectory_is_optaxs_and_states_interchange_both_ways(dtype, kind):
    rate = optax.cosine_decay_schedule(0.01, 50) if kind == "scheduled" else 0.01
    name = "adamw" if kind == "adamw" else "adam"
    options = {"weight_decay": 0.1} if kind == "adamw" else {}
    with in_float64() if dtype == "float64" else contextlib.nullcontext():
        ours, theirs = (getattr(module, name)(rate, **BETAS, **options) for module in (fj, optax))
        params = to_jax(trees(0, dtype))
        mine, reference = [params, ours.init(params)], [params, theirs.init(params)]
        assert_same_bits(mine[1], reference[1])
        for step in range(1, 13):
            gradients = to_jax(trees(step, dtype, low=-8))
            for run, transformation in ((mine, ours), (reference, theirs)):
                updates, run[1] = jax.jit(transformation.update)(gradients, run[1], run[0])
                run[0] = optax.apply_updates(run[0], updates)
            if step == 6:  # each goes on with the other's state
                mine[1], reference[1] = reference[1], mine[1]
        # Two orders of the same operations, whose sums cancel: a few ulps of the gradients, and of the steps.
        assert_within(mine[1], reference[1], 8, floor=0.1)
        assert_within(mine[0], reference[0], 8, floor=0.1)


def test_the_direction_is_within_ulps_of_float64():
    g = random_array(np.random.RandomState(0), 4099, low=-10)
    updates, state = jax.jit(fj.scale_by_adam().update)(jnp.array(g), fj.scale_by_adam().init(jnp.array(g)))
    wide = g.astype(np.float64)
    assert_within(updates, wide / (np.abs(wide) + 1e-8), 4)
    assert int(state.count) == 1


def test_hyperparameters_can_be_injected_and_changed():
    params, gradients = to_jax(trees(0)), to_jax(trees(1))
    results = []
    for adam in (fj.adam, optax.adam):
        # optax makes the corrections of injected numbers in float32: betas that it loses nothing of.
        transformation = optax.inject_hyperparams(adam)(learning_rate=0.1, b1=0.75, b2=0.9375)
        state = transformation.init(params)
        state.hyperparams["learning_rate"] = jnp.float32(0.05)
        update = jax.jit(transformation.update)
        updates, state = update(gradients, state)
        state.hyperparams["b1"] = jnp.float32(0.5)
        results.append((update(gradients, state)[0], updates))
        assert update._cache_size() == 1
    assert_within(*results, 8)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_injected_states_go_both_ways(kind):
    params, gradients = to_jax(trees(0)), to_jax(trees(1))
    ours, theirs = (optax.inject_hyperparams(getattr(made, kind))(0.1, 0.75, 0.9375) for made in (fj, optax))
    assert_same_bits(ours.init(params), theirs.init(params))
    second = []
    for before, after in ((ours, theirs), (theirs, ours)):
        state = before.update(gradients, before.init(params), params)[1]
        second.append(after.update(gradients, state, params)[0])
    assert_within(*second, 8, floor=0.1)
    state = ours.init(params)
    state.hyperparams["eps_root"] = jnp.float32(1e-8)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="epsilon: nan"):
        jax.block_until_ready(ours.update(gradients, state, params))


def test_it_stands_in_a_chain_and_under_masked():
    params, gradients = to_jax(trees(0)), to_jax(trees(1))
    mask = {"layer": True, "scale": False, "nothing": True}
    results = []
    for adam in (fj.adam, optax.adam):
        transformation = optax.chain(optax.clip_by_global_norm(0.5), optax.masked(adam(0.1, **BETAS), mask))
        results.append(transformation.update(gradients, transformation.init(params), params))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    assert_within(*results, 4, floor=0.1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_moments_are_rounded_once(dtype):
    params, gradients = (jax.tree.map(lambda x: jnp.asarray(x, dtype), trees(i, low=-6)) for i in range(2))
    transformation = fj.adam(0.1)
    state = transformation.init(params)
    assert_same_bits(state, optax.adam(0.1).init(params))
    updates, (adam, _) = transformation.update(gradients, state, params)
    assert {x.dtype.name for x in jax.tree.leaves((updates, adam.mu, adam.nu))} == {dtype}
    assert_within(adam.mu, jax.tree.map(lambda g: 0.1 * np.asarray(g, np.float64), gradients), 0.51)
    assert_within(updates, jax.tree.map(lambda g: -0.1 * np.sign(np.asarray(g, np.float64)), gradients), 2)


def test_float32_gradients_of_half_parameters_are_rounded_for_half_moments():
    params = jnp.ones(5, jnp.bfloat16)
    transformation = fj.adam(0.1)
    updates, state = transformation.update(jnp.ones(5), transformation.init(params), params)
    assert {x.dtype.name for x in (updates, state[0].mu, state[0].nu)} == {"bfloat16"}


@pytest.mark.parametrize("rate", [0.1, 1e-6])
def test_updates_from_half_gradients_have_the_dtype_of_the_moments(rate):
    """Of optax too, which squares them in their own."""
    params, gradients = jnp.ones(50), jnp.asarray(np.linspace(-3, 3, 50), jnp.float16)
    results = []
    for transformation, dtype in ((fj.adam(rate, **BETAS), "float16"), (optax.adam(rate, **BETAS), "float32")):
        updates, state = transformation.update(gradients.astype(dtype), transformation.init(params), params)
        assert {x.dtype.name for x in (updates, state[0].mu, state[0].nu)} == {"float32"}
        results.append((updates, state[0].mu, state[0].nu))
    assert_within(*results, 4)


def test_gradients_of_the_other_half_dtype_lose_nothing():
    params, gradients = jnp.ones(2, jnp.float16), jnp.full(2, 1e5, jnp.bfloat16)
    new, _ = fj.fused_update(params, gradients, fj.init(params), learning_rate=0.1, grad_factor=1e-5)
    np.testing.assert_array_equal(new, np.full(2, 0.9, np.float16))
    ids, table = jnp.array([1]), jnp.ones((2, 1), jnp.float16)
    options = {"learning_rate": 0.1, "grad_factor": 1e-5, "mode": "lazy"}
    table, _ = fj.sparse_update(table, ids, gradients[:1, None], fj.init(table), **options)
    np.testing.assert_array_equal(table, np.float16([[1], [0.9]]))


def test_numbers_of_python_are_not_rounded_to_float32():
    """Which 1 - 0.999 would show: optax computes it in double."""
    params, gradients = jnp.zeros(100), jnp.asarray(np.linspace(-1, 1, 100), jnp.float32)
    _, state = fj.fused_update(params, gradients, fj.init(params), learning_rate=0.1)
    _, theirs = optax.scale_by_adam().update(gradients, optax.scale_by_adam().init(params))
    assert_same_bits([state.mu, state.nu], [theirs.mu, theirs.nu])
    rates = jax.jit(lambda rate: fj.fused_update(params, gradients, fj.init(params), learning_rate=rate)[1].nu)
    for rate in (0.1, jnp.float16(0.1), 1):
        assert_same_bits(rates(rate), theirs.nu)


def test_a_schedule_is_asked_with_the_count_before_the_step():
    params, asked = jnp.ones(3), []

    def schedule(count):
        asked.append(int(count))
        return 0.1 * (int(count) + 1)

    state = fj.init(params)
    moved = [params]
    for _ in range(3):
        params, state = fj.fused_update(params, jnp.ones(3), state, learning_rate=schedule)
        moved.append(params)
    assert asked == [0, 1, 2]
    np.testing.assert_allclose(-np.diff(np.stack(moved)[:, 0]), [0.1, 0.2, 0.3], rtol=2e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_a_count_may_have_any_integer_dtype(wide):
    with in_float64() if wide else contextlib.nullcontext():
        w, zero = [jnp.ones(3)], [jnp.zeros(3)]
        want = fj.step_arrays(w, w, zero, zero, step=7, learning_rate=0.1)
        for step in (np.int64(7), np.uint8(7), jnp.int32(7), jnp.asarray(np.array(7, np.int64)), np.array(7)):
            assert_same_bits(fj.step_arrays(w, w, zero, zero, step=step, learning_rate=0.1), want)


def test_the_count_stops_at_its_largest():
    params = jnp.ones(3)
    state = fj.init(params)._replace(count=jnp.int32(2**31 - 1))
    _, state = fj.fused_update(params, params, state, learning_rate=0.1)
    assert int(state.count) == 2**31 - 1
