"""The optimizer of another framework than the variables': every optimizer names the one that is meant."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from absent import stand_in

F32 = np.float32
TORCH = r"for parameters of PyTorch use fastadam\.torch\.Adam\(model\.parameters\(\), lr=\.\.\.\)"
JAX = r"for JAX arrays use fastadam\.jax"
KERAS = r"for Keras 3 models use model\.compile\(optimizer=fastadam\.keras\.Adam\(\.\.\.\)\)"
TENSORFLOW = r"TensorFlow's variables cannot be updated in place: use tf\.keras\.optimizers\.Adam"
ARRAYS = r"variables go to apply_gradients\(\[\(gradient, variable\), \.\.\.\]\)"


OF_KERAS = stand_in("keras.src.backend", "Variable", shape=(3,), assign=None)
OF_TENSORFLOW = stand_in("tensorflow.python.ops.resource_variable_ops", "ResourceVariable", shape=(3,), assign=None)


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        lambda parameters: {"w": parameters[0]}.values(),
        lambda parameters: {"params": parameters},
        lambda parameters: [{"params": parameters}],
    ],
)
@pytest.mark.parametrize(
    ("variable", "hint"),
    [(OF_KERAS, KERAS), (OF_TENSORFLOW, TENSORFLOW), (np.ones(3), ARRAYS), (fastadam.Variable([1.0]), ARRAYS)],
)
def test_variables_in_the_place_of_the_rate_name_where_they_go(form, variable, hint):
    for options in ({}, {"lr": 0.1}):
        with pytest.raises(
            TypeError, match=f"^learning_rate: (list|tuple|dict|dict_values), expected a number .*; {hint}"
        ):
            fastadam.Adam(form([variable]), **options)


@pytest.mark.parametrize("kind", [fastadam.Adam, fastadam.AdamW])
def test_parameters_of_torch_in_the_place_of_the_rate(kind):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    given = [model.parameters(), model.named_parameters(), list(model.parameters()), (p for p in [1]), iter([1])]
    given += [[{"params": model.parameters(), "lr": 0.1}][0]["params"], {"w": model.weight}, model.weight, model]
    for parameters in given:
        for options in ({}, {"lr": 0.1}):
            with pytest.raises(TypeError, match=f"^learning_rate: .*{TORCH}"):
                kind(parameters, **options)
    optimizer = kind(0.5)
    with pytest.raises(TypeError, match=TORCH):
        optimizer.learning_rate = model.parameters()
    assert optimizer.learning_rate == 0.5
    optimizer.learning_rate = model.parameters  # a function without arguments, until it is asked
    with pytest.raises(TypeError, match=TORCH):
        optimizer.apply_gradients([(np.ones(3, F32), np.ones(3, F32))])


def test_single_numbers_of_any_framework_are_rates():
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    for rate in (torch.tensor(0.5), jnp.float32(0.5), np.array(0.5), F32(0.5)):
        assert fastadam.Adam(rate).learning_rate == 0.5


def test_variables_that_fastadam_cannot_update_name_what_does():
    jnp = pytest.importorskip("jax.numpy")
    g = np.ones(3, F32)
    for variable, hint in ((jnp.ones(3), JAX), (OF_KERAS, KERAS), (OF_TENSORFLOW, TENSORFLOW)):
        good, optimizer = np.ones(3, F32), fastadam.Adam(0.5)
        with pytest.raises((TypeError, ValueError), match=rf"^vars\[1\]: .*; {hint}"):
            optimizer.apply_gradients([(g, good), (g, variable)])
        assert (good == 1).all()
        assert optimizer.iterations == 0
        with pytest.raises((TypeError, ValueError), match=f"; {hint}"):
            fastadam.adam_step(variable, g, g.copy(), g.copy(), step=1)
        with pytest.raises(TypeError, match=rf"^value: \w+, expected a NumPy array; {hint}"):
            fastadam.Variable(variable)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_optimizer_of_torch_names_the_others(name):
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    kind = getattr(fastadam.torch, name)
    for rate in (1e-3, F32(1e-3), 1, None):
        with pytest.raises(TypeError, match=r"^params: .*, expected parameters of PyTorch, .* is fastadam\.Adam$"):
            kind(rate)
    numpy = r"for NumPy arrays use fastadam\.Adam"
    for variable, hint in (
        (np.ones(3), numpy), (fastadam.Variable([1.0]), numpy), (jnp.ones(3), JAX), (OF_KERAS, KERAS), (OF_TENSORFLOW, TENSORFLOW),
    ):  # fmt: skip
        for form in (list, iter, tuple, lambda items: {"w": items[0]}, lambda items: [{"lr": 0.1, "params": items}]):
            with pytest.raises(TypeError, match=f"^params: {type(variable).__name__}, expected parameters .*; {hint}"):
                kind(form([variable]))
    with pytest.raises(TypeError, match="^params: ndarray, expected parameters of PyTorch"):
        kind(np.ones(3))
    for single in (torch.ones(()), torch.ones(3)):  # torch's own text
        with pytest.raises(TypeError, match="^params argument given to the optimizer should be an iterable"):
            kind(single)
    model = torch.nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"^params: Linear, expected its parameters: model\.parameters\(\)"):
        kind(model)
    for parameters in (model.parameters(), iter(list(model.named_parameters())), [{"params": model.parameters()}]):
        assert sum(len(group["params"]) for group in kind(parameters).param_groups) == 2


def test_jax_has_functions_and_says_so():
    pytest.importorskip("optax")
    for name in ("Adam", "AdamW"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; it has the functions {name.lower()} .as in"):
            getattr(fastadam.jax, name)
    for function in (fastadam.jax.adam, fastadam.jax.adamw):
        with pytest.raises(TypeError, match=r"learning_rate: dict, expected .*; parameters go to init\(params\)"):
            function({"w": np.ones(3)})
