"""Delta checkpoints: a base and what changed since give the optimizer and its tables to the bit."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits
from fastadam._core.deferred import history as histories
from fastadam._core.deferred import trail as trails
from fastadam._core.parts import parts_of
from helpers import assert_same, slow

F32 = np.float32
ROWS = 200
pytestmark = pytest.mark.filterwarnings("ignore:.*a gradient for rows that wait:UserWarning")


class Training:
    """A table, a variable that is no table, and an optimizer that steps both; the same for every object."""

    def __init__(self, dtype=F32, width=(3,), **options):
        rng = np.random.RandomState(0)
        self.variables = [
            rng.standard_normal((ROWS, *width)).astype(dtype),
            rng.standard_normal(4).astype(F32),
        ]
        self.optimizer = fastadam.Adam(0.05, weight_decay=options.pop("weight_decay", None), **options)
        self.optimizer.build(self.variables)
        self.time = 0

    def steps(self, count, ids=10):
        for _ in range(count):
            rng = np.random.RandomState(self.time)
            self.time += 1
            table, bias = self.variables
            rows = rng.randint(0, ROWS // 2, rng.randint(0, ids))
            values = rng.standard_normal((len(rows), *table.shape[1:])).astype(table.dtype)
            pairs = [(fastadam.IndexedSlices(values, rows), table)]
            if rng.randint(3):
                pairs.append((rng.standard_normal(bias.shape).astype(F32), bias))
            self.optimizer.apply_gradients(pairs)

    def dense_step(self):
        rng = np.random.RandomState(self.time)
        self.time += 1
        table = self.variables[0]
        self.optimizer.apply_gradients([(rng.standard_normal(table.shape).astype(table.dtype), table)])

    def load(self, base, deltas, *, like=None):
        """A training that goes on from files."""
        twin = object.__new__(Training)
        twin.time = self.time
        twin.variables = [np.full_like(w, 7) if like is None else like for w in self.variables]
        twin.optimizer = type(self.optimizer).load(base, twin.variables, deltas=deltas)
        return twin

    def assert_same(self, other):
        self.optimizer.sync()
        other.optimizer.sync()
        assert_same(other.variables, self.variables)
        assert_same(other.optimizer.get_weights(), self.optimizer.get_weights())
        assert other.optimizer.get_config() == self.optimizer.get_config()


OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "decay": {"weight_decay": 0.01},
    "schedule": {"decay": 0.1, "clipnorm": 0.5},
    "float64": {"dtype": np.float64},
    "float16": {"dtype": np.float16},
    "bfloat16": {"dtype": ml_dtypes.bfloat16, "weight_decay": 0.1},
    "three axes": {"width": (2, 3), "amsgrad": True},
    "averages": {"use_ema": True, "ema_momentum": 0.9},
    "averages put back": {"use_ema": True, "ema_overwrite_frequency": 4},
    "accumulated": {"gradient_accumulation_steps": 4},
    "no columns": {"width": (0,)},
    "one axis": {"width": ()},
}
MODES = ["deferred", "lazy", "dense", "deferred_fast"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_chain_gives_back_a_training_to_the_bit(mode, options, tmp_path):
    if mode == "lazy" and "ema_overwrite_frequency" in options:
        options = {"use_ema": True}  # it is refused with lazy steps
    training = Training(sparse_update=mode, **options)
    training.steps(5)
    base, deltas = tmp_path / "base", []
    training.optimizer.save(base, values=True)
    for k in range(3):
        training.steps(6)
        deltas.append(tmp_path / f"delta_{k}")
        training.optimizer.save_delta(deltas[-1])
    again = training.load(base, deltas)
    if mode == "deferred_fast":  # what waits in one is up to date in the other: sums in closed form are rounded apart
        training.optimizer.sync()
        for a, b in zip(again.variables, training.variables, strict=True):
            np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=5e-2, atol=5e-3)
        return
    training.assert_same(again)
    for each in (training, again):
        each.steps(5)
    training.assert_same(again)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_deferred_deltas_have_the_bits_of_dense_steps(options, tmp_path):
    dense, deferred = (Training(sparse_update=mode, **options) for mode in ("dense", "deferred"))
    deferred.optimizer.save(tmp_path / "base", values=True)
    for k in range(2):
        for each in (dense, deferred):
            each.steps(4)
        deferred.optimizer.save_delta(tmp_path / f"delta_{k}")
    again = deferred.load(tmp_path / "base", [tmp_path / "delta_0", tmp_path / "delta_1"])
    assert_same(again.variables, dense.variables)
    assert_same(again.optimizer.get_weights(), dense.optimizer.get_weights())


def test_a_delta_does_not_move_rows_and_has_those_that_were_touched(tmp_path):
    training = Training(sparse_update="deferred")
    training.steps(5)
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(5)
    before = training.variables[0].copy()
    training.optimizer.save_delta(tmp_path / "delta")
    np.testing.assert_array_equal(bits(training.variables[0]), bits(before))
    training.optimizer.save_delta(tmp_path / "empty")
    import safetensors

    touched = np.unique(np.concatenate([rows_of_step(t) for t in range(5, 10)]))
    with safetensors.safe_open(tmp_path / "delta", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("rows/0"), touched)
        assert file.get_tensor("value/0").shape == (len(touched), 3)
        assert file.get_tensor("alphas/0").shape == (5,)
    with safetensors.safe_open(tmp_path / "empty", "numpy") as file:
        assert file.get_tensor("rows/0").size == 0
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "delta", tmp_path / "empty"]))


def rows_of_step(time):
    rng = np.random.RandomState(time)
    return rng.randint(0, ROWS // 2, rng.randint(0, 10))


# ---- random programs ---------------------------------------------------------------------------------------------------


def do_nothing(training):
    pass


def gather(training):
    training.optimizer.gather(training.variables[0], [0, 5, ROWS - 1])


def change_beta(training):
    training.optimizer.beta_1 = 0.5 if training.optimizer.beta_1 > 0.6 else 0.9


def change_rate(training):
    training.optimizer.learning_rate = 0.02 + float(training.optimizer.learning_rate) / 2


def change_decay(training):
    training.optimizer.weight_decay = None if training.optimizer.weight_decay else 0.02


def switch_amsgrad_on(training):
    training.optimizer.amsgrad = True
    training.optimizer.build(training.variables)


def crowd(training):
    training.steps(2, ids=300)


def overwrite_weights(training):
    weights = training.optimizer.get_weights()
    training.optimizer.set_weights([weights[0], *(w * np.asarray(0.5, w.dtype) for w in weights[1:])])


def switch_modes(training):
    mode = training.optimizer.sparse_update
    training.optimizer.sparse_update = "lazy"
    training.steps(2)
    training.optimizer.sparse_update = "dense"
    training.steps(1)
    training.optimizer.sparse_update = mode


def average(training):
    training.optimizer.use_ema = not training.optimizer.use_ema
    training.optimizer.build(training.variables)


def restart_count(training):
    training.optimizer.iterations = 3


ACTIONS = [
    do_nothing,
    gather,
    lambda training: training.optimizer.sync(),
    lambda training: training.dense_step(),
    change_beta,
    change_rate,
    change_decay,
    switch_amsgrad_on,
    crowd,
    overwrite_weights,
    switch_modes,
    restart_count,
    average,
]


def fail_to_save(optimizer, path, monkeypatch, name):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match="No space left"):
            optimizer.save_delta(path)


@pytest.mark.parametrize("seed", [0, 1, *slow(*range(2, 40))])
@pytest.mark.parametrize("mode", ["deferred", "lazy"])
@pytest.mark.parametrize("accumulates", [None, 3])
def test_random_programs_of_steps_deltas_merges_and_restarts(accumulates, mode, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(histories, "_FIRST_ROOM", 64)
    monkeypatch.setattr(histories, "_MOST_ROOM", 128)
    rng = np.random.RandomState(seed)
    options = {"weight_decay": [None, 0.01][seed % 2], "gradient_accumulation_steps": accumulates}
    straight, training = (Training(sparse_update=mode, **options) for _ in range(2))
    if seed % 3:
        for each in (straight, training):
            each.steps(3)
    base, deltas = tmp_path / "base", []
    training.optimizer.save(base, values=True)
    for k in range(12):
        for _ in range(2):
            action, count = ACTIONS[rng.randint(len(ACTIONS))], int(rng.choice([0, 1, 5, 40, 100]))
            for each in (straight, training):
                action(each)
                each.steps(count)
        path = tmp_path / f"delta_{k}"
        if rng.randint(3) == 0:
            fail_to_save(training.optimizer, path, monkeypatch, ["fsync", "replace"][rng.randint(2)])
            for each in (straight, training):
                each.steps(2)
        training.optimizer.save_delta(path)
        deltas.append(path)
        what = rng.randint(6)
        if what == 0:  # a new base, with an old name
            count = rng.randint(1, len(deltas) + 1)
            fastadam.merge_deltas(base, deltas[:count], tmp_path / "merged")
            (tmp_path / "merged").replace(base)
            deltas = deltas[count:]
        elif what == 1:
            training = training.load(base, deltas)
        elif what == 2:
            straight.assert_same(training.load(base, deltas))
        elif what == 3:
            training.optimizer.save(base := tmp_path / f"base_{k}", values=True)
            deltas = []
    straight.assert_same(training.load(base, deltas))
    straight.assert_same(training)


@pytest.mark.parametrize("mode", ["deferred", "lazy"])
def test_a_table_that_appears_as_such_after_the_base(mode, tmp_path):
    for begins in ("sparse", "dense", "dense then base"):
        training = Training(sparse_update=mode)
        if begins == "dense then base":
            training.dense_step()
        training.optimizer.save(tmp_path / "base", values=True)
        if begins == "dense":
            training.dense_step()
        training.steps(3)
        training.optimizer.save_delta(tmp_path / f"delta {begins}")
        size = (tmp_path / f"delta {begins}").stat().st_size
        assert (size < (tmp_path / "base").stat().st_size) == (begins != "dense")
        training.assert_same(training.load(tmp_path / "base", [tmp_path / f"delta {begins}"]))


@pytest.mark.parametrize("mode", ["lazy", "deferred"])
@pytest.mark.parametrize("change", ["grown", "shrunk", "regrown", "forgotten"])
def test_steps_go_on_after_a_change_of_variables_until_the_next_base(change, mode, tmp_path):
    small, table = np.ones((3, 2), F32), np.ones((100, 2), F32)
    optimizer = fastadam.Adam(0.1, sparse_update=mode)
    optimizer.build([small, table])
    optimizer.save(tmp_path / "base", values=True)

    def step(row, variable):
        optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((1, 2), F32), [row]), variable)])

    step(1, small)
    step(3, table)
    lengths = {"grown": [110], "shrunk": [50], "regrown": [50, 110], "forgotten": []}[change]
    if change == "forgotten":
        optimizer.forget(small)  # the table moves up to its place
    for length in lengths:
        optimizer.sync()
        longer = np.ones((length, 2), F32)
        longer[: len(table)] = table[:length]
        optimizer.resize(table, longer)
        table = longer
    step(len(table) - 1, table)
    with pytest.raises(ValueError, match="expected a new base"):
        optimizer.save_delta(tmp_path / "delta")
    optimizer.save(tmp_path / "base 2", values=True)
    step(len(table) - 2, table)
    optimizer.save_delta(tmp_path / "delta 2")
    others = [np.zeros_like(w) for w in ([table] if change == "forgotten" else [small, table])]
    again = fastadam.Adam.load(tmp_path / "base 2", others, deltas=[tmp_path / "delta 2"])
    again.sync()
    optimizer.sync()
    np.testing.assert_array_equal(others[-1], table)


def test_a_chain_goes_on_after_a_merge_and_in_another_process(tmp_path):
    training = Training(sparse_update="deferred")
    names = [tmp_path / name for name in ("base", "1", "2", "3", "4", "new")]
    training.optimizer.save(names[0], values=True)
    for name in names[1:4]:
        training.steps(3)
        training.optimizer.save_delta(name)
    fastadam.merge_deltas(names[0], names[1:3], names[5])
    shutil.copy(names[5], names[0])
    for name in names[1:3]:
        name.unlink()
    training.assert_same(training.load(names[0], names[3:4]))
    again = training.load(names[0], names[3:4])
    for each in (training, again):
        each.steps(3)
    again.optimizer.save_delta(names[4])
    training.assert_same(training.load(names[0], names[3:5]))


def test_a_merged_file_is_what_a_save_would_be(tmp_path):
    training = Training(sparse_update="deferred", amsgrad=True)
    training.steps(3)
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(5)
    training.optimizer.save_delta(tmp_path / "delta")
    fastadam.merge_deltas(tmp_path / "base", [tmp_path / "delta"], tmp_path / "merged")
    training.optimizer.save(tmp_path / "saved", values=True)
    import safetensors.numpy

    merged, saved = (safetensors.numpy.load_file(tmp_path / name) for name in ("merged", "saved"))
    assert merged.keys() == saved.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(bits(merged[key]), bits(value))


def test_tables_longer_than_a_piece(tmp_path, monkeypatch):
    from fastadam._core.saving import changed_rows, chunks, contents

    for module in (changed_rows, chunks, contents):
        monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(changed_rows, "_MANY_ROWS", 7)
    monkeypatch.setattr(histories, "_MANY_ROWS", 13)
    training = Training(sparse_update="deferred", amsgrad=True)
    training.optimizer.save(tmp_path / "base", values=True)
    for k in range(2):
        training.steps(20)
        training.optimizer.save_delta(tmp_path / f"{k}")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "0", tmp_path / "1"]))


def test_a_table_in_a_memory_map(tmp_path):
    training = Training(sparse_update="deferred")
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(20)
    training.optimizer.save_delta(tmp_path / "delta")
    table = np.memmap(tmp_path / "w", F32, "w+", shape=(ROWS, 3))
    fastadam.Adam.load(tmp_path / "base", [table, np.zeros(4, F32)], deltas=[tmp_path / "delta"])
    training.optimizer.sync()
    table.flush()
    np.testing.assert_array_equal(np.memmap(tmp_path / "w", F32, "r", shape=(ROWS, 3)), training.variables[0])


def test_a_loss_scale_optimizer_forwards_deltas(tmp_path):
    table = np.ones((ROWS, 3), F32)
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1, sparse_update="deferred"), dynamic_growth_steps=3)
    optimizer.inner_optimizer.build([table])
    optimizer.save(tmp_path / "base", values=True)
    for i in range(5):
        optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((1, 3), F32), [i]), table)])
    optimizer.save_delta(tmp_path / "delta")
    again = fastadam.LossScaleOptimizer.load(tmp_path / "base", [other := table * 0], deltas=[tmp_path / "delta"])
    optimizer.inner_optimizer.sync()
    np.testing.assert_array_equal(other, table)
    assert again.dynamic_scale == optimizer.dynamic_scale > 2**15
    other[:] = 7
    with pytest.raises(ValueError, match="state of LossScaleOptimizer"):
        fastadam.Adam.load(tmp_path / "base", [other], deltas=[tmp_path / "delta"])
    assert (other == 7).all()


def switch_off(training, *names):
    for name in names:
        setattr(training.optimizer, name, None if "frequency" in name else False)


AFTER_OVERWRITES = {
    "nothing": lambda t: None,
    "no frequency": lambda t: switch_off(t, "ema_overwrite_frequency"),
    "no averages": lambda t: switch_off(t, "ema_overwrite_frequency", "use_ema"),
    "later": lambda t: setattr(t.optimizer, "ema_overwrite_frequency", 1000),
}


@pytest.mark.parametrize("after", AFTER_OVERWRITES.values(), ids=AFTER_OVERWRITES)
@pytest.mark.parametrize("accumulates", [None, 2])
@pytest.mark.parametrize("frequency", [1, 2])
def test_averages_that_overwrote_rows_are_in_the_next_delta(frequency, accumulates, after, tmp_path):
    training = Training(
        sparse_update="deferred",
        use_ema=True,
        ema_momentum=0.9,
        ema_overwrite_frequency=frequency,
        gradient_accumulation_steps=accumulates,
    )
    training.steps(5)
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(4)
    after(training)
    training.steps(2)
    training.optimizer.save_delta(tmp_path / "1")
    training.steps(3)
    training.optimizer.save_delta(tmp_path / "2")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "1", tmp_path / "2"]))


@pytest.mark.parametrize("averages", [False, True])
def test_lazy_averages_switched_off_before_the_delta(averages, tmp_path):
    training = Training(sparse_update="lazy", use_ema=True, ema_momentum=0.9)
    training.steps(3)
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(3)
    training.optimizer.use_ema = averages
    training.optimizer.save_delta(tmp_path / "delta")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "delta"]))


def without_a_table(training):
    training.optimizer.apply_gradients([(np.ones(4, F32), training.variables[1])])


def with_an_empty_gradient(training):
    table = training.variables[0]
    training.optimizer.apply_gradients([(fastadam.IndexedSlices(np.zeros((0, 3), F32), np.zeros(0, int)), table)])


def with_other_rows(training):
    table = training.variables[0]
    training.optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((1, 3), F32), [ROWS - 1]), table)])


@pytest.mark.parametrize("ends", [without_a_table, with_an_empty_gradient, with_other_rows, Training.dense_step])
@pytest.mark.parametrize("options", [{}, {"use_ema": True}, {"weight_decay": 0.01}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("mode", MODES[:3])
def test_a_call_completes_the_cycle_that_the_base_was_saved_in(mode, is_loaded, options, ends, tmp_path):
    training = Training(sparse_update=mode, gradient_accumulation_steps=2, **options)
    training.steps(7)
    training.optimizer.save(tmp_path / "base", values=True)
    if is_loaded:
        training = training.load(tmp_path / "base", [])
    ends(training)
    training.optimizer.save_delta(tmp_path / "1")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "1"]))
    training.steps(4)
    training.optimizer.save_delta(tmp_path / "2")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "1", tmp_path / "2"]))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("mode", MODES[1:2] + MODES[:1])
def test_the_header_does_not_grow_with_the_rows_of_a_cycle(mode, values, tmp_path):
    """safetensors refuses to read a header of more than 100 MB."""
    sizes = []
    for rows in (1000, 100_000):
        table = np.ones((rows, 1), F32)
        optimizer = fastadam.Adam(0.1, sparse_update=mode, gradient_accumulation_steps=3)
        gradient = fastadam.IndexedSlices(np.ones((rows, 1), F32), np.arange(rows)[::-1])
        optimizer.apply_gradients([(gradient, table)])
        optimizer.save(tmp_path / "base", values=values)
        paths = ["base"]
        if values:
            optimizer.apply_gradients([(gradient, table)])
            optimizer.save_delta(tmp_path / "delta")
            fastadam.merge_deltas(tmp_path / "base", [tmp_path / "delta"], tmp_path / "merged")
            paths += ["delta", "merged"]
        headers = [(tmp_path / path).read_bytes()[:8] for path in paths]
        sizes.append([int.from_bytes(header, "little") for header in headers])
        again = table.copy()
        last = "merged" if values else "base"
        loaded = fastadam.Adam.load(tmp_path / last, [again])
        for _ in range(2 if not values else 1):
            for made, w in ((optimizer, table), (loaded, again)):
                made.apply_gradients([(gradient, w)])
        optimizer.sync()
        loaded.sync()
        assert_same([again], [table])
    for few, many in zip(*sizes, strict=True):
        assert many <= few + 4096  # the tensors of a larger file begin at a page


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A chain of three deltas, another course of the same training after the first, and files of other chains."""
    path = tmp_path_factory.mktemp("chain")
    training = Training(sparse_update="deferred")
    training.optimizer.save(path / "plain")
    training.optimizer.save(path / "old", values=True)
    training.steps(2)
    training.optimizer.save_delta(path / "of old")
    training.optimizer.save(path / "base", values=True)
    for name in "123":
        training.steps(3)
        training.optimizer.save_delta(path / name)
        if name == "1":
            other = training.load(path / "base", [path / "1"])
    other.steps(4)
    other.optimizer.save_delta(path / "other 2")
    fastadam.merge_deltas(path / "base", [path / "1"], path / "merged")
    return path, training


BAD_CHAINS = {
    "missing": ("base", ["1", "3"], r"deltas\[1\]: .*3: delta 3, expected delta 2"),
    "first missing": ("base", ["2"], r"deltas\[0\]: .*2: delta 2, expected delta 1"),
    "repeated": ("base", ["1", "1"], r"deltas\[1\]: .*1: delta 1 once more, expected delta 2"),
    "out of order": ("base", ["1", "3", "2"], r"deltas\[1\]: .*3: delta 3, expected delta 2"),
    "older": ("base", ["1", "2", "3", "1"], r"deltas\[3\]: .*1: delta 1 once more, expected delta 4"),
    "merged already": ("merged", ["1"], r"deltas\[0\]: .*1: delta 1 once more, expected delta 2"),
    "stale": ("base", ["of old"], r"deltas\[0\]: .*of old: a delta of another base, expected one that follows .*base"),
    "foreign": ("old", ["1"], r"deltas\[0\]: .*1: a delta of another base, expected one that follows .*old"),
    "another course": (
        "base",
        ["1", "other 2", "3"],
        r"deltas\[2\]: .*3: delta 3, which follows another file than deltas",
    ),
    "a base": ("base", ["old"], r"deltas\[0\]: .*old: not a delta, expected a file of save_delta"),
    "the base": ("base", ["base"], r"deltas\[0\]: .*base: not a delta"),
    "a plain file": ("base", ["plain"], r"deltas\[0\]: .*plain: not a delta"),
    "after a plain file": ("plain", ["1"], r"plain: a file without the values of the variables"),
    "a delta first": ("1", ["2"], r"1: a delta, expected a file of save\(values=True\)"),
    "alone": ("1", [], r"1: a delta, expected a file of save\(values=True\)"),
}


@pytest.mark.parametrize("kind", BAD_CHAINS)
def test_a_chain_with_a_link_that_does_not_fit_is_refused(kind, files, tmp_path):
    path, training = files
    base, deltas, message = BAD_CHAINS[kind]
    variables = [np.full_like(w, 7) for w in training.variables]
    with pytest.raises(ValueError, match=message):
        fastadam.Adam.load(path / base, variables, deltas=[path / name for name in deltas])
    assert all((w == 7).all() for w in variables)
    with pytest.raises(ValueError, match=message):
        fastadam.merge_deltas(path / base, [path / name for name in deltas], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damage_anywhere_in_a_delta_is_refused_and_nothing_changes(files, tmp_path):
    path, training = files
    data = (path / "2").read_bytes()
    variables = [np.full_like(w, 7) for w in training.variables]
    damaged = [data[:length] for length in [*range(0, len(data), 97), len(data) - 1]] + [data + b"\0"]
    damaged += [data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :] for at in range(0, len(data), 23)]
    for content in damaged:
        (tmp_path / "2").write_bytes(content)
        with pytest.raises(ValueError, match=rf"^deltas\[1\]: {re.escape(str(tmp_path / '2'))}: "):
            fastadam.Adam.load(path / "base", variables, deltas=[path / "1", tmp_path / "2", path / "3"])
        assert all((w == 7).all() for w in variables)


def test_a_damaged_base_is_refused_and_nothing_changes(files, tmp_path):
    path, training = files
    data = (path / "base").read_bytes()
    variables = [np.full_like(w, 7) for w in training.variables]
    for at in range(0, len(data), 41):
        (tmp_path / "base").write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'base'))}: "):
            fastadam.Adam.load(tmp_path / "base", variables, deltas=[path / "1"])
        assert all((w == 7).all() for w in variables)


def rewritten(source, target, change, tensors=None, without=()):
    """A delta as someone who knows the format would change it."""
    import json
    import zlib

    import safetensors
    import safetensors.numpy

    with safetensors.safe_open(source, framework="numpy") as file:
        header = json.loads(file.metadata()["fastadam"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    arrays.update(tensors or {})
    arrays = {key: array for key, array in arrays.items() if key not in without}
    change(header)
    header["weights"] = [
        [key, zlib.crc32(np.ascontiguousarray(arrays[key]).tobytes())] for key, _ in header["weights"] if key in arrays
    ]
    text = json.dumps(header)
    metadata = {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()))}
    safetensors.numpy.save_file(arrays, target, metadata)


def table(header):
    return header["tables"]["0"]


HOSTILE = {
    "chain text": lambda h: h.update(chain="x"),
    "chain without base": lambda h: h["chain"].pop("base"),
    "chain number": lambda h: h["chain"].update(number=True),
    "tables list": lambda h: h.update(tables=[]),
    "table of no variable": lambda h: h.update(tables={"0": 5}),
    "no table": lambda h: h.update(tables={}),
    "rows text": lambda h: table(h).update(rows="3"),
    "other rows": lambda h: table(h).update(rows=2),
    "steps number": lambda h: table(h).update(steps=3),
    "steps negative": lambda h: table(h)["steps"][0].__setitem__(1, -3),
    "steps more": lambda h: table(h)["steps"][0].__setitem__(1, 10**9),
    "steps none": lambda h: table(h).update(steps=[]),
    "steps of no numbers": lambda h: table(h)["steps"][0].__setitem__(0, []),
    "steps of text": lambda h: table(h)["steps"][0].__setitem__(0, list("abcd")),
    "positions none": lambda h: h.pop("positions"),
    "positions fewer": lambda h: h["positions"].pop(),
    "positions more": lambda h: h["positions"].__setitem__(0, 99),
    "positions negative": lambda h: h["positions"].__setitem__(1, -1),
    "shape": lambda h: h["variables"][0].update(shape=[ROWS + 1, 3]),
    "slots": lambda h: h["slots"].pop(),
    "values": lambda h: h.update(values=False),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_delta_with_a_hostile_header_is_refused(kind, files, tmp_path):
    path, training = files
    rewritten(path / "1", tmp_path / "1", HOSTILE[kind])
    variables = [np.full_like(w, 7) for w in training.variables]
    with pytest.raises(ValueError, match=rf"^deltas\[0\]: {re.escape(str(tmp_path / '1'))}: "):
        fastadam.Adam.load(path / "base", variables, deltas=[tmp_path / "1"])
    assert all((w == 7).all() for w in variables)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows/0", lambda rows: rows + ROWS),
        ("rows/0", lambda rows: rows - rows[0] - 1),
        ("rows/0", lambda rows: rows[::-1]),
        ("rows/0", lambda rows: rows * 0),
        ("rows/0", lambda rows: rows[1:]),
        ("rows/0", lambda rows: rows.astype(np.int32)),
        ("had/0", lambda had: had - 100),
        ("had/0", lambda had: had + 100),
        ("had/0", lambda had: had[1:]),
        ("alphas/0", lambda rates: rates[1:]),
        ("alphas/0", lambda rates: rates.astype(np.float64)),
        ("0/m", lambda m: m[1:]),
        ("0/v", lambda v: v.astype(np.float64)),
        ("value/0", lambda w: w[:, 1:]),
    ],
)
def test_a_delta_with_hostile_tensors_is_refused(name, change, files, tmp_path):
    path, training = files
    import safetensors

    with safetensors.safe_open(path / "1", framework="numpy") as file:
        tensors = {name: np.ascontiguousarray(change(file.get_tensor(name)))}
    rewritten(path / "1", tmp_path / "1", lambda header: None, tensors)
    variables = [np.full_like(w, 7) for w in training.variables]
    with pytest.raises(ValueError, match=rf"^deltas\[0\]: {re.escape(str(tmp_path / '1'))}: "):
        fastadam.Adam.load(path / "base", variables, deltas=[tmp_path / "1"])
    assert all((w == 7).all() for w in variables)


def numbers_with(place, value):
    def change(header):
        if "tables" in header:
            table(header)["steps"][0][0][place] = value

    return change


BAD_NUMBERS = {
    0: (2.0, 1, -0.1, None, True, "x", 10**400, float("1e999"), []),
    1: (2.0, 1, -0.1, None, True, "x", 10**400),
    2: (-1.0, None, True, 10**400, "x"),
    3: (5, None, 0.5, True, "x"),  # True: without "vhat"
    4: (0.9, 2.0, True, "x", 10**400),  # 0.9: without averages
    5: (1, None, 0.0, True),
}
UNSOUND = {
    **{f"without {key}": lambda h, key=key: h.pop(key)
       for key in ("accumulating", "sparse", "positions", "slots", "moments", "numbers", "block", "values")},
    **{f"{key} {value!r}": lambda h, key=key, value=value: h.update({key: value})
       for key in ("accumulating", "sparse", "positions", "slots", "moments", "numbers", "variables")
       for value in (1, "mv", {}, None, [None, None], [[], []], [-1, -2], [5, 6], [True, False])
       if (key, value) != ("positions", [5, 6]) and (key, value) != ("numbers", [5, 6])},
    "values 1": lambda h: h.update(values=1),
    "values false": lambda h: h.update(values=False),
    "position huge": lambda h: h["positions"].__setitem__(0, 10**30),
    "block": lambda h: h.update(block=3),
    "moments of codes": lambda h: h.update(moments=["8bit", "8bit"]),
    "moments of bfloat16": lambda h: h.update(moments=["bfloat16", "float32"]),
    "tables list": lambda h: h.update(tables=[]),
    "tables of others": lambda h: h.update(tables={"7": {"rows": 0, "steps": [], "exact": True}}),
    "excluded": lambda h: h.update(excluded={}),
    "excluded variable": lambda h: h.update(excluded={"names": [], "variables": [7]}),
    "shape negative": lambda h: h["variables"][0].update(shape=[-1, 3]),
    "dtype": lambda h: h["variables"][0].update(dtype="int32"),
}  # fmt: skip
STEPS = {
    f"number {place} {str(value)[:9]}": numbers_with(place, value)
    for place, values in BAD_NUMBERS.items()
    for value in values
}


def assert_refused(files, tmp_path, source, change, tensors=None, without=()):
    """By load and by merge_deltas, each with the name of the file, and nothing is written."""
    path, training = files
    rewritten(path / source, tmp_path / "bad", change, tensors, without)
    names = [tmp_path / "bad" if name == source else path / name for name in ("base", "1", "2", "3")]
    variables = [np.full_like(w, 7) for w in training.variables]
    message = rf"(^|: ){re.escape(str(tmp_path / 'bad'))}: "
    with pytest.raises(ValueError, match=message):
        fastadam.Adam.load(names[0], variables, deltas=names[1:])
    with pytest.raises(ValueError, match=message):
        fastadam.merge_deltas(names[0], names[1:], tmp_path / "merged")
    assert all((w == 7).all() for w in variables)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("source", ["base", "2", "3"])
@pytest.mark.parametrize("kind", UNSOUND)
def test_load_and_merge_refuse_a_file_that_does_not_hold_together(kind, source, files, tmp_path):
    assert_refused(files, tmp_path, source, UNSOUND[kind])


@pytest.mark.parametrize("source", ["2", "3"])
@pytest.mark.parametrize("kind", STEPS)
def test_load_and_merge_refuse_numbers_that_no_step_has(kind, source, files, tmp_path):
    assert_refused(files, tmp_path, source, STEPS[kind])


@pytest.mark.parametrize(
    "key", ["0/m", "0/v", "1/m", "1/v", "value/0", "value/1", "rows/0", "had/0", "alphas/0", "keeps/0"]
)
@pytest.mark.parametrize("source", ["base", "1", "2", "3"])
def test_load_and_merge_refuse_a_file_without_a_tensor(source, key, files, tmp_path):
    if source == "base" and key.partition("/")[0] in ("rows", "had", "alphas", "keeps"):
        key = "iterations"
    assert_refused(files, tmp_path, source, lambda header: None, without=[key])


@pytest.mark.parametrize("source", ["1", "2", "3"])
def test_load_and_merge_refuse_a_file_that_hides_both_moments(source, files, tmp_path):
    def hide(header):
        header["slots"][0] = ["mine"]
        header["moments"][0] = None
        header["weights"].append(["0/mine", 0])

    mine = {"0/mine": np.zeros((table_rows(files[0] / source), 3), F32)}
    assert_refused(files, tmp_path, source, hide, mine, without=["0/m", "0/v"])


def table_rows(path):
    import safetensors

    with safetensors.safe_open(path, framework="numpy") as file:
        return len(file.get_tensor("rows/0"))


@pytest.mark.parametrize("source", ["base", "2", "3"])
@pytest.mark.parametrize("key", ["0/more", "value/2", "rows/1", "accumulated_rows/0", "nothing"])
def test_load_and_merge_refuse_a_file_with_another_tensor(key, source, files, tmp_path):
    def add(header):
        header["weights"].append([key, 0])

    assert_refused(files, tmp_path, source, add, {key: np.zeros(2, np.int64)})


@pytest.mark.parametrize("source", ["base", "2", "3"])
def test_load_and_merge_refuse_a_negative_count(source, files, tmp_path):
    assert_refused(files, tmp_path, source, lambda header: None, {"iterations": np.array(-5)})


def test_deltas_are_a_list_of_paths(files):
    path, training = files
    for deltas, error, message in (
        (str(path / "1"), TypeError, "deltas: str, expected a list"),
        ([5], TypeError, r"deltas\[0\]: int, expected a string or a path"),
        ([""], ValueError, r"deltas\[0\]: '', expected the name of a file"),
        ([path / "none"], FileNotFoundError, "none"),
        ([path], IsADirectoryError, str(path)),
    ):
        with pytest.raises(error, match=message):
            fastadam.Adam.load(path / "base", training.variables, deltas=deltas)
    with pytest.raises(ValueError, match="changes: .* with deltas, expected None"):
        fastadam.Adam.load(path / "base", training.variables, deltas=[path / "1"], changes={"seed": 3})
    with pytest.raises(ValueError, match=r"plain: a file without the values of the variables, expected one of save"):
        fastadam.merge_deltas(path / "plain", [], path / "out")


def test_a_delta_needs_a_base(tmp_path):
    training = Training()
    match = r"save_delta: this optimizer has saved no base and was not loaded from one, expected save\(path"
    with pytest.raises(ValueError, match=match):
        training.optimizer.save_delta(tmp_path / "delta")
    training.optimizer.save(tmp_path / "plain")
    with pytest.raises(ValueError, match=match):
        training.optimizer.save_delta(tmp_path / "delta")
    training.optimizer.save(tmp_path / "base", values=True)
    for copy in (pickle.loads(pickle.dumps(training.optimizer)), __import__("copy").deepcopy(training.optimizer)):
        with pytest.raises(ValueError, match=match):
            copy.save_delta(tmp_path / "delta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "plain"]


def test_variables_that_come_or_change_need_a_new_base(tmp_path):
    training = Training(sparse_update="deferred")
    training.optimizer.save(tmp_path / "base", values=True)
    new = np.ones(3, F32)
    training.optimizer.apply_gradients([(new, new.copy())])
    with pytest.raises(ValueError, match=r"save_delta: the variable float32 \(3,\) came after the last save"):
        training.optimizer.save_delta(tmp_path / "delta")
    training.optimizer.save(tmp_path / "base", training.variables, values=True)  # these alone
    training.steps(2)
    training.optimizer.save_delta(tmp_path / "delta")
    training.load(tmp_path / "base", [tmp_path / "delta"])


def test_a_delta_does_not_replace_a_file_of_its_chain(tmp_path):
    training = Training(sparse_update="deferred")
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(1)
    with pytest.raises(ValueError, match="path: .*base is the base of the chain that this delta continues"):
        training.optimizer.save_delta(tmp_path / "base")
    training.optimizer.save_delta(tmp_path / "delta")
    training.steps(1)
    with pytest.raises(ValueError, match="path: .*delta is delta 1 of the chain that this delta continues"):
        training.optimizer.save_delta(tmp_path / "delta")
    (tmp_path / "other").write_text("not of this chain")
    training.optimizer.save_delta(tmp_path / "other")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "delta", tmp_path / "other"]))
    with pytest.raises(ValueError, match="suffix of another format"):
        training.optimizer.save_delta(tmp_path / "delta.npz")


def test_more_steps_than_are_kept_need_a_new_base(tmp_path, monkeypatch):
    monkeypatch.setattr(histories, "_FIRST_ROOM", 64)
    monkeypatch.setattr(histories, "_MOST_ROOM", 64)
    monkeypatch.setattr(trails, "_MOST_STEPS", 300)
    training = Training(sparse_update="deferred")
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(300)
    training.optimizer.save_delta(tmp_path / "1")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "1"]))
    training.steps(500)
    with pytest.raises(ValueError, match=r"save_delta: .* more than 2\*\*20 steps .* expected a new base"):
        training.optimizer.save_delta(tmp_path / "2")
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(5)
    training.optimizer.save_delta(tmp_path / "3")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "3"]))


# ---- crashes -----------------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
import fastadam, numpy as np
from pathlib import Path
path = Path(sys.argv[1])
w = np.ones((5000, 4), np.float32)
optimizer = fastadam.Adam(0.1, sparse_update="deferred")
optimizer.build([w])
optimizer.save(path / "base", values=True)
for i, limit in enumerate((0, 1, 100, 4096, 20000, 100_000)):
    ids = np.arange(i * 700, i * 700 + 700)
    optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((700, 4), np.float32), ids), w)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for save in (optimizer.save_delta, lambda p: optimizer.save(p, values=True)):
        try:
            save(path / "delta")
        except OSError as error:
            assert str(path / "delta") in str(error), error
        else:
            assert limit > 50_000 and save == optimizer.save_delta, limit
            break
    assert limit > 50_000 or [p.name for p in path.iterdir()] == ["base"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
optimizer.save_delta(path / "last")
deltas = [path / "delta"] if (path / "delta").exists() else []
fastadam.Adam.load(path / "base", [again := np.zeros_like(w)], deltas=[*deltas, path / "last"])
optimizer.sync()
assert np.array_equal(again, w)
"""


def test_after_a_full_disk_the_next_delta_has_everything(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FULL_DISK, str(tmp_path)], check=True)


KILLED = """
import os, random, signal, sys, time, warnings
import fastadam, numpy as np
from pathlib import Path
warnings.simplefilter("ignore")
path, what = Path(sys.argv[1]), sys.argv[2]

def step(optimizer, w, t):
    ids = np.random.RandomState(t).randint(0, 3000, 50)
    optimizer.apply_gradients([(fastadam.IndexedSlices(np.full((50, 4), t % 7 - 3, np.float32), ids), w)])

def new():
    w = np.ones((3000, 4), np.float32)
    optimizer = fastadam.Adam(0.1, sparse_update="deferred")
    optimizer.build([w])
    return optimizer, w

straight, truth = new()
optimizer, w = new()
optimizer.save(path / "base", values=True)
random.seed(0)
reached = 0
for attempt in range(40):
    child = os.fork()
    if not child:
        files = sorted(path.glob("delta_*"))
        optimizer = fastadam.Adam.load(path / "base", [w], deltas=files)
        for count in range(len(files), 10**9):
            step(optimizer, w, int(optimizer.iterations))
            if what == "save" and count % 3 == 2:
                optimizer.save(path / "base", values=True)
                for old in sorted(path.glob("delta_*")):
                    old.unlink()
            else:
                optimizer.save_delta(path / f"delta_{int(optimizer.iterations):07d}")
    time.sleep(random.uniform(0, 0.01 * attempt))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    files = sorted(path.glob("delta_*"))
    if what == "save":  # killed between the new base and the removal of what it replaces
        while files:
            try:
                fastadam.Adam.load(path / "base", [w], deltas=files)
                break
            except ValueError as error:
                assert "another base" in str(error), error
                files.pop(0).unlink()
    optimizer = fastadam.Adam.load(path / "base", [w], deltas=files)
    while straight.iterations < optimizer.iterations:
        step(straight, truth, int(straight.iterations))
    assert straight.iterations == optimizer.iterations
    straight.sync()
    assert np.array_equal(w, truth), attempt
    for a, b in zip(straight.get_weights(), optimizer.get_weights()):
        assert np.array_equal(a, b)
    reached = int(optimizer.iterations)
assert reached > 2, reached
"""


@pytest.mark.parametrize("what", [*slow("save"), "save_delta"])
def test_a_process_killed_at_any_moment_leaves_a_chain_that_loads(what, tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), what], check=True)
    known = ("base", ".fastadam-", "delta_")
    assert all(p.name.startswith(known) for p in tmp_path.iterdir())


def test_flags_are_cleared_only_after_the_rename(tmp_path, monkeypatch):
    training = Training(sparse_update="deferred")
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(3)
    for name in ("fsync", "replace"):
        fail_to_save(training.optimizer, tmp_path / "delta", monkeypatch, name)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    training.steps(3)
    training.optimizer.save_delta(tmp_path / "delta")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "delta"]))
    assert not parts_of(training.optimizer).state.entries[0].history.changed_rows().size


def test_the_steps_of_an_optimizer_without_deltas_note_nothing(tmp_path):
    training = Training(sparse_update="lazy")
    training.steps(3)
    training.optimizer.save(tmp_path / "plain")
    assert parts_of(training.optimizer).runtime.chain is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.optimizer.save(tmp_path / "base", values=True)
