"""Chains of deltas that are refused: missing, foreign, damaged and forged files, and calls that need a new base."""

from __future__ import annotations

import pickle
import re

import fastadam
import numpy as np
import pytest
from delta_cases import F32, ROWS, Training
from fastadam._core.deferred import history as histories
from fastadam._core.deferred import trail as trails

pytestmark = pytest.mark.filterwarnings("ignore:.*a gradient for rows that wait:UserWarning")


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
    "missing": ("base", ["1", "3"], r"deltas\[1\]: .*3: delta 3 right after delta 1, expected delta 2"),
    "first missing": ("base", ["2"], r"deltas\[0\]: .*2: delta 2 right after the base, expected delta 1"),
    "repeated": ("base", ["1", "1"], r"deltas\[1\]: .*1: delta 1 once more, expected delta 2"),
    "out of order": ("base", ["1", "3", "2"], r"deltas\[1\]: .*3: delta 3 right after delta 1, expected delta 2"),
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
    match = r"save_delta: this optimizer has saved no base and was not loaded from one, nor does a copy .*; expected save\(path"
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
