"""fastadam.jax under the libraries that hold the optimizer: wrappers of optax, Flax, Equinox, Orbax; optax's dtypes."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
contrib = pytest.importorskip("optax.contrib")
jnp = jax.numpy
import fastadam.jax as fj  # noqa: E402  after importorskip

DTYPES = {"a": "float32", "b": "bfloat16", "c": "float16"}


def params(**dtypes):
    return {name: jnp.linspace(-1, 1, 6).reshape(2, 3).astype(dtype) for name, dtype in (dtypes or DTYPES).items()}


def gradients(like, step):
    rng = np.random.RandomState(step)

    def random(x):
        imaginary = 1j * rng.uniform(-1, 1, x.shape) if jnp.iscomplexobj(x) else 0
        return jnp.asarray(rng.uniform(-1, 1, x.shape) + imaginary, x.dtype)

    return jax.tree.map(random, like)


def run(transformation, start, steps=range(6), state=None, like=None):
    """The parameters and states after each of the steps, with gradients of ``like`` if they differ from parameters."""

    @jax.jit
    def step(values, state, grads):
        updates, state = transformation.update(grads, state, values)
        return optax.apply_updates(values, updates), state, updates

    values, state, seen = start, transformation.init(start) if state is None else state, []
    for k in steps:
        values, state, updates = step(values, state, gradients(start if like is None else like, k))
        seen.append((values, state, updates))
    return seen


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


def assert_near(found, expected, bound):
    """Within ``bound`` units in the last place of 1, the size of the values here."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        is_float = jnp.issubdtype(a.dtype, jnp.inexact)
        wide = (
            (lambda x: np.asarray(x, np.complex128)) if jnp.iscomplexobj(a) else (lambda x: np.asarray(x, np.float64))
        )
        np.testing.assert_allclose(
            wide(a), wide(b), rtol=0, atol=bound * float(jnp.finfo(a.dtype).eps) if is_float else 0
        )


# ---- wrappers of optax -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: optax.MultiSteps(m.adamw(0.1, weight_decay=0.1), 2),
        lambda m: optax.masked(m.adam(0.1), {"a": True, "b": False, "c": True}),
        lambda m: optax.inject_hyperparams(m.adam)(optax.exponential_decay(0.1, 2, 0.5), 0.75, 0.9375),
        lambda m: optax.partition({"ours": m.adam(0.1), "sgd": optax.sgd(0.1)}, {"a": "ours", "b": "ours", "c": "sgd"}),
        lambda m: optax.apply_if_finite(m.adam(0.1), 3),
        lambda m: optax.chain(optax.clip_by_global_norm(0.5), m.adamw(optax.cosine_decay_schedule(0.1, 10))),
        lambda m: optax.named_chain(("clip", optax.clip(0.5)), ("adam", m.adam(0.1))),
        lambda m: optax.conditionally_mask(m.adam(0.1), lambda step: step % 2 == 0),
        lambda m: optax.flatten(m.adam(0.1)),
    ],
    ids=[
        "MultiSteps",
        "masked",
        "inject_hyperparams",
        "partition",
        "apply_if_finite",
        "chain",
        "named_chain",
        "conditionally_mask",
        "flatten",
    ],
)
def test_wrappers_of_optax_do_what_they_do_with_optax(wrap):
    """optax rounds ``1 - b2**t`` to float32, and half moments more often: a few units in the last place."""
    for found, expected in zip(run(wrap(fj), params()), run(wrap(optax), params()), strict=True):
        assert_near(found[0], expected[0], 24)
        assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])


@pytest.mark.parametrize(
    ("wrap", "start"),
    [
        (lambda m: optax.lookahead(m.adam(0.1), 3, 0.5), optax.LookaheadParams.init_synced),
        (lambda m: contrib.schedule_free(m.adamw(0.1, b1=0.0), 0.1), lambda params: params),
    ],
    ids=["lookahead", "schedule_free"],
)
def test_wrappers_with_parameters_of_their_own_do_what_they_do_with_optax(wrap, start):
    """Of float32: the differences are those of the last digit of an update, 0.1 in size."""
    begun = params(a="float32", b="float32")
    ours, theirs = (run(wrap(made), start(begun), like=begun) for made in (fj, optax))
    for found, expected in zip(ours, theirs, strict=True):
        assert_near(found[0], expected[0], 24)
        assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: optax.apply_if_finite(m.adamw(0.1), 3),
        lambda m: optax.MultiSteps(m.adamw(0.1), 1, should_skip_update_fn=optax.skip_not_finite),
    ],
    ids=["apply_if_finite", "MultiSteps"],
)
def test_a_gradient_that_is_not_finite_is_skipped(wrap, bad):
    """With the bits of a run that has never seen it."""
    start, transformation = params(), wrap(fj)
    seen = run(transformation, start, range(2))[-1]
    grads = gradients(start, 7)
    grads["a"] = grads["a"].at[1, 2].set(bad)
    updates, state = transformation.update(grads, seen[1], seen[0])
    values = optax.apply_updates(seen[0], updates)
    assert_same(values, seen[0])
    assert_same(run(transformation, values, range(2, 4), state)[-1][0], run(transformation, start, range(4))[-1][0])


# ---- dtypes of optax -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16", "float16", "float64"])
def test_first_moments_have_the_dtype_that_is_asked_for(mu_dtype):
    """And updates that of optax. Without 64-bit numbers JAX takes float64 for float32."""
    ours, theirs = (run(made.adamw(0.1, mu_dtype=mu_dtype), params()) for made in (fj, optax))
    assert_same(fj.adam(0.1, mu_dtype="bfloat16").init(params()), optax.adam(0.1, mu_dtype="bfloat16").init(params()))
    for found, expected in zip(ours, theirs, strict=True):
        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(expected)]
        # The moments are rounded to the last place of bfloat16 at worst, at another point of the computation.
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
            np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=0, atol=0.01)


def test_first_moments_of_complex_parameters_may_have_a_complex_dtype():
    params = {"a": jnp.array([1 + 2j, 3 - 1j])}
    found = []
    for made in (fj, optax):
        chain, tree = made.scale_by_adam(mu_dtype="complex64"), {"a": jnp.array([0.1 + 0.2j, -0.3j])}
        state = chain.init(params)
        for _ in range(3):
            updates, state = chain.update(tree, state, params)
        found.append((updates, state.mu, state.nu))
    assert_same(*found)
    with pytest.raises(TypeError, match=r"mu_dtype: complex64 with params\['b'\] of float32, expected a float dtype"):
        fj.scale_by_adam(mu_dtype="complex64").init({**params, "b": jnp.ones(2)})


def test_first_moments_of_bfloat16_are_float32_in_optax_after_a_float32_gradient():
    """As the guide says; ``mu_dtype`` gives the same here."""
    params, gradients = {"a": jnp.ones(2, "bfloat16")}, {"a": jnp.ones(2)}
    dtypes = []
    for chain in (fj.scale_by_adam(), fj.scale_by_adam(mu_dtype="float32"), optax.scale_by_adam()):
        _, state = chain.update(gradients, chain.init(params), params)
        dtypes.append(str(state.mu["a"].dtype))
    assert dtypes == ["bfloat16", "float32", "float32"]


@pytest.mark.parametrize(("dtype", "mu_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_step_of_two_dtypes_runs_in_the_wider_and_rounds_once(dtype, mu_dtype):
    """The bits of the step in float32 on what was stored."""
    start = params(w=dtype)
    mixed, plain = fj.scale_by_adam(mu_dtype=mu_dtype), fj.scale_by_adam()
    state = mixed.init(start)
    wide = jax.tree.map(lambda x: x.astype("float32"), start)
    for step in range(4):
        grads = gradients(start, step)
        stored = jax.tree.map(lambda x: x if x.dtype == "int32" else x.astype("float32"), state)
        expected, after = plain.update(jax.tree.map(lambda g: g.astype("float32"), grads), stored, wide)
        updates, state = mixed.update(grads, state, start)
        assert_same(updates, expected)
        assert_same(state.mu, jax.tree.map(lambda x: x.astype(mu_dtype), after.mu))
        assert_same(state.nu, jax.tree.map(lambda x: x.astype(dtype), after.nu))


@pytest.mark.parametrize(
    ("dtype", "mu_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_a_fused_step_takes_states_of_two_dtypes(dtype, mu_dtype):
    start = params(w=dtype)
    state = optax.scale_by_adam(mu_dtype=mu_dtype).init(start)
    wide = jax.tree.map(lambda x: x if x.dtype == "int32" else x.astype("float32"), state)
    step = jax.jit(lambda p, g, s: fj.fused_update(p, g, s, learning_rate=0.1))
    values, after = step(start, gradients(start, 0), state)
    expected, reference = step(start, gradients(start, 0), wide)
    assert_same(values, expected)
    assert_same(after, jax.tree.map(lambda x, like: x.astype(like.dtype), reference, state))


@pytest.mark.parametrize("others", [{}, {"b": "float32", "c": "bfloat16"}], ids=["alone", "among others"])
def test_complex_leaves_are_optaxs(others):
    """With betas that lose nothing in float32, where optax makes its corrections."""
    start = params(a="complex64", **others)
    ours, theirs = (run(made.adam(0.1, 0.75, 0.9375), start) for made in (fj, optax))
    for found, expected in zip(ours, theirs, strict=True):
        assert_near(found, expected, 24)
        assert_near(found[0]["a"], expected[0]["a"], 2)  # XLA may fuse a product with a sum


# ---- Flax, Equinox, Orbax --------------------------------------------------------------------------------------------


@pytest.mark.slow  # seconds to import
def test_a_train_state_of_flax_goes_on_to_the_bit():
    train_state = pytest.importorskip("flax.training.train_state")
    serialization = pytest.importorskip("flax.serialization")
    start = params(a="float32", b="bfloat16")

    def create():
        return train_state.TrainState.create(apply_fn=None, params=start, tx=fj.adamw(0.1))

    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    state = create()
    for k in range(3):
        state = step(state, gradients(start, k))
    resumed = serialization.from_bytes(create(), serialization.to_bytes(state))
    for k in range(3, 6):
        state, resumed = (step(each, gradients(start, k)) for each in (state, resumed))
    assert_same((resumed.params, resumed.opt_state), (state.params, state.opt_state))
    assert_same(state.params, run(fj.adamw(0.1), start)[-1][0])


@pytest.mark.slow  # seconds to import
def test_an_optimizer_of_nnx_updates_the_model():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, fj.adamw(0.1), wrt=nnx.Param)
    before = np.asarray(model.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: (m(jnp.ones((3, 4))) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert not np.array_equal(np.asarray(model.kernel[...]), before)


def test_a_module_of_equinox_is_trained():
    """Leaves that are not arrays are None in the gradients, as ``eqx.filter`` makes them."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 1, 8, 1, key=jax.random.key(0))

    def train(transformation):
        @eqx.filter_jit
        def step(model, state):
            loss, grads = eqx.filter_value_and_grad(lambda m: (jax.vmap(m)(jnp.ones((3, 4))) ** 2).mean())(model)
            updates, state = transformation.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), state, loss

        trained, state, losses = model, transformation.init(eqx.filter(model, eqx.is_inexact_array)), []
        for _ in range(4):
            trained, state, loss = step(trained, state)
            losses.append(float(loss))
        return eqx.filter(trained, eqx.is_inexact_array), losses

    (found, losses), (expected, _) = train(fj.adam(0.01, eps=1e-3)), train(optax.adam(0.01, eps=1e-3))
    assert losses[-1] < losses[0]
    assert_near(found, expected, 24)


@pytest.mark.slow  # seconds to import
@pytest.mark.filterwarnings("ignore")  # of Orbax
@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_orbax_restores_to_the_bit(mu_dtype, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    start, transformation = params(a="float32", b="bfloat16"), fj.adamw(0.1, mu_dtype=mu_dtype)
    seen = run(transformation, start)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "third", {"params": seen[2][0], "state": seen[2][1]})
        saver.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, {"params": start, "state": transformation.init(start)})
        restored = saver.restore(tmp_path / "third", like)
    assert_same(restored["state"], seen[2][1])
    resumed = run(transformation, restored["params"], range(3, 6), restored["state"])
    assert_same(resumed[-1], seen[-1])
