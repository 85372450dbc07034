"""An optimizer that is copied, pickled or saved goes on to the bit; what cannot be restored is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path

import fastadam
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from cases import bits, random_array

DATA = Path(__file__).parent / "data"

F32 = np.float32
SHAPES = ((3,), (2, 2), (), (4, 3))
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "schedule": {"learning_rate": fastadam.schedules.CosineDecay(0.1, 7, warmup_target=0.2, warmup_steps=2)},
    "clipped": {"clipvalue": 0.2, "clipnorm": 0.3, "decay": 0.01},
}
DTYPES = ["float16", "float32", "float64"]


def make_variables(order="C", dtype=F32, shapes=SHAPES):
    rng = np.random.RandomState(0)
    return [np.asarray(random_array(rng, shape, dtype=dtype), order=order) for shape in shapes]


def gradients_of(step, variables):
    rng = np.random.RandomState(step)
    return [random_array(rng, w.shape, dtype=w.dtype) for w in variables]


def train(optimizer, variables, steps):
    for step in steps:
        optimizer.apply_gradients(zip(gradients_of(step, variables), variables, strict=True))


def trained(options=None, order="C", dtype=F32, shapes=SHAPES):
    optimizer = fastadam.Adam(**{"learning_rate": 0.1, **(options or {})})
    variables = make_variables(order, dtype, shapes)
    train(optimizer, variables, range(3))
    return optimizer, variables


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        np.testing.assert_array_equal(bits(a), bits(e))


def assert_goes_on_alike(optimizer, variables, again, others):
    assert_same(again.get_weights(), optimizer.get_weights())
    train(optimizer, variables, range(3, 6))
    train(again, others, range(3, 6))
    assert_same(others, variables)
    assert_same(again.get_weights(), optimizer.get_weights())
    assert again.get_config() == optimizer.get_config()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_pickled_optimizer_goes_on_to_the_bit(options, order, dtype):
    optimizer, variables = trained(options, order, dtype)
    again, others = pickle.loads(pickle.dumps((optimizer, variables)))
    assert_goes_on_alike(optimizer, variables, again, others)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_deep_copy_with_its_variables_goes_on_to_the_bit(options, order):
    optimizer, variables = trained(options, order)
    again, others = copy.deepcopy((optimizer, variables))
    assert not any(np.shares_memory(a, b) for a in again.weights for b in optimizer.weights)
    assert_goes_on_alike(optimizer, variables, again, others)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_goes_on_with_the_same_variables_in_any_order(copied):
    shapes = ((4,), (4,), (4,))
    optimizer, variables = trained(shapes=shapes)
    before = [w.copy() for w in variables]
    again = copied(optimizer)
    assert_same([again.get_slot(w, "m") for w in variables], [optimizer.get_slot(w, "m") for w in variables])
    gradients = gradients_of(3, variables)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    after = [w.copy() for w in variables]
    for w, b in zip(variables, before, strict=True):
        w[...] = b
    again.apply_gradients(list(zip(gradients, variables, strict=True))[::-1])
    assert_same(variables, after)
    assert_same(again.get_weights(), optimizer.get_weights())


def test_a_copy_is_independent():
    optimizer, variables = trained()
    again = copy.deepcopy(optimizer)
    before = again.get_weights()
    train(optimizer, variables, range(3, 5))
    optimizer.learning_rate = 0.5
    assert_same(again.get_weights(), before)
    assert again.learning_rate == 0.1
    assert again.iterations == 3


def test_a_fresh_optimizer_can_be_copied_and_pickled():
    for again in (copy.deepcopy(fastadam.Adam(0.1)), pickle.loads(pickle.dumps(fastadam.Adam(0.1)))):
        variables, expected = make_variables(), make_variables()
        train(again, variables, range(2))
        train(fastadam.Adam(0.1), expected, range(2))
        assert_same(variables, expected)


@pytest.mark.parametrize("again_and_again", [1, 3])
def test_the_order_of_weights_is_kept_when_variables_came_in_two_calls(again_and_again):
    optimizer = fastadam.Adam(0.1, amsgrad=True)
    variables = make_variables()
    train(optimizer, variables[:2], range(2))
    optimizer.add_slot(variables[0], "extra", "ones")
    train(optimizer, variables, range(2, 3))
    again, others = optimizer, variables
    for _ in range(again_and_again):
        again, others = pickle.loads(pickle.dumps((again, others)))
    assert again.get_slot_names() == ["m", "v", "vhat", "extra"]
    assert [w.shape for w in again.weights] == [w.shape for w in optimizer.weights]
    assert_goes_on_alike(optimizer, variables, again, others)


def test_restored_weights_can_be_set_before_the_variables_come():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    other, _ = trained({"learning_rate": 0.3})
    again.set_weights(other.get_weights())
    again.build(make_variables())
    assert_same(again.get_weights(), other.get_weights())
    del variables


def test_variables_may_come_back_in_several_calls_and_new_ones_after_them():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    others = [w.copy() for w in variables]
    again.build(others[:1])
    again.build(others[1:3])
    new = np.ones(7, F32)
    again.build([others[3], new])
    assert_same(again.get_weights()[:9], optimizer.get_weights())
    assert_same([again.get_slot(w, "v") for w in others], [optimizer.get_slot(w, "v") for w in variables])
    assert not again.get_slot(new, "m").any()


def test_a_slot_can_be_added_to_a_restored_variable():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.add_slot(variables[0], "m", "ones").tolist() == optimizer.get_slot(variables[0], "m").tolist()
    again.add_slot(variables[1], "extra")
    assert len(again.weights) == len(optimizer.weights) + 1
    assert again.get_slot(variables[1], "m").shape == (2, 2)


def test_the_layout_of_the_slots_follows_the_variable():
    optimizer, variables = trained(order="F")
    again = pickle.loads(pickle.dumps(optimizer))
    others = [np.array(w, order="C") for w in variables]
    assert_goes_on_alike(optimizer, variables, again, others)
    assert again.get_slot(others[3], "m").flags.c_contiguous


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ([np.ones(3, F32)], "vars[0]: float32 (3,), expected float32 (2, 2) named 'a': the state restored for variable 0 waits for it"),
        ([np.ones((2, 2))], "vars[0]: float64 (2, 2), expected float32 (2, 2) named 'a': the state restored for variable 0"),
        ([fastadam.Variable(np.ones((2, 2), F32), "b")], "variable 'b': float32 (2, 2), expected float32 (2, 2) named 'a': the"),
        ([np.ones((2, 2), F32), np.ones(4, F32)], "vars[1]: float32 (4,), expected float32 (3,): the state restored for variable 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", ["build", "apply_gradients"])
def test_a_variable_unlike_the_one_that_was_saved_is_refused(variables, message, call):
    optimizer = fastadam.Adam(0.1)
    named = fastadam.Variable(np.full((2, 2), 2, F32), name="a")
    optimizer.apply_gradients([(np.ones((2, 2), F32), named), (np.ones(3, F32), np.ones(3, F32))])
    again = pickle.loads(pickle.dumps(optimizer))
    before = [np.array(w) for w in variables]
    argument = variables if call == "build" else [(np.ones(w.shape, F32), w) for w in variables]
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(again, call)(argument)
    assert_same([np.array(w) for w in variables], before)
    again.build([fastadam.Variable(np.ones((2, 2), F32), "a"), np.ones(3, F32)])  # nothing was adopted
    assert_same(again.get_weights(), optimizer.get_weights())


def test_a_slot_of_a_variable_unlike_the_one_that_was_saved_is_refused():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    with pytest.raises(ValueError, match=re.escape("vars[0]: float32 (2, 2), expected float32 (3,): the state")):
        again.add_slot(variables[1], "m")
    assert_same(again.get_weights(), optimizer.get_weights())


def test_exclusions_by_memory_are_not_copied_to_other_memory():
    optimizer, variables = trained({"weight_decay": 0.1})
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    again, others = pickle.loads(pickle.dumps((optimizer, variables)))
    assert_goes_on_alike(optimizer, variables, again, others)
    optimizer.exclude_from_weight_decay([variables[0]])
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="exclude_from_weight_decay: var_list names variables by their memory"):
            copied(optimizer)


def test_a_refused_step_adopts_nothing():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    wrong = [*gradients_of(3, variables)[:-1], np.ones(5, F32)]
    with pytest.raises(ValueError, match=re.escape("grads[3]: shape (5,)")):
        again.apply_gradients(zip(wrong, [w.copy() for w in variables], strict=True))
    assert_goes_on_alike(optimizer, variables, again, [w.copy() for w in variables])


def test_code_that_adds_slots_while_a_step_is_prepared_is_noticed():
    optimizer, w = fastadam.Adam(0.1), np.ones(3, F32)

    class Gradient:
        def __array__(self, dtype=None, copy=None):
            optimizer.build([w])
            return np.ones(3, F32)

    with pytest.raises(RuntimeError, match="the optimizer's slots were changed"):
        optimizer.apply_gradients([(Gradient(), w)])
    assert len(optimizer.weights) == 3
    assert (w == 1).all()

    def initializer(shape, dtype):
        optimizer.add_slot(w, "extra")
        return np.ones(shape, dtype)

    with pytest.raises(RuntimeError, match="the optimizer's slots were changed"):
        optimizer.add_slot(w, "extra", initializer)
    assert len(optimizer.weights) == 4


def test_a_pickle_with_buffers_outside_of_it_is_writable_again():
    optimizer, variables = trained()
    outside = []
    data = pickle.dumps(optimizer, protocol=5, buffer_callback=outside.append)
    again = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in outside])
    assert_goes_on_alike(optimizer, variables, again, [w.copy() for w in variables])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_goes_on_in_another_process(protocol, tmp_path):
    optimizer, variables = trained({"amsgrad": True}, order="F")
    (tmp_path / "in").write_bytes(pickle.dumps((optimizer, variables, gradients_of(3, variables)), protocol))
    program = (
        "import pickle, sys; from pathlib import Path; where = Path(sys.argv[1])\n"
        "optimizer, variables, gradients = pickle.loads((where / 'in').read_bytes())\n"
        "optimizer.apply_gradients(zip(gradients, variables, strict=True))\n"
        "(where / 'out').write_bytes(pickle.dumps((optimizer, variables)))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    train(optimizer, variables, [3])
    again, others = pickle.loads((tmp_path / "out").read_bytes())
    assert_same(others, variables)
    assert_goes_on_alike(optimizer, variables, again, others)


# ---- files ---------------------------------------------------------------------------------------------------------


def saved(path, options=None, **kwargs):
    optimizer, variables = trained(options, **kwargs)
    optimizer.save(path)
    return optimizer, variables


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


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
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


class Halving(fastadam.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.5**step

    def get_config(self):
        return {}


def test_a_schedule_of_the_user_is_restored_by_custom_objects(tmp_path):
    optimizer, variables = saved(tmp_path / "opt", {"learning_rate": Halving()})
    with pytest.raises(ValueError, match="opt: config that Adam refuses .*Unknown decay: Halving"):
        fastadam.Adam.load(tmp_path / "opt", variables)
    others = [w.copy() for w in variables]
    again = fastadam.Adam.load(tmp_path / "opt", others, {"Halving": Halving})
    assert_goes_on_alike(optimizer, variables, again, others)


def refuses(path, variables, message="", cls=fastadam.Adam):
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        cls.load(path, variables)


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
    refuses(path, [w[:3], w[:3]], "of which two are one")
    refuses(path, [w[:3], w[2:5]], "overlaps")


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "opt"
    optimizer = fastadam.Adam(fastadam.schedules.ExponentialDecay(0.1, 10, 0.5))
    w = fastadam.Variable(np.ones(2, F32), "w")
    optimizer.apply_gradients([(np.ones(2, F32), w)])
    optimizer.save(path)
    return path, [w]


def test_a_truncated_file_is_refused_at_every_length(small):
    path, variables = small
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refuses(path, variables)
    path.write_bytes(data + b"\0")
    refuses(path, variables)


def test_a_flipped_byte_is_refused_wherever_it_is(small):
    path, variables = small
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


def rewrite(path, change, tensors=None, checksum=True):
    """The file with a header changed by someone who knows the format."""
    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["fastadam"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    text = change(header)
    text = text if isinstance(text, str) else json.dumps(header)
    metadata = {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()) if checksum else 0)}
    safetensors.numpy.save_file({**arrays, **(tensors or {})}, path, metadata)


HOSTILE = {
    "array": lambda h: "[]",
    "nested": lambda h: "[" * 100_000,
    "digits": lambda h: '{"version": ' + "9" * 10_000 + "}",
    "nan": lambda h: '{"version": NaN}',
    "empty": lambda h: "{}",
    "newer": lambda h: h.update(version=2),
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
    "excluded": lambda h: h.update(excluded={}),
    "excluded number": lambda h: h.update(excluded={"names": [], "variables": [5]}),
    "excluded pattern": lambda h: h.update(excluded={"names": ["("], "variables": []}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused(kind, small):
    rewrite(small[0], HOSTILE[kind])
    refuses(*small)


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
def test_hostile_tensors_are_refused(name, array, message, small):
    rewrite(small[0], *with_tensor(name, array))
    refuses(*small, re.escape(message))


def test_tensors_that_are_not_listed_are_refused(small):
    rewrite(small[0], lambda h: None, {"0/extra": np.ones(2, F32)})
    refuses(*small, "tensors ")


def test_files_of_others_are_refused(small):
    path, variables = small
    safetensors.numpy.save_file({"w": np.ones(3)}, path)
    refuses(path, variables, "no metadata 'fastadam', expected a file that fastadam saved")
    path.write_bytes(b"\xff" * 100)
    refuses(path, variables, "not a whole safetensors file")
    with pytest.raises(OSError, match=re.escape(str(path.parent))):
        fastadam.Adam.load(path.parent, variables)


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


# ---- failures while saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(name, tmp_path, monkeypatch):
    optimizer, variables = saved(tmp_path / "opt")
    before = (tmp_path / "opt").read_bytes()
    train(optimizer, variables, range(3, 4))

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match="No space left"):
            optimizer.save(tmp_path / "opt")
    assert [p.name for p in tmp_path.iterdir()] == ["opt"]
    assert (tmp_path / "opt").read_bytes() == before
    assert optimizer.iterations == 4
    optimizer.save(tmp_path / "opt")
    assert fastadam.Adam.load(tmp_path / "opt", variables).iterations == 4


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    optimizer, variables = trained({"learning_rate": Halving()})
    Halving.get_config, original = (lambda self: {"x": object()}), Halving.get_config
    try:
        with pytest.raises(ValueError, match="get_config of Adam: not plain JSON"):
            optimizer.save(tmp_path / "opt")
    finally:
        Halving.get_config = original
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="none"):
        optimizer.save(tmp_path / "none" / "opt")
    del variables


def test_without_safetensors_the_error_names_the_extra(tmp_path, monkeypatch):
    _, variables = saved(tmp_path / "opt")
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'fastadam[save]'")):
        fastadam.Adam.load(tmp_path / "opt", variables)


FULL_DISK = """
import resource, sys
import fastadam, numpy as np
path, w = sys.argv[1], np.ones(5000, np.float32)
optimizer = fastadam.Adam(0.1)
optimizer.apply_gradients([(w, np.zeros(5000, np.float32))])
optimizer.save(path)
optimizer.iterations = 2
for limit in (0, 1, 100, 4096, 20000, 40000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        optimizer.save(path)
    except OSError as error:
        assert path in str(error), error
    else:
        raise SystemExit(f"saved within {limit} bytes")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "opt")], check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["opt"]
    assert fastadam.Adam.load(tmp_path / "opt", [np.zeros(5000, F32)]).iterations == 1


KILLED = """
import os, random, signal, sys, time, warnings
import fastadam, numpy as np, safetensors.numpy
warnings.simplefilter("ignore")
path, size = sys.argv[1], 20000
w = np.zeros(size, np.float32)
optimizer = fastadam.Adam(0.1)
optimizer.build([w])
optimizer.save(path)
random.seed(0)
reached = set()
for attempt in range(100):
    child = os.fork()
    if not child:
        for count in range(10**9):
            optimizer.set_weights([count, np.full(size, count), np.full(size, count)])
            optimizer.save(path)
    time.sleep(random.uniform(0, 0.001 * attempt))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    count, m, v = fastadam.Adam.load(path, [w]).get_weights()
    assert (m == count).all() and (v == count).all(), count
    reached.add(int(count))
assert len(reached) > 2, reached
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "opt")], check=True)
    assert all(p.name == "opt" or p.name.startswith(".fastadam-") for p in tmp_path.iterdir())
