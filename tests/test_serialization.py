"""A saved optimizer goes on to the bit; a file of another model is refused."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import fastadam
import ml_dtypes
import numpy as np
import pytest
from helpers import (
    DTYPES,
    OPTIONS,
    Halving,
    assert_goes_on_alike,
    assert_same,
    make_variables,
    refuses,
    saved,
    train,
    trained,
)

DATA = Path(__file__).parent / "data"
F32 = np.float32


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "options", [*OPTIONS.values(), {"weight_decay": 0.1, "use_ema": True}], ids=[*OPTIONS, "extras"]
)
def test_a_saved_optimizer_goes_on_to_the_bit(options, order, dtype, tmp_path):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    optimizer, variables = saved(tmp_path / "opt", options, order=order, dtype=dtype)
    others = [w.copy(order="K") for w in variables]
    again = fastadam.Adam.load(tmp_path / "opt", others)
    assert [p.name for p in tmp_path.iterdir()] == ["opt"]
    assert_goes_on_alike(optimizer, variables, again, others)


def test_the_order_of_weights_is_saved(tmp_path):
    optimizer = fastadam.Adam(0.1, amsgrad=True)
    variables = [np.zeros((2, 0), F32), *make_variables()]
    train(optimizer, variables[:2], range(2))
    optimizer.add_slot(variables[0], "extra", "ones")
    train(optimizer, variables, range(2, 3))
    optimizer.save(str(tmp_path / "opt"))
    others = [w.copy() for w in variables]
    again = fastadam.Adam.load(str(tmp_path / "opt"), iter(others))
    assert again.get_slot_names() == optimizer.get_slot_names()
    assert_goes_on_alike(optimizer, variables, again, others)


def test_chosen_variables_are_saved_in_the_order_given(tmp_path):
    optimizer, variables = trained()
    optimizer.save(tmp_path / "opt", [variables[2], variables[0]])
    again = fastadam.Adam.load(tmp_path / "opt", [variables[2], variables[0]])
    for name in ("m", "v"):
        assert_same(
            [again.get_slot(w, name) for w in variables[::2]][::-1][1:], [optimizer.get_slot(variables[0], name)]
        )
        np.testing.assert_array_equal(again.get_slot(variables[2], name), optimizer.get_slot(variables[2], name))
    with pytest.raises(ValueError, match=re.escape("variables[1]: not a variable of this optimizer")):
        optimizer.save(tmp_path / "opt", [variables[0], np.ones(3, F32)])
    with pytest.raises(ValueError, match=re.escape("variables[2]: the same as variables[0]")):
        optimizer.save(tmp_path / "opt", [variables[0], variables[1], variables[0][:]])
    assert len(fastadam.Adam.load(tmp_path / "opt", [variables[2], variables[0]]).weights) == 5


def test_an_optimizer_whose_variables_have_not_come_can_be_saved(tmp_path):
    optimizer, variables = trained()
    pickle.loads(pickle.dumps(optimizer)).save(tmp_path / "opt")
    again = fastadam.Adam.load(tmp_path / "opt", others := [w.copy() for w in variables])
    assert_goes_on_alike(optimizer, variables, again, others)


def test_the_mode_of_a_saved_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        saved(tmp_path / "opt")
    finally:
        os.umask(before)
    assert (tmp_path / "opt").stat().st_mode & 0o777 == 0o640


def test_names_and_exclusions_are_saved(tmp_path):
    variables = [fastadam.Variable(w, name) for w, name in zip(make_variables(), "abcd", strict=True)]
    optimizer = fastadam.AdamW(0.1, 0.5)
    optimizer.exclude_from_weight_decay([variables[1]], ["c|d"])
    train(optimizer, variables, range(3))
    optimizer.save(tmp_path / "opt")
    others = [fastadam.Variable(w.numpy(), w.name) for w in variables]
    with pytest.raises(
        ValueError, match=re.escape("variable 0 float32 (3,) named 'a', expected float32 (3,) named 'b'")
    ):
        fastadam.AdamW.load(tmp_path / "opt", [fastadam.Variable(np.ones(3, F32), "b"), *others[1:]])
    again = fastadam.AdamW.load(tmp_path / "opt", others)
    assert_goes_on_alike(optimizer, variables, again, others)


def test_a_schedule_of_the_user_is_restored_by_custom_objects(tmp_path):
    optimizer, variables = saved(tmp_path / "opt", {"learning_rate": Halving(0.5)})
    with pytest.raises(ValueError, match="opt: Adam refuses its config .*Unknown decay: Halving"):
        fastadam.Adam.load(tmp_path / "opt", variables)
    others = [w.copy() for w in variables]
    again = fastadam.Adam.load(tmp_path / "opt", others, {"Halving": Halving})
    assert_goes_on_alike(optimizer, variables, again, others)


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "opt"
    _, variables = saved(path)
    first, *rest = variables
    refuses(path, rest, "state of 4 variables, expected 3 like variables")
    refuses(path, [*variables, first], "state of 4 variables, expected 5")
    refuses(
        path,
        [first.astype(np.float64), *rest],
        re.escape("variable 0 float32 (3,), expected float64 (3,) like vars[0]"),
    )
    refuses(path, [np.ones(4, F32), *rest], re.escape("variable 0 float32 (3,), expected float32 (4,) like vars[0]"))
    refuses(path, variables, "state of Adam, expected AdamW", fastadam.AdamW)
    refuses(path, [np.ones(3, F32), rest[0], rest[1], np.ones((3, 4), F32)], re.escape("variable 3 float32 (4, 3)"))
    with pytest.raises(TypeError, match=re.escape("vars[0]: dtype int64")):
        fastadam.Adam.load(path, [np.ones(3, np.int64), *rest])
    with pytest.raises(FileNotFoundError, match="none"):
        fastadam.Adam.load(tmp_path / "none", variables)


def test_variables_that_share_memory_are_refused(tmp_path):
    path = tmp_path / "opt"
    saved(path, shapes=((3,), (3,)))
    w = np.ones(6, F32)
    refuses(path, [w[:3], w[:3]], "the same variable is given twice")
    refuses(path, [w[:3], w[2:5]], "overlaps")


def test_the_first_format_is_read_for_ever():
    """Written by `make_state_v1` below, which stays as it is."""
    optimizer, variables = make_state_v1()
    others = [fastadam.Variable(w.numpy(), w.name) for w in variables]
    again = fastadam.Adam.load(DATA / "state_v1.safetensors", others)
    assert again.iterations == 3
    np.testing.assert_array_equal(again.get_slot(others[0], "m"), np.array([[0.25, 0.5], [0.75, 1]], F32))
    np.testing.assert_array_equal(again.get_slot(others[1], "vhat"), [3.5])
    assert again.learning_rate == fastadam.schedules.PiecewiseConstantDecay([2.0, 9.0], [0.5, 0.25, 0.125])
    assert_same(again.get_weights(), optimizer.get_weights())
    assert again.get_config() == optimizer.get_config()


def make_state_v1():
    schedule = fastadam.schedules.PiecewiseConstantDecay([2.0, 9.0], [0.5, 0.25, 0.125])
    optimizer = fastadam.Adam(schedule, 0.75, 0.875, 2**-20, True, "old", decay=0.5, clipvalue=2.0)
    variables = [
        fastadam.Variable(np.array([[1, 2], [3, 4]], F32, order="F"), "w"),
        fastadam.Variable(np.array([5.0]), "b"),
    ]
    optimizer.build(variables)
    w = np.array([[0.25, 0.5], [0.75, 1]], F32)
    values = [w, [1.5], 2 * w, [2.5], 4 * w, [3.5]]
    optimizer.set_weights([3, *map(np.array, values)])
    return optimizer, variables
