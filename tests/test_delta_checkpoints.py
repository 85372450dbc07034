"""Delta checkpoints: a base and what changed since give the optimizer and its tables to the bit."""

from __future__ import annotations

import shutil

import fastadam
import fastadam._core.native.slices as slices_module
import ml_dtypes
import numpy as np
import pytest
from cases import bits
from delta_cases import F32, ROWS, Training, fail_to_save
from fastadam._core.deferred import history as histories
from helpers import assert_same, slow, weekly

pytestmark = pytest.mark.filterwarnings("ignore:.*a gradient for rows that wait:UserWarning")
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


@pytest.mark.parametrize("seed", [0, *slow(1, 2, 3), *weekly(*range(4, 40))])
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
    from fastadam._core.native import chunks
    from fastadam._core.saving import changed_rows, contents

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
@pytest.mark.parametrize("options", [{}, *slow({"use_ema": True}, {"weight_decay": 0.01}, {"amsgrad": True})], ids=str)
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


@pytest.mark.parametrize("mode", ["lazy", "deferred"])
@pytest.mark.parametrize("accumulates", [None, 2])
def test_the_rows_of_a_gradient_are_read_once_while_deltas_follow(accumulates, mode, tmp_path, monkeypatch):
    """By the step, which has them from where they were noted."""
    table = np.ones((50, 3), np.float32)
    optimizer = fastadam.Adam(0.1, sparse_update=mode, gradient_accumulation_steps=accumulates)
    optimizer.build([table])
    optimizer.save(tmp_path / "base", values=True)
    read = []
    as_indices = slices_module._as_indices
    for k in range(4):
        gradient = fastadam.IndexedSlices(np.ones((2, 3), np.float32), [k, k + 1])
        monkeypatch.setattr(slices_module, "_as_indices", lambda indices: read.append(1) or as_indices(indices))
        optimizer.gather(table, [k])
        optimizer.apply_gradients([(gradient, table)])
        monkeypatch.undo()
        assert len(read) == k + 1
    optimizer.save_delta(tmp_path / "delta")
    other = np.ones((50, 3), np.float32)
    fastadam.Adam.load(tmp_path / "base", [other], deltas=[tmp_path / "delta"])
    optimizer.sync()
    np.testing.assert_array_equal(other, table)


@pytest.mark.parametrize("what", ["save", "save_delta"])
def test_a_step_that_a_callable_makes_while_a_file_is_written_is_in_it(what, tmp_path):
    """``get_config`` calls hyperparameters: what they change is there before the state is looked at."""
    table = np.ones((6, 4), F32)
    optimizer = fastadam.Adam(0.1, sparse_update="deferred")

    def step(*ids):
        slices = fastadam.IndexedSlices(np.ones((len(ids), 4), F32), np.array(ids))
        optimizer.apply_gradients([(slices, table)])

    made = []

    def rate():
        if not made:
            made.append(True)
            step(5)
        return 0.1

    step(1, 2)
    base, deltas = tmp_path / "base", [tmp_path / "1", tmp_path / "2"]
    if what == "save_delta":
        optimizer.save(base, values=True)
    step(0, 5)
    optimizer.learning_rate = rate
    made.clear()
    if what == "save_delta":
        optimizer.save_delta(deltas[0])
    else:
        optimizer.save(base, values=True)
        optimizer.save_delta(deltas[0])
    assert made
    optimizer.learning_rate = 0.1
    step(1)
    optimizer.save_delta(deltas[1])
    found = np.zeros_like(table)
    loaded = fastadam.Adam.load(base, [found], deltas=deltas)
    for each in (optimizer, loaded):
        each.sync()
    np.testing.assert_array_equal(found, table)
    assert_same(loaded.get_weights(), optimizer.get_weights())
