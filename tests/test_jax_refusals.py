"""What fastadam.jax refuses: before anything runs, or as an error of the computation."""

from __future__ import annotations

import functools

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
import fastadam.jax as fj  # noqa: E402  after importorskip


def test_what_the_kernels_have_not_is_refused():
    for option, found in (("eps_root", "1e-08, expected 0"), ("nesterov", "True, expected False")):
        for kind in (fj.adam, fj.adamw):
            with pytest.raises(ValueError, match=f"{option}: {found}: the kernels do not have it"):
                kind(0.1, **{option: 1e-8 if option == "eps_root" else True})
    for dtype, found in (("int32", "int32"), ("bf16", "'bf16'"), (True, "True")):
        with pytest.raises(TypeError, match=f"mu_dtype: {found}, expected a float dtype"):
            fj.adam(0.1, mu_dtype=dtype)
    with pytest.raises(
        TypeError, match=r"params\['w'\]: int32, expected one of float16.* float64, complex64, complex128"
    ):
        fj.adam(0.1).init({"w": jnp.ones(3, int)})
    with pytest.raises(TypeError, match="amsgrad: 'no', expected True or False"):
        fj.init(jnp.ones(3), amsgrad="no")
    with pytest.raises(TypeError, match="ScaleByAmsgradState, with the maximum of bias-corrected moments"):
        fj.fused_update(jnp.ones(3), jnp.ones(3), optax.scale_by_amsgrad().init(jnp.ones(3)), learning_rate=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"grads": {"a": jnp.ones(4)}},
            ValueError,
            r"grads\['a'\]: shape \(4,\), expected \(5,\), the shape of params\['a'\]",
        ),
        ({"grads": {"b": jnp.ones(5)}}, ValueError, "grads: a tree .*'b'.*, expected .*'a'"),
        ({"grads": {"a": "text"}}, TypeError, r"grads\['a'\]: 'text', expected an array"),
        ({"params": {"a": "text"}}, TypeError, r"params\['a'\]: 'text', expected an array"),
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
            r"learning_rate: float32\[3\], expected a number or a scalar",
        ),
        ({"b1": 1.0}, ValueError, "b1: 1.0, expected 0 <= b1 < 1"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"grad_factor": None}, TypeError, "grad_factor: None, expected a number"),
        ({"mask": {"a": 1.0}}, TypeError, "mask: 1.0, expected True or False"),
        ({"mask": {"b": True}}, ValueError, "mask: {'b': True}, expected bools in the tree of the parameters"),
        ({"epsilon_corrected": "no"}, TypeError, "epsilon_corrected: 'no', expected True or False"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(change, error, message):
    params = {"a": jnp.ones(5)}
    arguments = {"params": params, "grads": params, "learning_rate": 0.1}
    fields = {name: change.pop(name) for name in ("mu", "nu", "count") if name in change}
    state = fj.init(params)._replace(**fields)
    with pytest.raises(error, match=message):
        fj.fused_update(**{**arguments, **change}, state=state)


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
        ({"eps": -1.0}, "epsilon: -1.0*, expected 0 or more"),
        ({"weight_decay": -1.0}, "weight_decay: -1.0*, expected 0 or more"),
    ],
)
def test_values_known_only_when_it_runs_are_refused_then(change, message):
    params = jnp.ones(3)

    @functools.partial(jax.jit, static_argnames="epsilon_corrected")
    def update(params, count=0, rate=0.1, b2=0.999, eps=1e-8, weight_decay=0.0, epsilon_corrected=True):
        state = fj.init(params)._replace(count=count)
        numbers = {"learning_rate": rate, "b2": b2, "eps": eps, "weight_decay": weight_decay}
        return fj.fused_update(params, params, state, **numbers, epsilon_corrected=epsilon_corrected)

    update(params)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"fastadam: {message}"):
        jax.block_until_ready(update(params, **change))


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        ({"a": jnp.ones(3)}, ValueError, "updates: a tree .*, expected .*'b'.* like the moments in the state"),
        ({"a": None, "b": jnp.ones(2)}, ValueError, "updates: a tree .*None.*, expected .*'a': \\*"),
        ({"a": [1.0, 2.0, 3.0], "b": jnp.ones(2)}, ValueError, "updates: a tree .*, expected .*'a': \\*"),
        ({"a": "text", "b": jnp.ones(2)}, TypeError, r"updates\['a'\]: 'text', expected an array"),
    ],
)
def test_updates_of_another_tree_are_named_and_not_the_state(updates, error, message):
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    transformation = fj.adam(0.1)
    with pytest.raises(error, match=message):
        transformation.update(updates, transformation.init(params), params)


@pytest.mark.parametrize("name", ["params", "grads", "m", "v", "vhat", "decays"])
def test_what_is_no_list_is_refused_by_name(name):
    zeros = [jnp.zeros(2)]
    given = {"params": zeros, "grads": zeros, "m": zeros, "v": zeros} | {name: 3}
    with pytest.raises(TypeError, match=f"^{name}: int, expected a list"):
        fj.step_arrays(**given, step=1, learning_rate=0.1)


@pytest.mark.parametrize("mode", [jnp.zeros(2), ["lazy"], None])
def test_a_mode_that_is_no_text_is_refused_by_name(mode):
    table = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="^mode: .*, expected 'dense' or 'lazy'"):
        fj.sparse_update(table, jnp.array([0]), table[:1], fj.init(table), learning_rate=0.1, mode=mode)
