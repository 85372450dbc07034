"""Moving averages: against the formula of Keras 3, and in the place of their variables for an evaluation."""

from __future__ import annotations

import copy
import pickle
import re
import signal
import threading
import time
import warnings

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from helpers import assert_moved

F32 = np.float32
SIZE = 200_003  # enough for several threads


def problem():
    rng = np.random.RandomState(0)
    return random_array(rng, SIZE), [random_array(rng, SIZE) for _ in range(3)]


def pairs(gradient, variable):
    return [(gradient, variable), (gradient[::-1].copy(), variable)]


def flushed(array):
    return np.where(np.abs(array) < np.finfo(F32).tiny, F32(0), array)


@pytest.fixture(scope="module")
def expected():
    """The variable and its average, averaged by hand after every step and written back after the second."""
    value, gradients = problem()
    optimizer, average = fastadam.AdamW(0.1, 0.01), value
    for t, gradient in enumerate(gradients, start=1):
        optimizer.apply_gradients(pairs(gradient, value))
        average = value.copy() if t == 1 else flushed(F32(0.75) * average + F32(0.25) * value)
        if t == 2:
            value[...] = average
    return value, average


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_variable_that_comes_twice_is_averaged_once_on_any_number_of_threads(threads, isa, expected):
    fastadam.set_num_threads(threads)
    value, gradients = problem()
    w = value.copy()
    optimizer = fastadam.AdamW(0.1, 0.01, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=2)
    for gradient in gradients:
        optimizer.apply_gradients(pairs(gradient, w))
    assert_moved(w, value)
    np.testing.assert_array_equal(bits(w), bits(expected[0]))
    np.testing.assert_array_equal(bits(optimizer.get_slot(w, "average")), bits(expected[1]))


# ---- with opt.averages(...) ------------------------------------------------------------------------------------------

KINDS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


def trained(dtype=F32, shapes=((3,), (50, 4), ()), steps=4, wrap=lambda array: array, **options):
    rng = np.random.RandomState(1)
    variables = [wrap(np.asarray(random_array(rng, shape), order="F").astype(dtype)) for shape in shapes]
    optimizer = fastadam.Adam(0.1, use_ema=True, ema_momentum=0.5, **options)
    train(optimizer, variables, range(steps))
    return optimizer, variables


def train(optimizer, variables, steps):
    for step in steps:
        rng = np.random.RandomState(10 + step)
        optimizer.apply_gradients([(random_array(rng, np.shape(w)), w) for w in variables])


def copies(variables):
    return [np.array(w) for w in variables]


def same(actual, expected):
    return all(np.array_equal(bits(np.asarray(a)), bits(np.asarray(e))) for a, e in zip(actual, expected, strict=True))


def rounded(optimizer, variables):
    return [optimizer.get_slot(w, "average").astype(np.asarray(w).dtype) for w in variables]


@pytest.mark.parametrize(
    "wrap", [lambda array: array, lambda array: fastadam.Variable(array, "w")], ids=["array", "Variable"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_in_the_variables_inside_of_the_block_alone(kind, wrap):
    optimizer, variables = trained(KINDS[kind], wrap=wrap)
    before, averages = copies(variables), rounded(optimizer, variables)
    state = optimizer.get_weights()
    with optimizer.averages(variables):
        assert same(variables, averages)
        assert not same(variables, before)
    assert same(variables, before)
    assert same(optimizer.get_weights(), state)


def test_tensors_of_pytorch_are_swapped_in_place():
    torch = pytest.importorskip("torch")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = torch.arange(6, dtype=dtype).reshape(2, 3)
        optimizer = fastadam.Adam(0.5, use_ema=True, ema_momentum=0.5)
        for _ in range(3):
            optimizer.apply_gradients([(torch.ones(2, 3), w)])
        before, address = w.clone(), w.data_ptr()
        average = torch.from_numpy(optimizer.get_slot(w, "average").copy()).to(dtype)
        with optimizer.averages([w]):
            assert torch.equal(w, average)
            assert not torch.equal(w, before)
        assert torch.equal(w, before)
        assert w.data_ptr() == address


def test_training_goes_on_as_without_the_block():
    (mine, variables), (theirs, others) = trained(), trained()
    with mine.averages(variables):
        pass
    for optimizer, arrays in ((mine, variables), (theirs, others)):
        train(optimizer, arrays, range(4, 8))
    assert same(variables, others)
    assert same(mine.get_weights(), theirs.get_weights())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_in_the_block_puts_the_variables_back(error):
    optimizer, variables = trained()
    before = copies(variables)

    def evaluate():
        with optimizer.averages(variables):
            variables[0][...] = 7  # what the block writes is lost
            raise error

    with pytest.raises(error):
        evaluate()
    assert same(variables, before)
    train(optimizer, variables, range(4, 5))  # and the next step is made


def test_part_of_the_variables_and_views_of_one():
    optimizer, variables = trained()
    before, averages = copies(variables), rounded(optimizer, variables)
    with optimizer.averages(iter([variables[1], variables[1].T.T])):
        assert same(variables, [before[0], averages[1], before[2]])
    assert same(variables, before)
    with optimizer.averages([]):
        assert same(variables, before)


def evaluate(optimizer, variables):
    with optimizer.averages(variables):
        pass


def enter(optimizer, variables):
    with optimizer.averages(variables):
        raise AssertionError("the block was entered")


def test_a_block_that_is_refused_changes_nothing():
    optimizer, variables = trained()
    before = copies(variables)
    fixed = variables[1] * 2
    train(optimizer, [fixed], range(1))
    fixed.flags.writeable = False
    for bad, error, message in (
        (np.ones(3, F32), KeyError, "vars[3]: no moving average yet"),
        (fixed, ValueError, "vars[3]: read-only"),
        ("w", TypeError, "vars[3]: str, expected a writable float array"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            enter(optimizer, [*variables, bad])
        assert same(variables, before)
    with pytest.raises(TypeError, match=re.escape("var_list: one ndarray, expected a list")):
        enter(optimizer, variables[0])
    plain = fastadam.Adam()
    plain.build(variables)
    with pytest.raises(KeyError, match="no moving average with use_ema=False"):
        enter(plain, variables)
    assert same(variables, before)


@pytest.mark.parametrize("use", ["averages", "finalize"])
def test_an_average_that_cannot_be_rounded_changes_no_variable(use):
    optimizer, variables = trained(np.float16)
    optimizer.get_slot(variables[2], "average")[...] = 1e6  # beyond float16
    before = copies(variables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="overflow"):
            enter(optimizer, variables) if use == "averages" else optimizer.finalize_variable_values(variables)
    assert same(variables, before)


def test_ctrl_c_while_the_end_of_the_block_waits_for_another_thread():
    optimizer, variables = trained()
    before, lock = copies(variables), optimizer._parts.runtime.lock
    held = threading.Event()

    def hold():
        with lock:
            held.set()
            for _ in range(3):
                time.sleep(0.05)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.05)

    other = threading.Thread(target=hold)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal

    def evaluate_beside():
        with optimizer.averages(variables):
            other.start()
            held.wait()

    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate_beside()
        other.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert same(variables, before)
    train(optimizer, variables, range(4, 5))


def test_a_block_that_is_entered_and_never_left_ends_with_its_last_reference():
    optimizer, variables = trained()
    before = copies(variables)
    block = optimizer.averages(variables)
    block.__enter__()
    assert not same(variables, before)
    del block
    assert same(variables, before)
    train(optimizer, variables, range(4, 5))


def test_a_step_inside_of_the_block_is_refused():
    optimizer, variables = trained()
    before, state = copies(variables), optimizer.get_weights()
    scaled = fastadam.LossScaleOptimizer(optimizer)
    pairs = [(np.ones(np.shape(w), F32), w) for w in variables]
    with scaled.averages(variables):
        for stepped in (optimizer, scaled):
            with pytest.raises(
                RuntimeError, match=r"apply_gradients: inside of `with averages\(\.\.\.\)`, expected after it"
            ):
                stepped.apply_gradients(pairs)
        with pytest.raises(RuntimeError, match="averages: they are in the variables already"):
            enter(optimizer, variables)
        other = copy.deepcopy(optimizer)  # of another optimizer a step is none of its business
        assert other.apply_gradients([(np.ones(np.shape(w), F32), w) for w in copies(variables)]) == 5
        assert pickle.loads(pickle.dumps(optimizer)).iterations == 4
    assert same(variables, before)
    assert same(optimizer.get_weights(), state)
    assert (optimizer.apply_gradients(pairs), scaled.dynamic_scale) == (5, 2.0**15)


WRITES = {
    "apply_gradients": lambda o, variables: o.apply_gradients([(np.ones(np.shape(w), F32), w) for w in variables]),
    "begin_step": lambda o, variables: o.begin_step(),
    "finalize_variable_values": lambda o, variables: o.finalize_variable_values(variables),
    "set_weights": lambda o, variables: o.set_weights([2 * np.asarray(a) for a in o.get_weights()]),
}


@pytest.mark.parametrize("call", WRITES)
@pytest.mark.parametrize("wrap", [lambda o: o, fastadam.LossScaleOptimizer], ids=["Adam", "LossScaleOptimizer"])
def test_a_write_inside_of_the_block_is_refused_and_changes_nothing(wrap, call):
    optimizer, variables = trained()
    wrapped = wrap(optimizer)
    before, state = copies(variables), wrapped.get_weights()
    with wrapped.averages(variables):
        inside = copies(variables)
        with pytest.raises(RuntimeError, match=rf"{call}: inside of `with averages\(\.\.\.\)`, expected after it"):
            WRITES[call](wrapped, variables)
        assert same(variables, inside)
    assert same(variables, before)
    assert same(wrapped.get_weights(), state)


@pytest.mark.parametrize("call", ["averages", "finalize_variable_values"])
@pytest.mark.parametrize("begin", ["new", "built", "stepped"])
@pytest.mark.parametrize("make", [fastadam.Adam, fastadam.AdamW, lambda: fastadam.LossScaleOptimizer(fastadam.AdamW())])
def test_averages_without_use_ema_are_refused_by_name(make, begin, call):
    weight, optimizer = np.ones(3, np.float32), make()
    if begin == "built":
        optimizer.build([weight])
    elif begin == "stepped":
        optimizer.apply_gradients([(np.ones(3, np.float32), weight)])
    before = weight.copy()
    name = "Adam" if make is fastadam.Adam else "AdamW"
    expected = rf"vars\[0\]: no moving average with use_ema=False, expected an optimizer {name}\(\.\.\., use_ema=True\)"
    with pytest.raises(KeyError, match=expected):
        use_averages(optimizer, call, [weight])
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("call", ["averages", "finalize_variable_values"])
def test_averages_of_a_variable_that_has_not_come_are_refused_by_name(call):
    known, other = np.ones(3, np.float32), np.ones(3, np.float32)
    optimizer = fastadam.Adam(use_ema=True)
    optimizer.build([known])
    with pytest.raises(KeyError, match=r"vars\[1\]: no moving average yet, expected it in a step or build\(\) first"):
        use_averages(optimizer, call, [known, other])


def use_averages(optimizer, call, variables):
    if call == "averages":
        optimizer.averages(variables).__enter__()
    else:
        optimizer.finalize_variable_values(variables)
