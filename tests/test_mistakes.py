"""Ordinary mistakes that would train something else without a word: each fires, and what looks like it stays quiet.

Here those of what a step is given; test_mistakes_in_names.py has those of names, test_mistakes_in_options.py of options.
"""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from helpers import F32, ones, step_by_half, warned

# ---- variables that are replaced between steps ----------------------------------------------------------------------

REPLACING = {
    "product": lambda w: w * F32(0.999),
    "difference": lambda w: w - F32(0.1),
    "copy": lambda w: w.copy(),
    "clip": lambda w: np.clip(w, -1, 1),
    "reshaped": lambda w: (w * F32(0.5)).reshape(3, 1).reshape(w.shape),
    "Variable": lambda w: fastadam.Variable(np.array(w) * F32(0.5), name="w"),
}


def train_replacing(optimizer, replace, count=2, steps=8, keep=()):
    variables = [ones(3) for _ in range(count)]
    kept = []
    for _ in range(steps):
        kept = [*kept, *variables] if keep == "all" else list(variables)
        variables = [replace(w) for w in variables]
        step_by_half(optimizer, *variables)
    return kept


@pytest.mark.parametrize("scaled", [False, True], ids=["Adam", "LossScaleOptimizer"])
@pytest.mark.parametrize("kind", REPLACING)
def test_variables_that_are_replaced_before_each_step_are_warned_of_once(kind, scaled):
    optimizer = fastadam.Adam(0.1)
    optimizer = fastadam.LossScaleOptimizer(optimizer) if scaled else optimizer
    text = warned(lambda: train_replacing(optimizer, REPLACING[kind]), r"new array.*`w \*= 0.999`.*np.clip")
    assert text.startswith("variable 'w': " if kind == "Variable" else "grads_and_vars[0]: ")


@pytest.mark.parametrize("mode", ["lazy", "deferred", "deferred_fast"])
@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.usefixtures("rows_wait")
def test_a_table_that_is_replaced_is_warned_of(mode, synced):
    """Rows that wait are brought up to date by a plan of their own, which refers to the table, too."""
    optimizer, table = fastadam.Adam(0.1, sparse_update=mode), ones(500, 8)

    def train():
        for row in range(3):
            optimizer.gather(table, [row])
            optimizer.apply_gradients([(fastadam.IndexedSlices(ones(1, 8), [row]), table)])

    train()
    if synced:
        optimizer.sync()
    table = table[::-1] * F32(0.9)
    assert "500, 8) that is gone" in warned(train, r"new array.*resize")


def layer_by_layer(optimizer):
    layers = [ones(3), ones(3)]
    for _ in range(4):
        for i, layer in enumerate(layers):
            layers[i] = layer * F32(0.9)
            step_by_half(optimizer, layers[i])


def every_second_step(optimizer):
    w = ones(3)
    for step in range(8):
        w = np.clip(w, -1, 1) if step % 2 else w
        step_by_half(optimizer, w)


def one_optimizer_for_two_models(optimizer):
    for _ in range(2):
        model = [ones(3), ones(2)]
        for _ in range(3):
            step_by_half(optimizer, *model)


def new_lengths(optimizer):
    for n in range(1, 7):
        step_by_half(optimizer, ones(n))


@pytest.mark.parametrize("use", [layer_by_layer, every_second_step, one_optimizer_for_two_models, new_lengths])
def test_other_loops_that_leave_arrays_behind_are_warned_of(use):
    warned(lambda: use(fastadam.Adam(0.1)), "new array.*in place.*a new optimizer for a new model")


GROWN = {
    "grown": lambda w: np.concatenate([w, np.zeros((2, 2), F32)]),
    "doubled": lambda w: np.concatenate([w, w]),
    "shrunk": lambda w: w[:2].copy(),
    "copied": lambda w: w.copy(),
    "in the other order": lambda w: np.asfortranarray(np.concatenate([w, w])),
    "stacked": lambda w: np.vstack([w, np.ones((1, 2), F32)]),
}


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("kind", GROWN)
def test_a_table_that_becomes_another_array_is_warned_of_and_the_warning_names_resize(kind, is_kept, is_built):
    optimizer, table = fastadam.Adam(0.1), np.arange(8, dtype=F32).reshape(4, 2)
    if is_built:
        optimizer.build([table])
    step_by_half(optimizer, table)
    optimizer.apply_gradients([(fastadam.IndexedSlices(ones(1, 2), [1]), table)])
    new = GROWN[kind](table)
    kept = table if is_kept else None
    del table
    text = warned(lambda: step_by_half(optimizer, new), r"starts with moments of zero.*opt\.resize\(old, new\)")
    assert text.startswith(
        f"grads_and_vars[0]: a new array of shape {new.shape}, while the optimizer has updated one of"
    )
    assert ("that is gone" in text) == (not is_kept)
    assert ("with these values" in text) == is_kept
    del kept
    again = np.concatenate([new, new])
    step_by_half(optimizer, again)  # once


def test_the_third_array_is_warned_of_if_the_one_before_is_kept_for_comparison():
    optimizer, w = fastadam.Adam(0.1), ones(3)
    for _ in range(2):
        before, w = w, w * F32(0.9)
        step_by_half(optimizer, w)
    before, w = w, w * F32(0.9)
    warned(lambda: step_by_half(optimizer, w), "new array")
    assert before is not w


def test_it_is_warned_of_after_many_steps_on_one_array():
    optimizer, w = fastadam.Adam(0.1), ones(3)
    for _ in range(5):
        step_by_half(optimizer, w)
    warned(lambda: train_replacing(optimizer, REPLACING["product"], count=1), "new array")


def test_swapped_pairs_of_arrays_are_found_by_their_gradients_being_new():
    optimizer, w = fastadam.Adam(0.1), ones(3)

    def train():
        for _ in range(5):
            optimizer.apply_gradients([(w, w * F32(0.5))])

    warned(train, r"pair is swapped, expected \(gradient, variable\)")


def test_parameters_of_torch_that_are_given_other_memory_are_warned_of():
    torch = pytest.importorskip("torch")

    def renew(parameter):
        parameter.data = parameter.data * 0.9
        return parameter

    for replace in (renew, lambda w: torch.nn.Parameter(w.detach() * 0.9), lambda w: w.detach() * 0.9):
        optimizer, w = fastadam.Adam(0.1), torch.nn.Parameter(torch.ones(3))

        def train(optimizer=optimizer, w=w, replace=replace):
            for _ in range(4):
                w = replace(w)
                optimizer.apply_gradients([(ones(3), w)])

        warned(train, "new array")


def in_place(optimizer):
    w, v = ones(3), fastadam.Variable(ones(3))
    for _ in range(5):
        w *= F32(0.999)
        v *= 0.999
        np.clip(w, -1, 1, out=w)
        step_by_half(optimizer, w, v)


def taking_turns(optimizer):
    models = [[ones(3), ones(2, 2)] for _ in range(4)]
    for _ in range(3):
        for model in models:
            step_by_half(optimizer, *model)


def layer_by_layer(optimizer):
    layers = [ones(4, 4) for _ in range(10)]
    for _ in range(2):
        for layer in layers:
            step_by_half(optimizer, layer)


def rows_of_one_array(optimizer):
    block = ones(6, 3)
    for _ in range(2):
        for i in range(6):
            step_by_half(optimizer, block[i])


def new_views(optimizer):
    w = ones(3)
    for _ in range(5):
        step_by_half(optimizer, w[:])
        step_by_half(optimizer, fastadam.Variable(w.view()))


def growing(optimizer):
    layers = []
    for _ in range(5):
        layers = [*layers, ones(3)]
        step_by_half(optimizer, *layers)


def unfreezing(optimizer):
    layers = [ones(3) for _ in range(5)]
    for count in range(1, 6):
        step_by_half(optimizer, *layers[-count:])
        step_by_half(optimizer, *layers[-count:])


def another_model_that_is_kept(optimizer):
    models = [[ones(3), ones(2)] for _ in range(2)]
    for model in models:
        for _ in range(3):
            step_by_half(optimizer, *model)


def new_widths(optimizer):
    for n in range(1, 7):
        step_by_half(optimizer, ones(5, n))


def other_names(optimizer):
    for n in range(3):
        step_by_half(optimizer, fastadam.Variable(ones(3), name=f"layer {n}"))


def biases_of_zero_at_a_rate_of_zero(optimizer):
    optimizer.learning_rate = 0.0
    layers = [np.zeros(3, F32) for _ in range(3)]
    for layer in layers:
        step_by_half(optimizer, layer)


def resized(optimizer):
    w = np.arange(6, dtype=F32)
    step_by_half(optimizer, w)
    for _ in range(3):
        longer = np.concatenate([w, ones(2)])
        optimizer.resize(w, longer)
        w = longer
        step_by_half(optimizer, w)


def forgotten(optimizer):
    for _ in range(3):
        w = ones(3)
        step_by_half(optimizer, w)
        optimizer.forget(w)


def restored(optimizer):
    for _ in range(5):
        w = ones(3)
        optimizer = fastadam.Adam.from_config(optimizer.get_config())
        optimizer.build([w])
        step_by_half(optimizer, w)
        step_by_half(optimizer, w)


def one_by_one_while_others_are_kept(optimizer):
    history = [ones(3)]
    for _ in range(6):
        history.append(history[-1] * F32(0.5))
        step_by_half(optimizer, history[-1])


LEGITIMATE = [
    in_place,
    taking_turns,
    layer_by_layer,
    rows_of_one_array,
    new_views,
    growing,
    unfreezing,
    another_model_that_is_kept,
    new_widths,
    other_names,
    biases_of_zero_at_a_rate_of_zero,
    resized,
    forgotten,
    restored,
    one_by_one_while_others_are_kept,
]


@pytest.mark.parametrize("use", LEGITIMATE, ids=lambda use: use.__name__)
@pytest.mark.usefixtures("no_warning")
def test_other_uses_of_new_arrays_are_not_warned_of(use):
    use(fastadam.Adam(0.1))


# ---- iterators that yield nothing -----------------------------------------------------------------------------------


def used(kind):
    given = {"zip": zip([1], [2], strict=True), "generator": (i for i in [1]), "map": map(abs, [1]), "iter": iter([1])}
    list(given[kind])
    return given[kind]


CALLS_WITH_LISTS = {
    "apply_gradients": lambda o, given, path: o.apply_gradients(given),
    "scaled": lambda o, given, path: fastadam.LossScaleOptimizer(o).apply_gradients(given),
    "build": lambda o, given, path: o.build(given),
    "save": lambda o, given, path: o.save(path, given),
    "load": lambda o, given, path: (o.save(path, []), fastadam.Adam.load(path, given)),
    "finalize": lambda o, given, path: o.finalize_variable_values(given),
    "excluded variables": lambda o, given, path: o.exclude_from_weight_decay(given),
    "excluded names": lambda o, given, path: o.exclude_from_weight_decay(var_names=given),
    "set_weights": lambda o, given, path: o.set_weights(given),
    "global_norm": lambda o, given, path: fastadam.global_norm(given),
    "minimize": lambda o, given, path: o.minimize(lambda: 1.0, given, gradient=lambda loss, variables: []),
}


@pytest.mark.parametrize("kind", ["zip", "generator", "map", "iter"])
@pytest.mark.parametrize("call", CALLS_WITH_LISTS)
def test_an_iterator_that_yields_nothing_is_refused(call, kind, tmp_path):
    optimizer = fastadam.Adam(0.1)
    message = r"^\w+: \w+, an iterator that yielded nothing \(was it used before\?\), expected "
    with pytest.raises(ValueError, match=message):
        CALLS_WITH_LISTS[call](optimizer, used(kind), tmp_path / "adam")
    assert optimizer.iterations == 0


@pytest.mark.parametrize("call", [name for name in CALLS_WITH_LISTS if name != "set_weights"])
@pytest.mark.parametrize("empty", [[], ()], ids=["list", "tuple"])
@pytest.mark.usefixtures("no_warning")
def test_an_empty_list_is_quiet(call, empty, tmp_path):
    CALLS_WITH_LISTS[call](fastadam.Adam(0.1), empty, tmp_path / "adam")


def test_a_zip_serves_one_epoch():
    optimizer, pairs = fastadam.Adam(0.1), zip([ones(3)], [ones(3)], strict=True)
    assert optimizer.apply_gradients(pairs) == 1
    with pytest.raises(ValueError, match=r"^grads_and_vars: zip, an iterator that yielded nothing"):
        optimizer.apply_gradients(pairs)


@pytest.mark.parametrize("call", [name for name in CALLS_WITH_LISTS if name not in ("global_norm", "minimize")])
def test_one_array_is_not_taken_for_the_list_of_its_rows(call, tmp_path):
    optimizer = fastadam.Adam(0.1)
    with pytest.raises(TypeError, match=r"^\w+: one ndarray, expected an? "):
        CALLS_WITH_LISTS[call](optimizer, ones(3, 2), tmp_path / "adam")
    assert len(optimizer.weights) == 1
    assert fastadam.global_norm(ones(4, 4)) == 4.0


def test_adam_step_of_iterators_is_refused_and_of_empty_lists_does_nothing():
    fastadam.adam_step([], [], [], [], step=1)
    with pytest.raises(ValueError, match="^grads: 1 arrays, expected 0"):
        fastadam.adam_step([], [ones(3)], [], [], step=1)
    for name in ("vars", "grads", "m", "v", "vhat"):
        arguments = {key: [ones(3)] for key in ("vars", "grads", "m", "v")} | {name: iter(())}
        with pytest.raises(TypeError, match=rf"^{name}\[0\]: tuple_iterator, expected "):
            fastadam.adam_step(**arguments, step=1)


def test_an_exhausted_iterator_of_parameters_is_refused_by_torch():
    torch = pytest.importorskip("torch")
    import fastadam.torch

    parameters = torch.nn.Linear(2, 2).parameters()
    list(parameters)
    with pytest.raises(ValueError, match="empty parameter list"):
        fastadam.torch.Adam(parameters)


# ---- swapped pairs --------------------------------------------------------------------------------------------------


def torch_parameter():
    torch = pytest.importorskip("torch")
    return torch.nn.Parameter(torch.ones(3))


SWAPPED = {
    "Variable": lambda: fastadam.Variable(ones(3)),
    "named": lambda: fastadam.Variable(ones(3), name="w"),
    "torch": torch_parameter,
}


@pytest.mark.parametrize("kind", SWAPPED)
def test_a_swapped_pair_is_refused_by_its_place(kind):
    optimizer, good, w = fastadam.Adam(0.1), ones(3), SWAPPED[kind]()
    pattern = "Variable 'w' as the gradient of a ndarray" if kind == "named" else "as the gradient of a ndarray"
    for expected in (0, 1):
        with pytest.raises(TypeError, match=rf"^grads_and_vars\[1\]: .*{pattern}, expected \(gradient, variable\)"):
            optimizer.apply_gradients([(ones(3), good), (w, ones(3))])
        assert optimizer.iterations == expected
        step_by_half(optimizer, good)


def test_a_variable_as_the_gradient_of_a_known_array_is_refused():
    optimizer, w = fastadam.Adam(0.1), ones(3)
    step_by_half(optimizer, w)
    with pytest.raises(TypeError, match=r"^grads_and_vars\[0\]: Variable as the gradient of a ndarray"):
        optimizer.apply_gradients([(fastadam.Variable(ones(3)), w)])
    assert optimizer.iterations == 1


@pytest.mark.parametrize("kind", ["Variable", "torch"])
@pytest.mark.usefixtures("no_warning")
def test_gradients_that_are_held_as_their_variables_are_taken(kind):
    optimizer, w, g = fastadam.Adam(0.1), SWAPPED[kind](), SWAPPED[kind]()
    assert [optimizer.apply_gradients([(g, w)]) for _ in range(2)] == [1, 2]
