"""State from and to tf.keras lists and PyTorch dicts: made by the real thing, and nothing silently different."""

from __future__ import annotations

import re
import sys

import fastadam
import numpy as np
import pytest
from cases import GOLDEN, RESUME_CASES, bits, random_array
from fastadam import exchange
from helpers import listed

F32 = np.float32
SHAPES = ((3,), (2, 2), ())


def make(seed=0):
    rng = np.random.RandomState(seed)
    return [np.asarray(random_array(rng, shape), F32) for shape in SHAPES]


def trained(**options):
    optimizer, variables = fastadam.Adam(0.1, **options), make()
    for step in range(3):
        optimizer.apply_gradients(zip(make(step + 1), variables, strict=True))
    return optimizer, variables


@pytest.mark.parametrize("amsgrad", [False, True])
def test_keras_lists_round_trip_to_the_bit(amsgrad):
    optimizer, variables = trained(amsgrad=amsgrad)
    weights = exchange.to_keras_weights(optimizer, variables)
    for mine, other in zip(optimizer.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(mine, other)
    again, others = fastadam.Adam(0.1, amsgrad=amsgrad), [w.copy() for w in variables]
    exchange.from_keras_weights(again, weights, others)
    optimizer.apply_gradients(zip(make(9), variables, strict=True))
    again.apply_gradients(zip(make(9), others, strict=True))
    for a, b in zip(variables, others, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("by", ["set_weights", "from_keras_weights"])
@pytest.mark.parametrize("case", RESUME_CASES, ids=str)
def test_a_list_of_tensorflow_goes_on_with_its_bits(golden, case, by):
    weights, variables = listed(golden, case.name, "weights"), listed(golden, case.name, "variables")
    optimizer = fastadam.Adam(**case.options)
    if by == "set_weights":
        optimizer.build(variables)
        optimizer.set_weights(weights)
    else:
        exchange.from_keras_weights(optimizer, weights, variables)
    again = exchange.to_keras_weights(optimizer, variables)
    assert [np.asarray(a).dtype for a in again] == [w.dtype for w in weights]
    for a, b in zip(again, weights, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(a)), bits(b))
    for step in case.arrays()[1][case.steps // 2 :]:
        optimizer.apply_gradients(zip(step, variables, strict=True))
    for a, b in zip(variables, listed(golden, case.name, "after"), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("case", RESUME_CASES, ids=str)
def test_the_list_half_way_is_the_one_of_tensorflow(golden, case):
    variables, gradients = case.arrays()
    optimizer = fastadam.Adam(**case.options)
    for step in gradients[: case.steps // 2]:
        optimizer.apply_gradients(zip(step, variables, strict=True))
    found = exchange.to_keras_weights(optimizer, variables)
    for a, b in zip(found, listed(golden, case.name, "weights"), strict=True):
        np.testing.assert_array_equal(bits(np.asarray(a)), bits(b))


def test_averages_that_a_list_has_no_place_for_are_refused():
    optimizer, variables = trained(use_ema=True)
    with pytest.raises(ValueError, match="use_ema=True, expected False: the list of tf.keras legacy cannot hold"):
        exchange.to_keras_weights(optimizer, variables)


def test_what_cannot_be_assigned_changes_nothing():
    optimizer, variables = trained()
    before = optimizer.get_weights()
    count = len(variables)
    for name, at in (("m", 1), ("v", count + 1)):
        weights = [*before[:at], np.full(SHAPES[0], 1e300), *before[at + 1 :]]
        with pytest.raises(ValueError, match=re.escape(f"{name}[0]: numbers too large for float32")):
            exchange.from_keras_weights(optimizer, weights, variables)
    with pytest.raises(ValueError, match=re.escape("variables[1]: the same as variables[0]")):
        exchange.from_keras_weights(optimizer, before[:1] + [before[1]] * 4, [variables[0]] * 2)
    optimizer.get_slot(variables[2], "v").flags.writeable = False
    with pytest.raises(ValueError, match=re.escape("slot v of variables[2]: was made read-only")):
        exchange.from_keras_weights(optimizer, [9, *(a + 1 for a in before[1:])], variables)
    for a, b in zip(before, optimizer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_slots_may_be_exchanged_among_variables():
    optimizer, variables = fastadam.Adam(0.1), [np.zeros(2, F32), np.ones(2, F32)]
    optimizer.apply_gradients(zip([np.ones(2, F32), np.full(2, 2, F32)], variables, strict=True))
    live = optimizer.weights
    before = optimizer.get_weights()
    exchange.from_keras_weights(optimizer, [1, live[2], live[1], live[4], live[3]], variables)
    for a, b in zip(optimizer.get_weights()[1:], [before[i] for i in (2, 1, 4, 3)], strict=True):
        np.testing.assert_array_equal(a, b)


def test_keras_lists_of_another_model_change_nothing():
    optimizer, variables = trained()
    before = optimizer.get_weights()
    for weights in (before[:-1], [*before, before[-1]], [*before[:-1], np.ones(9, F32)], [-1, *before[1:]]):
        with pytest.raises(ValueError, match="weights|v\\[2\\]"):
            exchange.from_keras_weights(optimizer, weights, variables)
    for a, b in zip(before, optimizer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    exchange.from_keras_weights(optimizer, [*before, *[np.zeros(1, F32)] * 3], variables)
    assert optimizer.iterations == 3


def test_variables_that_overlap_are_refused_before_any_slot_is_made():
    optimizer, memory = fastadam.Adam(), np.zeros(10, F32)
    with pytest.raises(ValueError, match=re.escape("vars[1]: overlaps vars[0] in memory")):
        exchange.from_keras_weights(optimizer, [1, *[np.ones(6, F32)] * 4], [memory[:6], memory[4:]])
    assert len(optimizer.weights) == 1


def torch_trained(torch, **options):
    parameters = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in make()]
    optimizer = torch.optim.Adam(parameters, lr=0.05, betas=(0.8, 0.95), eps=1e-30, **options)
    for step in range(3):
        torch_step(torch, optimizer, parameters, step + 1)
    return optimizer, parameters


def torch_step(torch, optimizer, parameters, seed):
    for parameter, gradient in zip(parameters, make(seed), strict=True):
        parameter.grad = torch.from_numpy(gradient)
    optimizer.step()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_goes_on_from_pytorch_and_back(amsgrad):
    torch = pytest.importorskip("torch")
    theirs, parameters = torch_trained(torch, amsgrad=amsgrad)
    variables = [p.detach().numpy().copy() for p in parameters]
    optimizer = fastadam.Adam()
    exchange.from_torch_state_dict(optimizer, theirs.state_dict(), variables, epsilon=1e-30)
    assert (optimizer.learning_rate, optimizer.beta_1, optimizer.beta_2) == (0.05, 0.8, 0.95)
    assert (optimizer.amsgrad, optimizer.epsilon, optimizer.iterations) == (amsgrad, 1e-30, 3)
    for step in (4, 5):
        torch_step(torch, theirs, parameters, step)
        optimizer.apply_gradients(zip(make(step), variables, strict=True))
        for w, p in zip(variables, parameters, strict=True):
            np.testing.assert_allclose(w, p.detach().numpy(), rtol=1e-5, atol=1e-7)
    copies = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in variables]
    again = torch.optim.Adam(copies)
    again.load_state_dict(exchange.to_torch_state_dict(optimizer, variables, epsilon=1e-30))
    torch_step(torch, theirs, parameters, 6)
    torch_step(torch, again, copies, 6)
    for a, b in zip(parameters, copies, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_what_pytorch_means_otherwise_is_refused():
    torch = pytest.importorskip("torch")
    optimizer, variables = trained()
    before, config = optimizer.get_weights(), optimizer.get_config()
    good = torch_trained(torch)[0].state_dict()
    with pytest.raises(TypeError, match="epsilon"):
        exchange.from_torch_state_dict(optimizer, good, variables)
    with pytest.raises(ValueError, match="epsilon: 0, expected epsilon > 0"):
        exchange.from_torch_state_dict(optimizer, good, variables, epsilon=0)
    with pytest.raises(ValueError, match=re.escape("state_dict: 3 parameters with state, expected 2")):
        exchange.from_torch_state_dict(optimizer, good, variables[:2], epsilon=1e-8)
    absent = {**good, "state": {i: state for i, state in good["state"].items() if i != 1}}
    with pytest.raises(ValueError, match=re.escape("state_dict: parameters [1] have no state")):
        exchange.from_torch_state_dict(optimizer, absent, variables, epsilon=1e-8)
    for options in ({"weight_decay": 0.1}, {"maximize": True}):
        with pytest.raises(ValueError, match=f"state_dict: .*{next(iter(options))}"):
            exchange.from_torch_state_dict(
                optimizer, torch_trained(torch, **options)[0].state_dict(), variables, epsilon=1e-8
            )
    good["state"][1]["step"] += 1
    with pytest.raises(ValueError, match=re.escape("steps [3.0, 4.0]")):
        exchange.from_torch_state_dict(optimizer, good, variables, epsilon=1e-8)
    assert optimizer.get_config() == config
    for a, b in zip(before, optimizer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="expected no schedule, decay, clipping"):
        exchange.to_torch_state_dict(trained(clipvalue=1.0)[0], variables, epsilon=1e-8)


def test_a_wrapper_and_what_is_no_state_dict_are_named():
    wrapper, variables = fastadam.LossScaleOptimizer(fastadam.Adam()), make()
    with pytest.raises(TypeError, match="optimizer: LossScaleOptimizer, expected a fastadam.Adam"):
        exchange.to_keras_weights(wrapper, variables)
    with pytest.raises(TypeError, match="optimizer: LossScaleOptimizer, expected a fastadam.Adam"):
        exchange.from_keras_weights(wrapper, [1], variables)
    for nothing in ({}, None, wrapper):
        with pytest.raises(TypeError, match="state_dict: .*, expected a dict with 'state' and 'param_groups'"):
            exchange.from_torch_state_dict(fastadam.Adam(), nothing, variables, epsilon=1e-8)


EMPTY = {"state": {}, "param_groups": []}
NEEDED = {
    "to_optax_state": ("jax", lambda: exchange.to_optax_state(fastadam.Adam(), [])),
    "to_torch_state_dict": ("torch", lambda: exchange.to_torch_state_dict(fastadam.Adam(), [], epsilon=1e-8)),
    "from_bitsandbytes": ("torch", lambda: exchange.from_bitsandbytes(EMPTY)),
    "to_bitsandbytes": ("torch", lambda: exchange.to_bitsandbytes(EMPTY)),
    "from_torchao": ("torch", lambda: exchange.from_torchao(EMPTY)),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_package_that_is_not_installed_is_named_with_how_to_install_it(name, monkeypatch):
    package, call = NEEDED[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf" needs \w+: pip install {package}$"):
        call()
