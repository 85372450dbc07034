"""Steps of fastadam.keras on the backend that Keras has in this process: test_keras_adam.py runs this file on each."""

from __future__ import annotations

import fastadam.keras
import keras
import numpy as np
import pytest

F32 = np.float32
BACKEND = keras.backend.backend()
SHAPES = ((3,), (), (4, 5), (0,), (2, 3, 2))
STEPS = 6
EXACT = {"beta_1": 0.875, "beta_2": 0.9375}  # float32 holds them: Keras and TF then have the same 1 - beta
FACTORS = {"w0": 0.0, "w1": 1.0, "w2": 0.5, "w3": 2.0, "w4": 2.0}
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "epsilon": {"epsilon": 1e-3},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.25},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "average": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    "accumulated": {"gradient_accumulation_steps": 2},
    "scaled": {"loss_scale_factor": 8.0},
    "decayed": {"weight_decay": 0.125},
}


def only(*backends):
    """A test of what these backends of Keras have; on another there is no such test."""
    return lambda test: test if BACKEND in backends else None


def array(value):
    """A copy in NumPy; of bfloat16 in float32."""
    value = keras.ops.cast(value, "float32") if keras.backend.standardize_dtype(value.dtype) == "bfloat16" else value
    return np.array(keras.ops.convert_to_numpy(value))


def values(seed=0, shapes=SHAPES, dtype="float32"):
    rng = np.random.RandomState(seed)
    return [np.asarray(rng.uniform(-1, 1, shape), dtype) for shape in shapes]


def gradients(step, shapes=SHAPES, dtype="float32"):
    return [keras.ops.convert_to_tensor(g, dtype=dtype) for g in values(100 + step, shapes)]


def variables(dtype="float32", shapes=SHAPES):
    return [keras.Variable(value, dtype=dtype, name=f"w{i}") for i, value in enumerate(values(shapes=shapes))]


def both(kind, rate=0.0078125, **options):
    """Of this library and of Keras."""
    return getattr(fastadam.keras, kind)(rate, **options), getattr(keras.optimizers, kind)(rate, **options)


def trained(optimizer, dtype="float32", steps=STEPS, first=0, made=None):
    made = made or variables(dtype)
    for step in range(first, first + steps):
        optimizer.apply(gradients(step, [v.shape for v in made], dtype), made)
    return made


def assert_near(found, expected, *, steps=STEPS, update=0.0):
    """Within one rounding of numbers up to 1 in each step, and `update` more."""
    for a, b in zip(map(array, found), map(array, expected), strict=True):
        assert a.dtype == b.dtype
        ulp = np.spacing(np.abs(b).max(initial=1))
        np.testing.assert_allclose(a, b, rtol=0, atol=steps * (ulp + update))


def adam_in_double(w, g, m, v, step, rate=0.0078125, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """As the paper has it, before section 2.1."""
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    rate = rate * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
    return w - rate * m / (np.sqrt(v) + epsilon), m, v


# ---- the same numbers as Keras ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_keras(kind, name):
    mine, theirs = both(kind, **EXACT, **OPTIONS[name])
    found, expected = trained(mine), trained(theirs)
    assert_near(found, expected)
    assert [v.path.split("/")[-1] for v in mine.variables] == [v.path.split("/")[-1] for v in theirs.variables]
    assert_near(mine.variables, theirs.variables)
    assert not np.array_equal(array(found[0]), values()[0])
    if BACKEND == "numpy" and "clip" not in name:
        assert all(np.array_equal(array(a), array(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_steps_with_betas_that_float32_rounds(amsgrad):
    """Keras has 0.001 where TF has 1 - float32(0.999), 1.3e-5 more; an update is at most 3.2 times the rate."""
    mine, theirs = both("Adam", amsgrad=amsgrad)
    assert_near(trained(mine), trained(theirs), update=0.65e-5 * 3.2 * 0.0078125)


@only("numpy", "torch")  # JAX has no float64 unless it is asked for when it starts
def test_double_variables_are_computed_in_double():
    """Keras's NumPy backend is not a reference: it makes moments of float32 for them."""
    optimizer = fastadam.keras.Adam(0.0078125)
    found = trained(optimizer, "float64")
    for i, w in enumerate(value.astype(float) for value in values()):
        m = v = np.zeros_like(w)
        for step in range(STEPS):
            w, m, v = adam_in_double(w, array(gradients(step, dtype="float64")[i]), m, v, step + 1)
        made = (found[i], optimizer._momentums[i], optimizer._velocities[i])
        for variable, number in zip(made, (w, m, v), strict=True):
            assert array(variable).dtype == np.float64
            np.testing.assert_allclose(array(variable), number, rtol=1e-14, atol=1e-15)


def test_single_variables_beside_a_reference_in_double():
    """Ours is nearer to it than Keras's: with the same 1 - beta in moments and correction, they cancel."""
    mine, theirs = both("Adam")
    found, of_keras = trained(mine), trained(theirs)
    for i, w in enumerate(value.astype(float) for value in values()):
        m = v = np.zeros_like(w)
        for step in range(STEPS):
            w, m, v = adam_in_double(w, values(100 + step)[i].astype(float), m, v, step + 1)
        error = np.abs(array(found[i]) - w).max(initial=0)
        assert error <= STEPS * np.spacing(F32(1))
        assert error <= np.abs(array(of_keras[i]) - w).max(initial=0) + np.spacing(F32(1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_variables_have_half_moments_and_one_rounding(dtype):
    optimizer, (w,) = fastadam.keras.Adam(0.0078125), variables(dtype, [(4, 5)])
    eps = 2.0**-10 if dtype == "float16" else 2.0**-7
    optimizer.build([w])
    m, v = optimizer._momentums[0], optimizer._velocities[0]
    assert (m.dtype, v.dtype) == (dtype, dtype)
    for step in range(STEPS):
        (g,) = gradients(step, [(4, 5)], dtype)
        before = [array(x).astype(float) for x in (w, g, m, v)]
        optimizer.apply([g], [w])
        for x, expected in zip((w, m, v), adam_in_double(*before, step + 1), strict=True):
            # Half an ulp; moments below the smallest normal number of float16 have fewer digits.
            np.testing.assert_allclose(array(x), expected, rtol=0.51 * eps, atol=2.0**-24)


def test_variables_of_several_dtypes_in_one_step():
    optimizer = fastadam.keras.Adam(0.0078125, **EXACT)
    mixed = [keras.Variable(value, dtype=d) for value, d in zip(values()[:2], ("float16", "float32"), strict=True)]
    alone = variables()[1:2]
    for step in range(2):
        given = gradients(step)[:2]
        optimizer.apply(given, mixed)
    other = fastadam.keras.Adam(0.0078125, **EXACT)
    for step in range(2):
        other.apply(gradients(step)[1:2], alone)
    assert np.array_equal(array(mixed[1]), array(alone[0]))
    np.testing.assert_allclose(
        array(mixed[0]), array(trained(fastadam.keras.Adam(0.0078125, **EXACT), steps=2)[0]), rtol=2e-3
    )


def test_schedules_and_callables_are_evaluated_by_keras():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.125, 2, 0.5)
    for rate in (schedule, lambda: 0.0625):
        mine, theirs = both("AdamW", rate, **EXACT)
        assert_near(trained(mine), trained(theirs))


def test_numbers_that_change_between_steps_count():
    mine, theirs = both("Adam", **EXACT)
    found, expected = trained(mine), trained(theirs)
    for optimizer in (mine, theirs):
        optimizer.beta_1, optimizer.beta_2, optimizer.epsilon = 0.5, 0.75, 1e-4
        optimizer.learning_rate = 0.0625
    assert_near(trained(mine, made=found, first=6), trained(theirs, made=expected, first=6), steps=2 * STEPS)
    assert int(array(mine.iterations)) == 12


def test_excluded_variables_do_not_decay():
    made = []
    for optimizer in both("AdamW", **EXACT, weight_decay=0.5):
        bias, kernel = keras.Variable(values()[0], name="bias"), keras.Variable(values()[0], name="kernel")
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        for step in range(STEPS):
            g = gradients(step)[0]
            optimizer.apply([g, g], [bias, kernel])
        made.append([bias, kernel])
    assert_near(*made)
    assert not np.array_equal(array(made[0][0]), array(made[0][1]))


def test_constraints_and_overwriting_gradients_are_keras_own():
    made = []
    for optimizer in both("Adam", 0.5, **EXACT):
        bound, replaced = keras.Variable(values()[2]), keras.Variable(values()[0])
        bound.constraint = keras.constraints.NonNeg()
        replaced.overwrite_with_gradient = True
        for step in range(2):
            optimizer.apply([gradients(step)[2], gradients(step)[0]], [bound, replaced])
        made.append([bound, replaced])
    assert_near(*made)
    assert array(made[0][0]).min() == 0
    assert np.array_equal(array(made[0][1]), array(gradients(1)[0]))


def test_pairs_without_gradient_are_left_out():
    optimizer, made = fastadam.keras.Adam(0.5), variables()
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.apply([None, *gradients(0)[1:]], made)
    assert np.array_equal(array(made[0]), values()[0])
    assert not np.array_equal(array(made[2]), values()[2])
    optimizer.apply(gradients(1), made)
    assert not np.array_equal(array(made[0]), values()[0])


def test_gradients_of_other_kinds_are_converted():
    expected, found = variables(shapes=[(4, 5)]), variables(shapes=[(4, 5)])
    g = values(100)[2]
    fastadam.keras.Adam(0.5).apply([keras.ops.convert_to_tensor(g)], expected)
    for other in (g.tolist(), keras.Variable(g), g.astype(np.float64), np.asfortranarray(g)):
        made = variables(shapes=[(4, 5)])
        fastadam.keras.Adam(0.5).apply([other], made)
        assert np.array_equal(array(made[0]), array(expected[0]))
    transposed = keras.ops.transpose(keras.ops.convert_to_tensor(np.ascontiguousarray(g.T)))
    fastadam.keras.Adam(0.5).apply([transposed], found)
    assert np.array_equal(array(found[0]), array(expected[0]))


def test_a_gradient_that_is_its_variable():
    made, expected = variables(), variables()
    fastadam.keras.Adam(0.5).apply([v.value for v in made], made)
    fastadam.keras.Adam(0.5).apply([keras.ops.copy(v.value) for v in expected], expected)
    assert all(np.array_equal(array(a), array(b)) for a, b in zip(made, expected, strict=True))


def test_a_stateless_step_changes_nothing_but_what_it_returns():
    """Keras's own weight decay on torch does not keep to that, hence Adam."""
    optimizer, made = fastadam.keras.Adam(0.0078125, amsgrad=True), variables()
    optimizer.apply(gradients(0), made)
    held = [*made, *optimizer.variables]
    before, given = list(map(array, held)), [keras.ops.copy(v.value) for v in held]
    kept = list(map(array, given))
    count = len(made)
    found = optimizer.stateless_apply(given[count:], gradients(1), given[:count])
    for now, then in zip([*held, *given], [*before, *kept], strict=True):
        assert np.array_equal(array(now), then)
    optimizer.apply(gradients(1), made)
    for a, b in zip([*found[0], *found[1]], held, strict=True):
        assert np.array_equal(array(a), array(b))


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_an_update_step_of_a_subclass_is_called_for_each_variable(kind):
    made = []
    for module in (fastadam.keras, keras.optimizers):

        class Rates(getattr(module, kind)):
            def update_step(self, gradient, variable, learning_rate):
                super().update_step(gradient, variable, learning_rate * FACTORS[variable.name])

        made.append(trained(Rates(0.0078125, weight_decay=0.125, **EXACT)))
    assert_near(*made)
    plain = trained(getattr(fastadam.keras, kind)(0.0078125, weight_decay=0.125, **EXACT))
    same = [np.array_equal(array(a), array(b)) for a, b in zip(made[0], plain, strict=True)]
    assert same == [False, True, False, True, False]  # w3 is empty


@pytest.mark.parametrize("method", ["assign_add", "assign_sub"])
def test_an_override_that_no_step_would_call_is_refused(method):
    kind = type("Tracked", (fastadam.keras.AdamW,), {method: lambda self, variable, value: None})
    with pytest.raises(TypeError, match=f"{method}: overridden by Tracked, expected an override of assign"):
        kind()


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_an_assign_of_a_subclass_stores_every_new_value(kind):
    written = []

    class Recorded(getattr(fastadam.keras, kind)):
        def assign(self, variable, value):
            written.append(variable.path)
            super().assign(variable, value)

    class Frozen(getattr(fastadam.keras, kind)):
        def assign(self, variable, value):
            """Stores nothing."""

    optimizer = Recorded(0.0078125, amsgrad=True)
    found = trained(optimizer, steps=2)
    expected = trained(getattr(fastadam.keras, kind)(0.0078125, amsgrad=True), steps=2)
    assert all(np.array_equal(array(a), array(b)) for a, b in zip(found, expected, strict=True))
    slots = [*optimizer._momentums, *optimizer._velocities, *optimizer._velocity_hats]
    assert sorted(written) == sorted([v.path for v in (*found, *slots)] * 2)
    frozen = Frozen(0.0078125, weight_decay=None if kind == "Adam" else 0.0)
    assert all(np.array_equal(array(a), b) for a, b in zip(trained(frozen), values(), strict=True))
    assert not any(array(m).any() for m in frozen._momentums)


@pytest.mark.parametrize("text", ["x", b"x"])
def test_a_text_as_gradient_is_refused_by_its_place(text):
    variables = [keras.Variable(np.ones(3, F32)) for _ in range(2)]
    optimizer = fastadam.keras.Adam(0.1)
    optimizer.build(variables)
    with pytest.raises(TypeError, match=r"grads\[1\]: b?'x', expected a tensor"):
        optimizer.apply([keras.ops.ones(3), text], variables)
    assert int(array(optimizer.iterations)) == 0


def test_what_is_no_variable_is_refused_by_its_place():
    optimizer, variable = fastadam.keras.Adam(), keras.Variable(np.ones(3, F32))
    with pytest.raises(TypeError, match="var_list: int, expected a list of variables"):
        optimizer.build(3)
    with pytest.raises(TypeError, match=r"var_list\[1\]: ndarray, expected a keras.Variable"):
        optimizer.build([variable, np.ones(3, F32)])
    optimizer.build([variable])
    with pytest.raises(TypeError, match="grads: int, expected a list"):
        optimizer.apply(3)
    with pytest.raises(TypeError, match=r"trainable_variables\[0\]: str, expected a keras.Variable"):
        optimizer.apply([np.ones(3, F32)], ["x"])
    assert array(variable.value).tolist() == [1, 1, 1]
