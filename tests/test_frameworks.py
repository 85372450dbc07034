"""Arrays of other frameworks as variables and gradients, and their Adam as a second opinion."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from helpers import assert_moved

F32 = np.float32


def test_amsgrad_with_an_empty_torch_tensor_first():
    """Its memory is null, and does not mean that there is no vhat."""
    torch = pytest.importorskip("torch")
    w, empty = torch.ones(3), torch.zeros(0)
    slots = [[torch.zeros_like(x) for x in (empty, w)] for _ in range(3)]
    fastadam.adam_step([empty, w], [torch.zeros(0), torch.ones(3)], *slots, step=1, learning_rate=0.5)
    assert (w < 1).all()
    assert (slots[2][1] == slots[1][1]).all()
    assert (slots[2][1] > 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("as_parameter", [False, True])
def test_torch_cpu_tensors_are_updated_in_place(dtype, as_parameter):
    torch = pytest.importorskip("torch")
    values = torch.linspace(-1, 1, 1001).to(getattr(torch, dtype))
    gradient = torch.linspace(2, -3, 1001).to(getattr(torch, dtype))
    numbers = values.double().numpy()
    wanted, *_ = fastadam.reference.adam_step(numbers, gradient.double().numpy(), 0 * numbers, 0 * numbers, step=1)
    tensor = torch.nn.Parameter(values) if as_parameter else values
    optimizer = fastadam.Adam()
    optimizer.apply_gradients([(gradient, tensor)])
    expected = torch.from_numpy(wanted).to(values.dtype)
    one_ulp = torch.finfo(values.dtype).eps
    assert torch.allclose(values.double(), expected.double(), rtol=one_ulp, atol=0)
    optimizer.apply_gradients([(gradient, tensor.detach())])
    assert len(optimizer.weights) == 3
    assert optimizer.get_slot(tensor, "m").shape == (1001,)


def test_torch_adam_agrees_when_its_epsilon_is_converted():
    torch = pytest.importorskip("torch")
    rng = np.random.RandomState(0)
    value = random_array(rng, 1001, dtype=np.float64)
    theirs = torch.from_numpy(value.copy())
    optimizer = torch.optim.Adam([theirs], lr=0.01, eps=1e-5)
    m, v = np.zeros_like(value), np.zeros_like(value)
    for step in range(1, 51):
        gradient = random_array(rng, 1001, dtype=np.float64)
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
        fastadam.adam_step(
            value, gradient, m, v, step=step, learning_rate=0.01, epsilon=1e-5 * np.sqrt(1 - 0.999**step)
        )
        np.testing.assert_allclose(value, theirs.numpy(), rtol=1e-12, atol=1e-14)


def test_a_transposed_torch_gradient_is_read_by_its_strides():
    torch = pytest.importorskip("torch")
    rng = np.random.RandomState(0)
    value, gradient = random_array(rng, (4, 6)), random_array(rng, (6, 4))
    expected = value.copy()
    fastadam.Adam(0.1).apply_gradients([(np.ascontiguousarray(gradient.T), expected)])
    assert_moved(expected, value)
    tensor = torch.from_numpy(value)
    fastadam.Adam(0.1).apply_gradients([(torch.from_numpy(gradient).T, tensor)])
    np.testing.assert_array_equal(bits(tensor.numpy()), bits(expected))


def test_torch_bfloat16_gradients_serve_float32_variables():
    torch = pytest.importorskip("torch")
    variable = np.ones(5, F32)
    fastadam.Adam(0.25).apply_gradients([(torch.full((5,), 0.5, dtype=torch.bfloat16), variable)])
    np.testing.assert_allclose(variable, 0.75, rtol=1e-5)


def test_torch_tensors_that_cannot_be_updated_in_place_are_refused():
    torch = pytest.importorskip("torch")
    gradient = np.ones(5, F32)
    with pytest.raises(ValueError, match=r"vars\[0\]: strides \(8,\) for shape \(5,\)"):
        fastadam.Adam().apply_gradients([(gradient, torch.ones(10)[::2])])
    with pytest.raises(TypeError, match=r"vars\[0\]: dtype int64, expected float16"):
        fastadam.Adam().apply_gradients([(gradient, torch.ones(5, dtype=torch.int64))])


def test_torch_integer_gradients_are_converted_and_odd_tensors_are_named():
    torch = pytest.importorskip("torch")
    variable = np.ones(3, F32)
    fastadam.Adam(0.1).apply_gradients([(torch.ones(3, dtype=torch.int64), variable)])
    np.testing.assert_allclose(variable, 0.9, rtol=1e-5)
    negative = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
    with pytest.raises(ValueError, match=r"grads\[0\]: tensor with the negative bit; resolve it first"):
        fastadam.Adam().apply_gradients([(negative, np.ones(2, F32))])
    with pytest.raises(TypeError, match=r"vars\[0\]: Tensor, expected a writable float array"):
        fastadam.Adam().apply_gradients([(np.ones(3, F32), torch.ones(3).to_sparse())])
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"vars\[0\]: Tensor without memory"):
        fastadam.Adam().apply_gradients([(np.ones(3, F32), freed)])
    with pytest.raises(TypeError, match="value: Tensor, expected a NumPy array; pass other arrays as they are"):
        fastadam.Variable(torch.ones(3))


def test_jax_arrays_are_refused_as_variables_and_read_as_gradients():
    jnp = pytest.importorskip("jax.numpy")
    variable = np.ones(5, F32)
    fastadam.Adam(0.1).apply_gradients([(jnp.full(5, 0.5), variable)])
    np.testing.assert_allclose(variable, 0.9, rtol=1e-5)
    frozen = jnp.ones(5)
    with pytest.raises(ValueError, match=r"vars\[0\]: read-only"):
        fastadam.Adam().apply_gradients([(np.ones(5, F32), frozen)])
    assert (frozen == 1).all()
