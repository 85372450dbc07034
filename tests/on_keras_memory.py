"""What fastadam.keras refuses, and which memory its steps write: test_keras_adam.py runs this file on each backend."""

from __future__ import annotations

import sys

import fastadam.keras
import keras
import numpy as np
import pytest
from on_keras_steps import BACKEND, F32, STEPS, array, gradients, only, trained, values, variables

# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(optimizer, made, given, error, match):
    """The call raises, and nothing has changed: not even weight decay, which comes first."""
    held = [*made, *optimizer.variables]
    before = list(map(array, held))
    with pytest.raises(error, match=match):
        optimizer.apply(given, made)
    assert all(np.array_equal(array(now), then, equal_nan=True) for now, then in zip(held, before, strict=True))


def test_wrong_gradients_are_refused_before_anything_changes():
    optimizer, made = fastadam.keras.AdamW(0.5, weight_decay=0.5), variables()
    optimizer.build(made)
    wrong = gradients(0)
    wrong[2] = wrong[0]
    refused(optimizer, made, wrong, ValueError, r"grads\[2\]: shape \(3,\), expected \(4, 5\) like variable '")
    refused(optimizer, made, wrong[:2], ValueError, "grads: 2 gradients, expected 5, one for each variable")
    wrong = gradients(0)
    wrong[1] = keras.ops.cast(wrong[1], "complex64")
    refused(optimizer, made, wrong, TypeError, r"grads\[1\]: .*complex64, expected float32 like variable '")


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("beta_1", 1.0, ValueError, "beta_1: 1.0, expected 0 <= beta_1 < 1"),
        ("beta_2", -0.5, ValueError, "beta_2: -0.5, expected 0 <= beta_2 < 1"),
        ("epsilon", -1.0, ValueError, "Expected epsilon >= 0, received: -1.0"),
        ("epsilon", None, TypeError, "epsilon: None, expected a number"),
    ],
)
def test_numbers_out_of_range_are_refused(name, value, error, match):
    with pytest.raises(error, match=match):
        fastadam.keras.Adam(0.5, **{name: value})
    optimizer, made = fastadam.keras.AdamW(0.5, weight_decay=0.5), variables()
    optimizer.build(made)
    setattr(optimizer, name, value)
    refused(optimizer, made, gradients(0), error, match)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("epsilon", 0.0, "epsilon: so small that it is flushed to zero in float32, expected at least 1.2e-38"),
        ("epsilon", 1e-40, "epsilon: so small that it is flushed to zero in float32, expected at least 1.2e-38"),
        ("beta_1", 1 - 1e-10, "beta_1: 1.0* is 1 in float32, expected less"),
        ("learning_rate", float("nan"), "learning_rate: nan, expected a finite number"),
    ],
)
def test_numbers_that_float32_cannot_hold_are_refused_before_weight_decay(name, value, match):
    optimizer, made = fastadam.keras.AdamW(0.5, weight_decay=0.5), variables()
    optimizer.apply(gradients(0), made)
    setattr(optimizer, name, value)
    refused(optimizer, made, gradients(0), ValueError, match)
    with pytest.raises(ValueError, match="epsilon: so small that it is flushed to zero in float64"):
        fastadam.keras.Adam(0.5, epsilon=0.0)
    with pytest.raises(ValueError, match="epsilon: so small that it is flushed to zero in float32"):
        fastadam.keras.Adam(0.5, epsilon=1e-40).build(made)


def test_a_variable_that_is_given_twice_is_refused():
    optimizer, made = fastadam.keras.Adam(0.5), variables()
    optimizer.build(made)
    twice = [made[0], made[1], made[0]]
    with pytest.raises(ValueError, match=r"trainable_variables\[2\]: '.*' is given twice, expected each once"):
        optimizer.apply([gradients(0)[i] for i in (0, 1, 0)], twice)


def test_options_that_keras_refuses_are_refused():
    with pytest.raises(TypeError, match="Unexpected keyword argument passed to optimizer: momentum; "):
        fastadam.keras.Adam(0.5, momentum=0.5)
    for options in ({"clipnorm": 1.0, "clipvalue": 1.0}, {"gradient_accumulation_steps": 1}):
        with pytest.raises(ValueError, match=r"Only one of|must be an integer >= 2"):
            fastadam.keras.Adam(0.5, **options)
    with pytest.raises(ValueError, match="`weight_decay` must be a float"):
        fastadam.keras.AdamW(0.5, weight_decay=None)


def test_variables_that_have_no_kernel_are_refused():
    w = keras.Variable(np.arange(3), dtype="int32", trainable=False)
    with pytest.raises(TypeError, match="variable '.*': dtype int32, expected one of"):
        fastadam.keras.Adam(0.5).build([w])


# ---- memory ----------------------------------------------------------------------------------------------------------


@only("numpy", "torch")  # arrays of JAX are immutable
def test_variables_and_moments_are_updated_in_place_by_one_plan(monkeypatch):
    plans, calls = [], []
    module = sys.modules["fastadam.keras._plans"]
    plan = module.KerasPlan
    step = plan.step
    monkeypatch.setattr(module, "KerasPlan", lambda *args, **keys: plans.append(plan(*args, **keys)) or plans[-1])
    monkeypatch.setattr(plan, "step", lambda *args: calls.append(1) or step(*args))
    optimizer, made = fastadam.keras.Adam(0.5), variables()
    optimizer.build(made)
    held = [*made, *optimizer._momentums, *optimizer._velocities]
    arrays = [v.value for v in held]
    trained(optimizer, made=made)
    assert all(v.value is before for v, before in zip(held, arrays, strict=True))
    assert (len(plans), len(calls)) == (1, STEPS)
    optimizer.apply(gradients(0)[:2], made[:2])
    assert (len(plans), len(calls)) == (2, STEPS + 1)


@only("numpy", "torch")  # arrays of JAX are immutable
def test_values_that_are_given_other_memory_are_found_again():
    made, expected = variables(), variables()
    mine, other = fastadam.keras.Adam(0.5), fastadam.keras.Adam(0.5)
    trained(mine, made=made)
    for v in made:
        if BACKEND == "torch":
            v.value.data = v.value.data.clone()
        else:
            v.assign(v.value.copy())
    trained(mine, made=made, first=6)
    trained(other, made=expected, steps=12)
    assert all(np.array_equal(array(a), array(b)) for a, b in zip(made, expected, strict=True))


@only("torch")
def test_autograd_learns_of_the_update():
    import torch

    optimizer, made = fastadam.keras.Adam(0.5), variables()
    optimizer.build(made)
    square = (made[2].value ** 2).sum()
    for _ in range(2):  # with a new plan, and with one that was kept
        before = made[2].value._version
        with torch.no_grad():
            optimizer.apply(gradients(0), made)
        assert made[2].value._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@only("torch")
def test_tensors_of_any_strides_are_updated():
    import torch

    values = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    layouts = [
        values.clone(memory_format=torch.channels_last),
        values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.zeros(2, 3, 4, 8)[..., ::2].copy_(values),
    ]
    expected = keras.Variable(values.numpy())
    g = keras.ops.convert_to_tensor(np.linspace(-1, 1, 96, dtype=F32).reshape(2, 3, 4, 4))
    reference = fastadam.keras.Adam(0.5)
    made = [keras.Variable(torch.nn.Parameter(x)) for x in layouts]
    optimizer = fastadam.keras.Adam(0.5)
    for _ in range(3):
        reference.apply([g], [expected])
        optimizer.apply([g] * 3, made)
    for v, x in zip(made, layouts, strict=True):
        assert v.value.stride() == x.stride()
        assert v.value.data_ptr() == x.data_ptr()
        assert np.array_equal(array(v), array(expected))


@only("torch")
def test_sparse_gradients_move_every_row():
    import torch

    g = torch.sparse_coo_tensor([[1, 3, 1]], torch.ones(3, 5), (4, 5), check_invariants=True)
    made, expected = variables(shapes=[(4, 5)]), variables(shapes=[(4, 5)])
    mine, other = fastadam.keras.Adam(0.5), fastadam.keras.Adam(0.5)
    for _ in range(2):
        mine.apply([g], made)
        other.apply([g.to_dense()], expected)
    assert np.array_equal(array(made[0]), array(expected[0]))


@only("torch")
def test_compiled_code_calls_the_step_as_it_is():
    import torch

    optimizer, made, expected = fastadam.keras.Adam(0.5), variables(), variables()
    optimizer.build(made)

    @torch.compile(backend="eager")
    def double_step(given):
        with torch.no_grad():
            optimizer.apply([2 * g for g in given])

    for step in range(2):
        double_step(gradients(step))
    other = fastadam.keras.Adam(0.5)
    for step in range(2):
        other.apply([2 * g for g in gradients(step)], expected)
    assert all(np.array_equal(array(a), array(b)) for a, b in zip(made, expected, strict=True))


@only("numpy")
def test_arrays_that_cannot_be_written_are_replaced():
    made, expected = variables(), variables()
    made[2].assign(np.asfortranarray(values()[2]))
    made[0].value.flags.writeable = False
    mine, other = fastadam.keras.Adam(0.5), fastadam.keras.Adam(0.5)
    frozen = made[0].value
    trained(mine, made=made)
    trained(other, made=expected)
    assert np.array_equal(frozen, values()[0])
    assert all(np.array_equal(array(a), array(b)) for a, b in zip(made, expected, strict=True))
