"""Files that were cut, changed or made by someone else are refused, with the path and what is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import time
import zlib

import fastadam
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from helpers import assert_same, refuses, rewrite

F32 = np.float32


def test_a_truncated_file_is_refused_at_every_length(small_file):
    path, variables = small_file
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refuses(path, variables)
    path.write_bytes(data + b"\0")
    refuses(path, variables)


def test_a_flipped_byte_is_refused_wherever_it_is(small_file):
    path, variables = small_file
    data = path.read_bytes()
    expected = fastadam.Adam.load(path, variables)
    accepted = []
    for at in range(len(data)):
        for flip in (1, 0x20, 0x80):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            with contextlib.suppress(ValueError):
                accepted.append(fastadam.Adam.load(path, variables))
    for again in accepted:  # such as a space for a tab between JSON values, or for a digit of no tensor
        assert_same(again.get_weights(), expected.get_weights())
        assert again.get_config() == expected.get_config()
    assert len(accepted) < 10


HOSTILE = {
    "array": lambda h: "[]",
    "nested": lambda h: "[" * 100_000,
    "digits": lambda h: '{"version": ' + "9" * 10_000 + "}",
    "nan": lambda h: '{"version": NaN}',
    "empty": lambda h: "{}",
    "newer": lambda h: h.update(version=4),
    "true": lambda h: h.update(version=True),
    "no config": lambda h: h.pop("config"),
    "config list": lambda h: h.update(config=[]),
    "unknown option": lambda h: h["config"].update(foo=1),
    "bad beta": lambda h: h["config"].update(beta_1=2),
    "bad schedule": lambda h: h["config"]["learning_rate"].update(class_name="os.system"),
    "unhashable schedule": lambda h: h["config"]["learning_rate"].update(class_name=[]),
    "schedule argument": lambda h: h["config"]["learning_rate"]["config"].update(foo=1),
    "no variables": lambda h: h.update(variables=[]),
    "variables dict": lambda h: h.update(variables={}),
    "variable number": lambda h: h.update(variables=[1]),
    "shape text": lambda h: h["variables"][0].update(shape="ab"),
    "shape float": lambda h: h["variables"][0].update(shape=[2.0]),
    "shape wrong": lambda h: h["variables"][0].update(shape=[3]),
    "dtype": lambda h: h["variables"][0].update(dtype="float64"),
    "order": lambda h: h["variables"][0].update(order="K"),
    "name": lambda h: h["variables"][0].update(name=3),
    "other name": lambda h: h["variables"][0].update(name="x"),
    "weights empty": lambda h: h.update(weights=[]),
    "weights numbers": lambda h: h.update(weights=[1, 2, 3]),
    "weights twice": lambda h: h["weights"].append(h["weights"][-1]),
    "weights missing": lambda h: h["weights"].pop(),
    "iterations not first": lambda h: h["weights"].reverse(),
    "checksum": lambda h: h["weights"][1].__setitem__(1, 5),
    "slots": lambda h: h.update(slots=5),
    "slots of no variable": lambda h: h.update(slots=[]),
    "slots empty": lambda h: h.update(slots=[[]]),
    "slots text": lambda h: h.update(slots=["mv"]),
    "slots numbers": lambda h: h.update(slots=[[1, 2]]),
    "slots more": lambda h: h.update(slots=[["m", "v", "vhat"]]),
    "slots fewer": lambda h: h.update(slots=[["m"]]),
    "accumulating without accumulator": lambda h: h.update(accumulating=[0]),
    "excluded": lambda h: h.update(excluded={}),
    "excluded number": lambda h: h.update(excluded={"names": [], "variables": [5]}),
    "excluded bool": lambda h: h.update(excluded={"names": [], "variables": [False]}),
    "config empty": lambda h: h.update(config={}),
    **{f"config without {name}": lambda h, name=name: h["config"].pop(name)
       for name in ("learning_rate", "decay", "beta_1", "beta_2", "epsilon", "amsgrad")},
    "excluded pattern": lambda h: h.update(excluded={"names": ["("], "variables": []}),
    "excluded backreference": lambda h: h.update(excluded={"names": [r"(a)\1"], "variables": []}),
    "excluded list": lambda h: h.update(excluded={"names": [["a"]], "variables": []}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused(kind, small_file):
    rewrite(small_file[0], HOSTILE[kind])
    refuses(*small_file)


def with_tensor(name, array, replaces=None):
    def change(header):
        header["weights"] = [item for item in header["weights"] if item[0] != (replaces or name)]
        header["weights"].insert(name == "iterations", [name, zlib.crc32(array.tobytes())])
        header["weights"].sort(key=lambda item: item[0] != "iterations")

    return change, {name: array}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("0/m", np.ones(3, F32), "tensor '0/m' F32 (3,), expected F32 (2,)"),
        ("0/m", np.ones(2), "tensor '0/m' F64 (2,), expected F32 (2,)"),
        ("1/m", np.ones(2, F32), "tensor '1/m', expected '<variable>/<slot>' of 1 variables"),
        ("00/m", np.ones(2, F32), "tensor '00/m', expected"),
        ("-1/m", np.ones(2, F32), "tensor '-1/m', expected"),
        ("\u0661/m", np.ones(2, F32), "expected '<variable>/<slot>'"),
        ("9" * 9999 + "/m", np.ones(2, F32), "expected '<variable>/<slot>'"),
        ("m", np.ones(2, F32), "tensor 'm', expected"),
        ("iterations", np.array(-1), "Expected iterations >= 0, received: -1"),
        ("iterations", np.array([1]), "tensor 'iterations' I64 (1,), expected I64 ()"),
        ("iterations", np.array(1.0), "tensor 'iterations' F64 (), expected I64 ()"),
        ("iterations", np.array(2**63 - 1), "iterations"),
    ],
)
def test_hostile_tensors_are_refused(name, array, message, small_file):
    rewrite(small_file[0], *with_tensor(name, array))
    refuses(*small_file, re.escape(message))


def test_tensors_that_are_not_listed_are_refused(small_file):
    rewrite(small_file[0], lambda h: None, {"0/extra": np.ones(2, F32)})
    refuses(*small_file, "tensors ")


def test_files_of_others_are_refused(small_file):
    path, variables = small_file
    safetensors.numpy.save_file({"w": np.ones(3)}, path)
    refuses(path, variables, "no metadata 'fastadam', expected a file that fastadam saved")
    path.write_bytes(b"\xff" * 100)
    refuses(path, variables, "not a complete safetensors file")
    with pytest.raises(OSError, match=re.escape(str(path.parent))):
        fastadam.Adam.load(path.parent, variables)


def without_tensor(path, name, change=lambda header: None):
    """The file as someone who knows the format would write it without a tensor."""
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["fastadam"])
        arrays = {key: file.get_tensor(key) for key in file.keys() if key != name}  # noqa: SIM118
    header["weights"] = [item for item in header["weights"] if item[0] != name]
    change(header)
    text = json.dumps(header)
    safetensors.numpy.save_file(arrays, path, {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()))})


OPTIONS = {
    "plain": ({}, ("m", "v")),
    "amsgrad": ({"amsgrad": True}, ("m", "v", "vhat")),
    "average": ({"use_ema": True}, ("m", "v", "average")),
    "accumulated": ({"gradient_accumulation_steps": 2}, ("m", "v", "gradient_accumulator")),
}


@pytest.mark.parametrize(
    ("options", "slot"), [(options, slot) for options, slots in OPTIONS.values() for slot in slots], ids=str
)
@pytest.mark.parametrize("i", [0, 1])
def test_a_file_without_some_moments_is_refused(options, slot, i, tmp_path):
    path, variables = tmp_path / "opt", [np.ones(2, F32), np.ones((2, 2), F32)]
    optimizer = fastadam.Adam(0.1, **options)
    for _ in range(3):
        optimizer.apply_gradients([(np.ones(w.shape, F32), w) for w in variables])
    optimizer.save(path)
    assert_same(fastadam.Adam.load(path, variables).get_weights(), optimizer.get_weights())
    without_tensor(path, f"{i}/{slot}")
    refuses(path, variables, re.escape(f"no tensor '{i}/{slot}', expected every slot of each variable"))


@pytest.mark.parametrize(
    ("options", "slot"),
    [(options, slot) for options, slots in OPTIONS.values() for slot in slots if slot not in ("vhat", "average")],
    ids=str,
)
@pytest.mark.parametrize("i", [0, 1])
def test_a_file_that_hides_that_a_moment_is_missing_is_refused(options, slot, i, tmp_path):
    """Without the tensor, and without every mention of it: "m" alone would go on with a "v" of zero."""
    path, variables = tmp_path / "opt", [np.ones(2, F32), np.ones((2, 2), F32)]
    optimizer = fastadam.Adam(0.1, **options)
    for _ in range(3):
        optimizer.apply_gradients([(np.ones(w.shape, F32), w) for w in variables])
    optimizer.save(path)

    def hide(header):
        header["slots"][i].remove(slot)
        header["accumulating"] = [at for at in header["accumulating"] if at != i]

    without_tensor(path, f"{i}/{slot}", hide)
    refuses(path, variables, re.escape(f"no tensor '{i}/{slot}', expected it beside the slots ["))


@pytest.mark.parametrize("option", ["amsgrad", "use_ema"])
def test_a_file_that_hides_both_moments_is_refused(option, tmp_path):
    path, w = tmp_path / "opt", np.ones(2, F32)
    optimizer = fastadam.Adam(0.1, **{option: True})
    optimizer.apply_gradients([(np.ones(2, F32), w)])
    optimizer.save(path)
    without_tensor(path, "0/m", lambda header: header["slots"][0].remove("m"))
    without_tensor(path, "0/v", lambda header: header["slots"][0].remove("v"))
    refuses(path, [w], "no tensor '0/m', expected it beside the slots")


def test_a_file_that_does_not_say_what_was_accumulated_is_refused(tmp_path):
    path, w = tmp_path / "opt", np.ones(2, F32)
    optimizer = fastadam.Adam(0.1, gradient_accumulation_steps=3)
    optimizer.apply_gradients([(np.ones(2, F32), w)])
    optimizer.save(path)
    rewrite(path, lambda header: header.pop("accumulating"))
    refuses(path, [w], "'accumulating' None, expected indices of variables")


@pytest.mark.parametrize(
    "rows",
    [
        [0, 2],
        [-1, 0],
        [1, 0],
        [0, 0],
        [2**63 - 1, -(2**63)],
        np.array([0, 1], np.int32),
        np.array([[0], [1]]),
        np.array([0.0, 1.0]),
        np.array(1),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["lazy", "deferred"])
@pytest.mark.parametrize("values", [False, True])
def test_rows_of_a_cycle_that_make_no_sense_are_refused(values, mode, rows, tmp_path):
    path, w = tmp_path / "opt", np.ones((2, 2), F32)
    optimizer = fastadam.Adam(0.1, sparse_update=mode, gradient_accumulation_steps=3)
    optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((2, 2), F32), [0, 1]), w)])
    optimizer.save(path, values=values)
    fastadam.Adam.load(path, [w])
    rewrite(path, *with_tensor("accumulated_rows/0", np.array(rows)))
    refuses(path, [w], "accumulated_rows/0")


def test_rows_of_a_cycle_of_no_variable_are_refused(small_file):
    rewrite(small_file[0], *with_tensor("accumulated_rows/0", np.array([0])))
    refuses(*small_file, "tensor 'accumulated_rows/0', expected rows of variables whose gradients are accumulated")


@pytest.mark.parametrize(
    ("options", "added"),
    [({}, ["m"]), ({}, ["v", "mine"]), ({"gradient_accumulation_steps": 2}, ["m", "v"])],
)
def test_moments_that_no_file_could_tell_from_damage_are_not_saved(options, added, tmp_path):
    optimizer, w = fastadam.Adam(0.1, **options), fastadam.Variable(np.ones(2, F32), "w")
    for name in added:
        optimizer.add_slot(w, name, "ones")
    with pytest.raises(
        ValueError, match=r"variables\[0\] float32 \(2,\) named 'w': slots .* without .* build\(\) makes"
    ):
        optimizer.save(tmp_path / "opt")
    assert list(tmp_path.iterdir()) == []
    optimizer.build([w])
    optimizer.save(tmp_path / "opt")
    assert_same(fastadam.Adam.load(tmp_path / "opt", [w]).get_weights(), optimizer.get_weights())


@pytest.mark.parametrize("slot", ["m", "v"])
def test_a_file_of_version_0_1_without_some_moments_is_refused(slot, small_file):
    path, variables = small_file
    without_tensor(path, f"0/{slot}", lambda header: header.pop("slots"))
    refuses(path, variables, re.escape(f"no tensor '0/{slot}', expected every slot of each variable"))


def test_slots_that_no_step_has_made_yet_can_be_saved(tmp_path):
    """A slot of the user's own, and moments that he set himself: what is missing starts anew there, too."""
    w, u = np.ones(2, F32), np.ones(3, F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.ones(2, F32), w)])
    optimizer.add_slot(u, "mine", "ones")
    optimizer.amsgrad = True
    optimizer.save(tmp_path / "opt")
    again = fastadam.Adam.load(tmp_path / "opt", others := [w.copy(), u.copy()])
    for made, pair in ((optimizer, (w, u)), (again, others)):
        made.apply_gradients([(np.ones(x.shape, F32), x) for x in pair])
    assert_same(again.get_weights(), optimizer.get_weights())
    assert_same(others, [w, u])


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(.*a){25}$", "(a*)*b", "((a?){30}a{30})$", "(?=(a+)+$)b"])
def test_a_stored_pattern_cannot_hang_a_step(pattern, tmp_path):
    w = fastadam.Variable(np.ones(2, F32), "a" * 200 + "!")
    optimizer = fastadam.AdamW(0.1)
    optimizer.apply_gradients([(np.ones(2, F32), w)])
    optimizer.save(tmp_path / "opt")
    rewrite(tmp_path / "opt", lambda h: h.update(excluded={"names": [pattern, "!$"], "variables": []}))
    start = time.perf_counter()
    again = fastadam.AdamW.load(tmp_path / "opt", [w])
    again.apply_gradients([(np.ones(2, F32), w)])
    assert time.perf_counter() - start < 5  # with backtracking none of them ends in a lifetime


def test_a_file_of_adamw_without_its_weight_decay_is_refused(tmp_path):
    w = np.ones(2, F32)
    optimizer = fastadam.AdamW(weight_decay=0.5)
    optimizer.apply_gradients([(np.ones(2, F32), w)])
    optimizer.save(tmp_path / "opt")
    rewrite(tmp_path / "opt", lambda header: header["config"].pop("weight_decay"))
    with pytest.raises(ValueError, match=re.escape("'config' without ['weight_decay'], expected every hyperparameter")):
        fastadam.AdamW.load(tmp_path / "opt", [w])


def test_a_file_that_is_replaced_while_it_is_opened_is_loaded_whole(tmp_path, monkeypatch):
    """It is opened twice, once by safetensors: header and tensors must be of one file."""
    for name, value in (("old", 1.0), ("new", 2.0)):
        w = np.full((2, 3), value, F32)
        optimizer = fastadam.Adam(0.1)
        optimizer.apply_gradients([(w.copy(), w)])
        optimizer.save(tmp_path / name, values=True)
    expected = optimizer.get_weights()
    real, replaced = safetensors.safe_open, []

    def replace_and_open(*arguments, **named):
        if not replaced:
            replaced.append((tmp_path / "new").replace(tmp_path / "old"))
        return real(*arguments, **named)

    monkeypatch.setattr(safetensors, "safe_open", replace_and_open)
    w = np.zeros((2, 3), F32)
    assert_same(fastadam.Adam.load(tmp_path / "old", [w]).get_weights(), expected)
    assert replaced


@pytest.mark.parametrize("call", ["save", "load"])
def test_a_name_that_no_file_can_have(call):
    optimizer, w = fastadam.Adam(0.1), np.ones(2, F32)
    optimizer.build([w])
    calls = {"save": lambda name: optimizer.save(name), "load": lambda name: fastadam.Adam.load(name, [w])}
    with pytest.raises(ValueError, match=r"^path: '\\ud800', expected characters that the name of a file can have"):
        calls[call]("\ud800")


def test_a_file_that_cannot_be_read_is_named():
    """Linux calls it an ordinary file, which cannot be read at its beginning; elsewhere there is none."""
    with pytest.raises(OSError, match="/proc/self/mem") as error:
        fastadam.Adam.load("/proc/self/mem", [])
    assert error.value.filename == "/proc/self/mem"
