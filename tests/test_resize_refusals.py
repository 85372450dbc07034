"""Calls of resize, forget and reset that are refused, and what they leave as it is."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from fastadam import IndexedSlices
from fastadam._core.parts import parts_of
from helpers import F32, ones, step_by_half
from resize_cases import DEFERRED, MODES, NEW, state_of, used

pytestmark = pytest.mark.usefixtures("passes_touch_all_rows")


REFUSED = {
    "unknown": (lambda o, t: o.resize(NEW, t), ValueError, "^old: not a variable of this optimizer"),
    "unknown to forget": (lambda o, t: o.forget(NEW), ValueError, "^var: not a variable of this optimizer"),
    "unknown to reset": (lambda o, t: o.reset(NEW), ValueError, "^var: not a variable of this optimizer"),
    "dtype": (lambda o, t: o.resize(t, np.zeros((3, 2))), ValueError, r"^new: float64 \(3, 2\), expected float32 \(n, 2\) "),
    "width": (lambda o, t: o.resize(t, ones(3, 3)), ValueError, r"^new: float32 \(3, 3\), expected float32 \(n, 2\) like"),
    "axes": (lambda o, t: o.resize(t, ones(6)), ValueError, r"^new: float32 \(6,\), expected float32 \(n, 2\) like old"),
    "list": (lambda o, t: o.resize(t, [[1.0, 2.0]]), TypeError, "^new: list, expected"),
    "integers": (lambda o, t: o.resize(t, np.zeros((3, 2), int)), TypeError, "^new: "),
    "read-only": (lambda o, t: o.resize(t, np.broadcast_to(F32(0), (3, 2))), ValueError, "^new: "),
    "float rows": (lambda o, t: o.resize(t, NEW, [0.0, 1.0, 2.0]), TypeError, "^rows: dtype float64, expected integers"),
    "mask": (lambda o, t: o.resize(t, NEW, [True] * 3), TypeError, "^rows: dtype bool, expected integers"),
    "too few rows": (lambda o, t: o.resize(t, NEW, [0, 1]), ValueError, r"^rows: shape \(2,\), expected \(3,\)"),
    "a row too high": (lambda o, t: o.resize(t, NEW, [0, 1, 6]), ValueError, "^rows: 6 is not a row of old, expected 0 <="),
    "-2": (lambda o, t: o.resize(t, NEW, [0, 1, -2]), ValueError, "^rows: -2 is not a row of old"),
    "rows alone": (lambda o, t: o.reset(rows=[1]), ValueError, "^rows: given without var"),
    "reset row": (lambda o, t: o.reset(t, [6]), ValueError, "^rows: 6 is not a row of var, expected 0 <= row < 6"),
    "reset -1": (lambda o, t: o.reset(t, [-1]), ValueError, "^rows: -1 is not a row of var"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("mode", ["dense", "deferred"])
def test_a_call_that_is_refused_changes_nothing(case, mode):
    call, error, message = REFUSED[case]
    optimizer, table = used(**MODES[mode])
    before = state_of(optimizer, table)
    with pytest.raises(error, match=message):
        call(optimizer, table)
    assert state_of(optimizer, table) == before


@pytest.mark.parametrize("row", [0, 1])
def test_values_that_were_copied_before_rows_were_brought_up_to_date_are_refused(row):
    optimizer, table = used(**DEFERRED)
    for _ in range(3):
        optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [5]), table)])
    optimizer.gather(table, [row])
    before = state_of(optimizer, table)
    changed = table.copy()
    other = 1 - row
    changed[other, 1] += 1
    with pytest.raises(ValueError, match=rf"^new: row {other} is not the one of old as it is now, so that steps of"):
        optimizer.resize(table, changed)
    assert state_of(optimizer, table) == before
    stale = table.copy()
    optimizer.sync()
    with pytest.raises(ValueError, match=rf"^new: row {other} is not the one of old as it is now, so that steps of"):
        optimizer.resize(table, stale)  # no row waits any more, but these values lack steps
    optimizer.resize(table, table.copy())


def test_an_array_that_the_optimizer_knows_or_that_overlaps_one_is_refused():
    optimizer, table, other = fastadam.Adam(0.1), ones(4, 2), ones(8, 2)
    step_by_half(optimizer, table, other)
    for new, message in ((other, "a variable of this optimizer already"), (other[:5], "overlaps a variable of this")):
        with pytest.raises(ValueError, match=f"^new: {message}"):
            optimizer.resize(table, new)
    assert len(optimizer.weights) == 5
    step_by_half(optimizer, table, other)


@pytest.mark.parametrize("call", ["resize", "forget", "reset"])
@pytest.mark.parametrize("when", ["open step", "averages"])
def test_none_can_be_called_in_the_middle_of_something(call, when):
    optimizer, table = fastadam.Adam(0.1, use_ema=when == "averages"), ones(4, 2)
    step_by_half(optimizer, table)
    calls = {"resize": lambda: optimizer.resize(table, ones(5, 2)), "forget": lambda: optimizer.forget(table),
             "reset": lambda: optimizer.reset()}  # fmt: skip
    if when == "averages":
        with optimizer.averages([table]), pytest.raises(RuntimeError, match=f"^{call}: inside of"):
            calls[call]()
    else:
        optimizer.begin_step()
        with pytest.raises(RuntimeError, match=f"^{call}: a step is open"):
            calls[call]()
        optimizer.abort_step()
    calls[call]()


@pytest.mark.parametrize("call", ["resize", "forget", "reset", "averages", "begin_step"])
def test_code_that_a_step_runs_cannot_call_them(call):
    table = ones(4, 2)
    calls = {
        "resize": lambda o: o.resize(table, ones(5, 2)),
        "forget": lambda o: o.forget(table),
        "reset": lambda o: o.reset(),
        "averages": lambda o: o.averages([table]).__enter__(),
        "begin_step": lambda o: o.begin_step(),
    }

    def rate():
        if optimizer.iterations:
            calls[call](optimizer)
        return 0.1

    optimizer = fastadam.Adam(rate, use_ema=True)
    step_by_half(optimizer, table)
    with pytest.raises(RuntimeError, match=f"^{call}: used in code that a step runs"):
        step_by_half(optimizer, table)
    assert optimizer.get_slot(table, "m").shape == (4, 2)


def test_gather_of_the_old_array_is_plain_indexing_and_a_gradient_starts_it_anew():
    optimizer, table = used(**DEFERRED)
    optimizer.resize(table, table.copy())
    np.testing.assert_array_equal(optimizer.gather(table, [0]), table[[0]])
    with pytest.warns(
        UserWarning, match=r"^grads_and_vars\[0\]: resize\(\) gave its moments to another array, which is"
    ):
        optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [0]), table)])
    optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [0]), table)])
    assert len(parts_of(optimizer).state.entries) == 2
