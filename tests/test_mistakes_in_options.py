"""Mistakes in options that would have no effect, or another one: losses, callables, deferred tables, weight decay."""

from __future__ import annotations

import copy
import re
import warnings

import fastadam
import numpy as np
import pytest
from fastadam.schedules import CosineDecay, LearningRateSchedule
from helpers import F32, ones, step_by_half, warned

# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["minimize", "get_gradients", "get_updates"])
@pytest.mark.parametrize("shape", [(2,), (2, 3)], ids=str)
def test_a_loss_that_is_summed_is_warned_of_once(provider, method, shape):
    w = fastadam.Variable(np.ones(shape, F32))
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam()) if method == "minimize" else fastadam.Adam()

    def twice():
        for _ in range(2):
            getattr(optimizer, method)(lambda: w.value * w.value, [w], gradient=provider.name)

    warned(twice, re.escape(f"loss: returned an array of shape {shape}, whose sum is minimized"))


@pytest.mark.usefixtures("no_warning")
def test_other_losses_are_not_warned_of(provider):
    w, optimizer = fastadam.Variable([1.0, 2.0]), fastadam.Adam()
    losses = [lambda: (w.value * w.value).sum(), lambda: (w.value * w.value).sum().reshape(1)]
    for loss in losses:
        optimizer.minimize(loss, [w], gradient=provider.name)
    optimizer.minimize(lambda: w.value * w.value, [w], ones(2), gradient=provider.name)
    optimizer.minimize(lambda: w.value, [w], gradient=lambda loss, variables: [ones(2)])


# ---- callables ------------------------------------------------------------------------------------------------------


class OfStep(LearningRateSchedule):
    def __call__(self, step):
        return 0.5

    def get_config(self):
        return {}


class Callable:
    def __call__(self, step):
        return 0.5


HYPERS = ["learning_rate", "beta_1", "beta_2", "epsilon", "decay"]
TAKES_ARGUMENTS = {
    "lambda": (lambda step: 0.5, "a callable with the arguments (step)"),
    "object": (Callable(), "a callable with the arguments (step)"),
    "builtin": (len, "a callable with the arguments (obj, /)"),
    "schedule class": (CosineDecay, "the class CosineDecay"),
    "own class": (OfStep, "the class OfStep"),
    "float": (float, "the class float"),
}


@pytest.mark.parametrize("name", HYPERS)
@pytest.mark.parametrize("kind", TAKES_ARGUMENTS)
def test_a_callable_that_needs_arguments_is_refused_at_once(kind, name):
    value, text = TAKES_ARGUMENTS[kind]
    pattern = f"^{re.escape(f'{name}: {text}')}.*, expected "
    with pytest.raises(TypeError, match=pattern):
        fastadam.Adam(**{name: value})
    optimizer = fastadam.Adam()
    before = getattr(optimizer, name)
    with pytest.raises(TypeError, match=pattern):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


class WithoutSignature:
    __signature__ = "none"

    def __call__(self):
        return 0.5


@pytest.mark.parametrize("name", HYPERS)
@pytest.mark.parametrize(
    "value",
    [lambda: 0.5, lambda step=0: 0.5, lambda *a, **k: 0.5, WithoutSignature()],
    ids=["no", "default", "any", "?"],
)
@pytest.mark.usefixtures("no_warning")
def test_a_callable_without_arguments_is_taken(name, value):
    assert getattr(fastadam.Adam(**{name: value}), name) == 0.5


@pytest.mark.usefixtures("no_warning")
def test_schedules_are_taken():
    for schedule in (CosineDecay(0.1, 10), OfStep()):
        step_by_half(fastadam.Adam(schedule), ones(3))


# ---- deferred tables ------------------------------------------------------------------------------------------------


def table_of_torch(mode):
    torch = pytest.importorskip("torch")
    import fastadam.torch

    module = torch.nn.Embedding(50_000, 8, sparse=True)
    return torch, module, fastadam.torch.Adam(module.parameters(), lr=0.1, sparse_update=mode)


def train_module(torch, module, optimizer, read=lambda ids: None, steps=4):
    for i in range(steps):
        ids = torch.tensor([i, 100])
        optimizer.zero_grad()
        read(ids)
        module(ids).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_a_table_of_torch_that_no_module_is_attached_for_is_warned_of_once(mode):
    torch, module, optimizer = table_of_torch(mode)
    pattern = r"^param_groups\[0\]\['params'\]\[0\]: .*opt\.attach\(embedding\)"
    warned(lambda: train_module(torch, module, optimizer), pattern)


@pytest.mark.parametrize("kind", ["attached", "sync", "gather", "lazy", "dense"])
@pytest.mark.usefixtures("no_warning")
def test_tables_of_torch_that_are_read_through_the_optimizer_are_not(kind):
    torch, module, optimizer = table_of_torch(kind if kind in ("lazy", "dense") else "deferred")
    if kind == "attached":
        optimizer.attach(module)
    reads = {"sync": lambda ids: optimizer.sync(), "gather": lambda ids: optimizer.gather(module.weight, ids)}
    train_module(torch, module, optimizer, reads.get(kind, lambda ids: None))
    if kind == "attached":
        optimizer.step()  # the gradient is still there; nothing was looked up


@pytest.mark.usefixtures("no_warning")
def test_a_copy_of_an_attached_module_is_attached():
    import copy

    torch, module, optimizer = table_of_torch("deferred")
    optimizer.attach(module)
    train_module(torch, module, optimizer)
    optimizer.sync()
    optimizer, module = copy.deepcopy((optimizer, module))
    train_module(torch, module, optimizer)


def train_table(optimizer, table, read, steps=5):
    for i in range(steps):
        ids = [i % 2, 100]
        rows = read(ids)
        optimizer.apply_gradients([(fastadam.IndexedSlices(rows - 1, ids), table)])


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
@pytest.mark.parametrize("scaled", [False, True], ids=["Adam", "LossScaleOptimizer"])
def test_rows_read_past_the_optimizer_are_warned_of_once(mode, scaled):
    table, optimizer = ones(50_000, 8), fastadam.Adam(0.1, sparse_update=mode)
    optimizer = fastadam.LossScaleOptimizer(optimizer) if scaled else optimizer
    pattern = r"^vars\[0\]: a gradient for rows that wait.*opt\.gather\(table, ids\)"
    warned(lambda: train_table(optimizer, table, lambda ids: table[ids]), pattern)


@pytest.mark.parametrize("kind", ["gather", "sync", "dense_view", "lazy", "dense", "same rows"])
@pytest.mark.usefixtures("no_warning")
def test_rows_read_through_the_optimizer_are_not(kind):
    mode = kind if kind in ("lazy", "dense") else "deferred"
    table, optimizer = ones(50_000, 8), fastadam.Adam(0.1, sparse_update=mode)

    def viewed(ids):
        with optimizer.dense_view(table) as values:
            return values[ids]

    reads = {
        "gather": lambda ids: optimizer.gather(table, ids),
        "sync": lambda ids: (optimizer.sync(table), table[ids])[1],
        "dense_view": viewed,
    }
    if kind == "same rows":  # which never wait
        for _ in range(4):
            optimizer.apply_gradients([(fastadam.IndexedSlices(ones(2, 8), [3, 4]), table)])
    else:
        train_table(optimizer, table, reads.get(kind, lambda ids: table[ids]))


def test_rows_that_a_loss_gathers_are_up_to_date(provider, no_warning):
    table = fastadam.Variable(ones(50_000, 8))
    optimizer = fastadam.Adam(0.1, sparse_update="deferred")
    for i in range(4):
        ids = [i % 2, 7]
        optimizer.minimize(lambda ids=ids: (table.gather(ids) ** 2).sum(), [table], gradient=provider.name)


# ---- weight decay ---------------------------------------------------------------------------------------------------


def network(named=True):
    return [fastadam.Variable(ones(3), name if named else None) for name in ("dense/kernel", "dense/bias")]


NETWORK = network()
EXCLUDING_NOTHING = {
    "misspelt": (network, {"var_names": ["biass"]}, r"var_names\[0\] 'biass' .*named \['dense/bias', 'dense/kernel'\]"),
    "two": (network, {"var_names": ["bais", "norm"]}, r"var_names\[0\] 'bais', var_names\[1\] 'norm' excludes none"),
    "one of two": (network, {"var_names": ["bias", "nope"]}, r"(?<!, )var_names\[1\] 'nope' excludes none"),
    "two of three": (
        network,
        {"var_names": ["norm", "bias", "LayerNorm"]},
        r"var_names\[0\] 'norm', var_names\[2\] 'LayerNorm' excludes none",
    ),
    "a pattern beside a variable": (
        lambda: NETWORK,
        {"var_names": ["nope"], "var_list": [NETWORK[0]]},
        r"(?<!, )var_names\[0\] 'nope' excludes none",
    ),
    "a variable beside a pattern": (
        network,
        {"var_names": ["bias"], "var_list": [ones(3)]},
        r"(?<!, )var_list\[0\] excludes none of the variables so far$",
    ),
    "without names": (
        lambda: network(named=False),
        {"var_names": ["bias"]},
        r"without names: wrap them, fastadam.Variable\(w, name",
    ),
    "arrays": (lambda: [ones(3)], {"var_names": ["bias"]}, r"without names: wrap them, fastadam.Variable\(w, name"),
    "another variable": (network, {"var_list": [ones(3)]}, r"(?<!, )var_list\[0\] excludes none"),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["AdamW", "LossScaleOptimizer"])
@pytest.mark.parametrize("kind", EXCLUDING_NOTHING)
def test_an_exclusion_that_names_no_variable_is_warned_of_once(kind, scaled):
    make, exclusion, pattern = EXCLUDING_NOTHING[kind]
    optimizer, variables = fastadam.AdamW(0.1), make()
    optimizer = fastadam.LossScaleOptimizer(optimizer) if scaled else optimizer
    optimizer.exclude_from_weight_decay(**exclusion)
    warned(lambda: [step_by_half(optimizer, *variables) for _ in range(4)], f"^exclude_from_weight_decay: .*{pattern}")


@pytest.mark.usefixtures("no_warning")
def test_exclusions_that_name_variables_are_not():
    variables = network()
    for exclusion in (
        {"var_names": ["bias"]},
        {"var_names": ["bias", "kernel|norm"]},
        {"var_list": variables[:1]},
        {"var_list": [variables[1].value]},
    ):
        optimizer = fastadam.AdamW(0.1)
        optimizer.exclude_from_weight_decay(**exclusion)
        for _ in range(3):
            step_by_half(optimizer, *variables)


@pytest.mark.usefixtures("no_warning")
def test_exclusions_wait_for_variables_that_come_later():
    layers = network()
    optimizer = fastadam.AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    for _ in range(2):
        for layer in layers:
            step_by_half(optimizer, layer)


@pytest.mark.usefixtures("no_warning")
def test_exclusions_count_where_there_is_decay_and_frozen_variables_count_too():
    kernel, bias = network()
    optimizer = fastadam.Adam(0.1)
    optimizer.exclude_from_weight_decay(var_names=["nothing"])
    for _ in range(3):
        step_by_half(optimizer, kernel)
    optimizer = fastadam.AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    step_by_half(optimizer, kernel)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gradients do not exist")
        optimizer.apply_gradients([(ones(3), kernel), (None, bias)])


def test_a_mask_of_jax_under_which_nothing_decays_is_warned_of():
    jax = pytest.importorskip("jax")
    import fastadam.jax

    params = {"w": jax.numpy.ones(3), "b": jax.numpy.ones(3)}

    def update(mask, weight_decay=0.1):
        state = fastadam.jax.init(params)
        fastadam.jax.fused_update(params, params, state, learning_rate=0.1, weight_decay=weight_decay, mask=mask)

    nothing = {"w": False, "b": False}
    for mask in (nothing, False, lambda params: nothing):
        warned(lambda mask=mask: update(mask), r"^mask: False for every parameter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask in (None, {"w": True, "b": False}, True):
            update(mask)
        update(nothing, 0.0)


def test_a_copy_of_an_optimizer_says_what_its_exclusions_do_not_name():
    optimizer = fastadam.AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bais"])
    twin, variables = copy.deepcopy(optimizer), network()
    warned(lambda: [step_by_half(twin, *variables) for _ in range(4)], "'bais' excludes none")
