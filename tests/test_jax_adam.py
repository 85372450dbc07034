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
    state = optax.adam(0.1, mu_dtype="float16").init({"w": params})
    with pytest.raises(TypeError, match=r"mu\['w'\]: float16, expected float32 as updates\['w'\] is bfloat16"):
        transformation.update({"w": params}, state)


def test_what_the_kernels_have_not_is_refused():
    for option in ({"eps_root": 1e-8}, {"nesterov": True}):
        with pytest.raises(TypeError, match=next(iter(option))):
            fj.adam(0.1, **option)
    with pytest.raises(TypeError, match=r"mu_dtype: bfloat16, expected None or float32 like params\['w'\]"):
        fj.adam(0.1, mu_dtype="bfloat16").init({"w": jnp.ones(3)})
    with pytest.raises(TypeError, match="ScaleByAmsgradState, whose nu_max is of bias-corrected moments"):
        fj.fused_update(jnp.ones(3), jnp.ones(3), optax.scale_by_amsgrad().init(jnp.ones(3)), learning_rate=0.1)


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"grads": {"a": jnp.ones(4)}},
            ValueError,
            r"grads\['a'\]: shape \(4,\), expected \(5,\), the shape of params\['a'\]",
        ),
        ({"grads": {"b": jnp.ones(5)}}, ValueError, "grads: a tree .*'b'.*, expected .*'a'"),
        ({"grads": {"a": jnp.ones(5, int)}}, TypeError, r"grads\['a'\]: int32, expected a float dtype"),
        ({"params": {"a": jnp.ones(5, int)}}, TypeError, r"params\['a'\]: int32, expected one of float16"),
        ({"mu": {"a": jnp.ones(3)}}, ValueError, r"mu\['a'\]: shape \(3,\), expected \(5,\)"),
        ({"nu": {"a": jnp.ones(5, jnp.bfloat16)}}, TypeError, r"nu\['a'\]: bfloat16, expected float32"),
        ({"count": 1.5}, TypeError, "state.count: 1.5, expected an integer"),
        ({"count": jnp.ones(2, int)}, ValueError, r"state.count: shape \(2,\), expected a scalar"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate: nan, expected a finite number"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate: 'fast', expected a number"),
        (
            {"learning_rate": jnp.ones(3)},
            ValueError,
            r"learning_rate: float32\[3\], expected a number or a float scalar",
        ),
        ({"b1": 1.0}, ValueError, "b1: 1.0, expected 0 <= b1 < 1"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"grad_factor": None}, TypeError, "grad_factor: None, expected a number"),
        ({"mask": {"a": 1.0}}, TypeError, "mask: 1.0, expected True or False"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(change, error, message):
    params = {"a": jnp.ones(5)}
    arguments = {"params": params, "grads": params, "learning_rate": 0.1}
    fields = {name: change.pop(name) for name in ("mu", "nu", "count") if name in change}
    state = fj.init(params)._replace(**fields)
    with pytest.raises(error, match=message):
        fj.fused_update(**{**arguments, **change}, state=state)


@pytest.mark.parametrize("wide", [False, True])
def test_a_count_may_have_any_integer_dtype(wide):
    with in_float64() if wide else contextlib.nullcontext():
        w, zero = [jnp.ones(3)], [jnp.zeros(3)]
        want = fj.step_arrays(w, w, zero, zero, step=7, learning_rate=0.1)
        for step in (np.int64(7), np.uint8(7), jnp.int32(7), jnp.asarray(np.array(7, np.int64)), np.array(7)):
            assert_same_bits(fj.step_arrays(w, w, zero, zero, step=step, learning_rate=0.1), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0, 2.0], [1.0], [1.0]), "grads: 2 arrays, expected 1 like params"),
        (([1.0], [1.0], [1.0], [1.0], []), "vhat: 0 arrays, expected 1 like params"),
    ],
)
def test_lists_of_another_length_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fj.step_arrays(*arguments, step=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="decays: 2 flags, expected 1"):
        fj.step_arrays(*[[1.0]] * 4, step=1, learning_rate=0.1, decays=[True, False])
    with pytest.raises(ValueError, match="step: 0, expected an integer from 1"):
        fj.step_arrays(*[[1.0]] * 4, step=0, learning_rate=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "step: 0.*expected 1 or more"),
        ({"rate": jnp.nan}, "learning_rate: -?nan, expected a finite number"),
        ({"b2": 1.0}, "beta_2: 1.0*, expected 0 or more and less than 1"),
        ({"eps": 0.0, "epsilon_corrected": False}, "epsilon: so small"),
    ],
)
def test_values_known_only_when_it_runs_are_refused_then(change, message):
    params = jnp.ones(3)

    @functools.partial(jax.jit, static_argnames="epsilon_corrected")
    def update(params, count=0, rate=0.1, b2=0.999, eps=1e-8, epsilon_corrected=True):
        state = fj.init(params)._replace(count=count)
        numbers = {"learning_rate": rate, "b2": b2, "eps": eps, "epsilon_corrected": epsilon_corrected}
        return fj.fused_update(params, params, state, **numbers)

    update(params)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"fastadam: {message}"):
        jax.block_until_ready(update(params, **change))


def test_the_count_stops_at_its_largest():
    params = jnp.ones(3)
    state = fj.init(params)._replace(count=jnp.int32(2**31 - 1))
    _, state = fj.fused_update(params, params, state, learning_rate=0.1)
    assert int(state.count) == 2**31 - 1
