"""Everything that must be refused: a message that names the argument, and nothing changed."""

from __future__ import annotations

import copy
import re

import fastadam
import numpy as np
import pytest

F32 = np.float32


def readonly():
    array = np.ones(5, F32)
    array.flags.writeable = False
    return array


def broadcast():
    array = np.broadcast_to(F32(1), (5,))
    array = np.lib.stride_tricks.as_strided(np.ones(1, F32), (5,), (0,))
    assert array.flags.writeable
    return array


def misaligned():
    return np.frombuffer(bytearray(4 * 5 + 1), np.uint8)[1:].view(F32)


GRADIENT = np.full(5, 0.1, F32)
BAD_VARIABLES = {
    "list": (lambda: [1.0] * 5, TypeError, "vars[2]: list, expected a writable float array"),
    "float": (lambda: 1.0, TypeError, "vars[2]: float, expected a writable float array"),
    "scalar": (lambda: F32(1), TypeError, "vars[2]: float32, expected a writable float array"),
    "none": (lambda: None, TypeError, "vars[2]: NoneType, expected a writable float array"),
    "integer": (lambda: np.ones(5, np.int64), TypeError, "vars[2]: dtype int64, expected float16, bfloat16, float32 or float64"),
    "bool": (lambda: np.ones(5, bool), TypeError, "vars[2]: dtype bool, expected float16"),
    "complex": (lambda: np.ones(5, np.complex64), TypeError, "vars[2]: dtype complex64, expected float16"),
    "object": (lambda: np.ones(5, object), TypeError, "vars[2]: dtype object, expected float16"),
    "longdouble": (lambda: np.ones(5, np.longdouble), TypeError, "vars[2]: dtype "),
    "string": (lambda: np.array(["a"] * 5), TypeError, "vars[2]: dtype <U1, expected float16"),
    "structured": (lambda: np.zeros(5, [("a", F32)]), TypeError, "vars[2]: dtype [('a', '<f4')], expected float16"),
    "read-only": (readonly, ValueError, "vars[2]: read-only, expected a writable array"),
    "strided": (lambda: np.ones(10, F32)[::2], ValueError, "vars[2]: strides (8,) for shape (5,), expected a contiguous array"),
    "reversed": (lambda: np.ones(5, F32)[::-1], ValueError, "vars[2]: strides (-4,) for shape (5,), expected a contiguous"),
    "column": (lambda: np.ones((5, 2), F32)[:, 0], ValueError, "vars[2]: strides (8,) for shape (5,), expected a contiguous"),
    "broadcast": (broadcast, ValueError, "vars[2]: strides (0,) for shape (5,), expected a contiguous array"),
    "byte-swapped": (lambda: np.ones(5, ">f4"), ValueError, "vars[2]: byte-swapped, expected the byte order of this machine"),
    "misaligned": (misaligned, ValueError, "vars[2]: misaligned, expected a multiple of the item size"),
    "masked": (lambda: np.ma.ones(5, F32), TypeError, "vars[2]: masked array, whose mask Adam cannot honour"),
    "wrong shape": (lambda: np.ones(4, F32), ValueError, "grads[2]: shape (5,), expected (4,) like vars[2]"),
    "named, wrong shape": (
        lambda: fastadam.Variable(np.ones(4, F32), name="w"), ValueError, "grads[2]: shape (5,), expected (4,) like variable 'w'"
    ),
}  # fmt: skip
BAD_GRADIENTS = {
    "wrong shape": (lambda w: np.ones(4, F32), ValueError, "grads[2]: shape (4,), expected (5,) like vars[2]"),
    "scalar": (lambda w: 1.0, ValueError, "grads[2]: shape (), expected (5,) like vars[2]"),
    "broadcastable": (lambda w: np.ones((1, 5), F32), ValueError, "grads[2]: shape (1, 5), expected (5,) like vars[2]"),
    "list of wrong length": (lambda w: [1.0] * 4, ValueError, "grads[2]: shape (4,), expected (5,) like vars[2]"),
    "ragged": (lambda w: [[1.0], [1.0, 2.0]], TypeError, "grads[2]: list that is not an array of numbers"),
    "complex": (lambda w: np.ones(5, complex), TypeError, "grads[2]: dtype complex128, expected real numbers"),
    "generator": (lambda w: (x for x in range(5)), TypeError, "grads[2]: generator, expected an array of numbers"),
    "object": (lambda w: np.ones(5, object), TypeError, "grads[2]: dtype object, expected real numbers"),
    "string": (lambda w: np.array(["1"] * 5), TypeError, "grads[2]: dtype <U1, expected real numbers"),
    "bool": (lambda w: np.ones(5, bool), TypeError, "grads[2]: dtype bool, expected real numbers"),
    "masked": (lambda w: np.ma.ones(5, F32), TypeError, "grads[2]: masked array"),
    "the variable itself": (lambda w: w, ValueError, "grads[2]: shares memory with vars[2], which the step writes"),
    "a view of it": (lambda w: w[:], ValueError, "grads[2]: shares memory with vars[2]"),
}


class Snapshot:
    """An optimizer two steps into training, whose whole state is compared later."""

    def __init__(self):
        self.variables = [np.ones(3, F32), np.full((2, 2), 2, F32)]
        self.gradients = [np.full(3, 0.5, F32), np.full((2, 2), 0.25, F32)]
        self.optimizer = fastadam.Adam(0.1, amsgrad=True)
        for _ in range(2):
            self.optimizer.apply_gradients(self.good_pairs())
        self.before = self.state()

    def good_pairs(self):
        return list(zip(self.gradients, self.variables, strict=True))

    def state(self):
        return copy.deepcopy(
            [self.variables, self.gradients, self.optimizer.get_weights(), self.optimizer.get_config()]
        )

    def assert_unchanged(self):
        for before, after in zip(self.before[:3], self.state()[:3], strict=True):
            assert len(before) == len(after)
            for b, a in zip(before, after, strict=True):
                np.testing.assert_array_equal(b, a)
        assert self.before[3] == self.state()[3]


@pytest.fixture
def trained():
    return Snapshot()


@pytest.mark.parametrize("kind", BAD_VARIABLES)
def test_a_bad_variable_at_the_end_of_the_list_changes_nothing(kind, trained):
    make, error, message = BAD_VARIABLES[kind]
    with pytest.raises(error, match=re.escape(message)):
        trained.optimizer.apply_gradients([*trained.good_pairs(), (GRADIENT, make())])
    trained.assert_unchanged()


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_a_bad_gradient_at_the_end_of_the_list_changes_nothing(kind, trained):
    make, error, message = BAD_GRADIENTS[kind]
    new = np.ones(5, F32)
    with pytest.raises(error, match=re.escape(message)):
        trained.optimizer.apply_gradients([*trained.good_pairs(), (make(new), new)])
    np.testing.assert_array_equal(new, np.ones(5, F32))
    trained.assert_unchanged()


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_a_bad_gradient_of_a_known_variable_changes_nothing(kind):
    make, error, message = BAD_GRADIENTS[kind]
    variables = [np.ones(n, F32) for n in (3, 4, 5)]
    gradients = [np.ones(n, F32) for n in (3, 4, 5)]
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    before = copy.deepcopy([*variables, *optimizer.get_weights()])
    with pytest.raises(error, match=re.escape(message)):
        optimizer.apply_gradients(zip([*gradients[:2], make(variables[2])], variables, strict=True))
    for b, a in zip(before, [*variables, *optimizer.get_weights()], strict=True):
        np.testing.assert_array_equal(b, a)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (None, TypeError, "grads_and_vars: NoneType, expected an iterable of (gradient, variable) pairs"),
        (3, TypeError, "grads_and_vars: int, expected an iterable"),
        ([GRADIENT], TypeError, "grads_and_vars[0]: ndarray, expected a (gradient, variable) pair"),
        ([(GRADIENT,)], ValueError, "grads_and_vars[0]: 1 items, expected a (gradient, variable) pair"),
        ([(GRADIENT, np.ones(5, F32), 1)], ValueError, "grads_and_vars[0]: 3 items, expected a (gradient, variable) pair"),
        ("ab", TypeError, "grads_and_vars[0]: str, expected a (gradient, variable) pair"),
    ],
)  # fmt: skip
def test_what_is_not_pairs_changes_nothing(pairs, error, message, trained):
    with pytest.raises(error, match=re.escape(message)):
        trained.optimizer.apply_gradients(pairs)
    trained.assert_unchanged()


def test_partly_overlapping_variables_are_refused(trained):
    shared = np.ones(8, F32)
    with pytest.raises(ValueError, match=re.escape("vars[3]: overlaps vars[2] in memory")):
        trained.optimizer.apply_gradients([*trained.good_pairs(), (GRADIENT, shared[:5]), (GRADIENT, shared[3:])])
    np.testing.assert_array_equal(shared, np.ones(8, F32))
    trained.assert_unchanged()


def test_a_reshaped_view_of_a_known_variable_is_refused(trained):
    with pytest.raises(
        ValueError, match=re.escape("vars[0]: overlaps a variable of this optimizer known as float32 (2, 2)")
    ):
        trained.optimizer.apply_gradients([(np.ones(4, F32), trained.variables[1].reshape(4))])
    trained.assert_unchanged()


def test_a_gradient_that_shares_memory_with_another_variable_is_refused(trained):
    with pytest.raises(ValueError, match=re.escape("grads[0]: shares memory with vars[1], which the step writes")):
        trained.optimizer.apply_gradients(
            [(trained.variables[1].reshape(-1)[:3], trained.variables[0]), (trained.gradients[1], trained.variables[1])]
        )
    trained.assert_unchanged()


def test_a_gradient_that_shares_memory_with_a_slot_is_refused(trained):
    slot = trained.optimizer.get_slot(trained.variables[0], "m")
    with pytest.raises(ValueError, match=re.escape("grads[0]: shares memory with m[0], which the step writes")):
        trained.optimizer.apply_gradients([(slot, trained.variables[0])])
    trained.assert_unchanged()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amsgrad": "False"}, TypeError, "amsgrad: 'False', expected True or False"),
        ({"amsgrad": 1}, TypeError, "amsgrad: 1, expected True or False"),
        ({"name": 5}, TypeError, "name: 5, expected a string"),
        ({"decay": None}, TypeError, "decay: None, expected a number"),
        ({"learning_rate": 10**400}, ValueError, "learning_rate: int beyond every float, expected a finite number"),
        ({"clipvalue": -1.0}, ValueError, "Expected clipvalue >= 0, received: -1.0"),
        ({"global_clipnorm": -1.0}, ValueError, "Expected global_clipnorm >= 0, received: -1.0"),
        ({"decay": -0.1}, ValueError, "Expected decay >= 0, received: -0.1"),
        ({"lr": -0.1}, ValueError, "Expected lr >= 0, received: -0.1"),
        ({"clipvalue": np.nan}, ValueError, "clipvalue: nan, expected a finite number"),
        ({"decay": np.inf}, ValueError, "decay: inf, expected a finite number"),
        ({"learning_rate": np.inf}, ValueError, "learning_rate: inf, expected a finite number"),
        ({"learning_rate": np.nan}, ValueError, "learning_rate: nan, expected a finite number"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate: '0.1', expected a number"),
        ({"learning_rate": None}, TypeError, "learning_rate: None, expected a number"),
        ({"learning_rate": [0.1]}, TypeError, "learning_rate: [0.1], expected a number"),
        ({"learning_rate": True}, TypeError, "learning_rate: True, expected a number"),
        ({"learning_rate": 1j}, TypeError, "learning_rate: complex, expected a number"),
        ({"beta_1": 1.0}, ValueError, "beta_1: 1.0, expected 0 <= beta_1 < 1"),
        ({"beta_2": -0.1}, ValueError, "beta_2: -0.1, expected 0 <= beta_2 < 1"),
        ({"beta_2": np.nan}, ValueError, "beta_2: nan, expected a finite number"),
        ({"epsilon": -1e-7}, ValueError, "Expected epsilon >= 0, received: -1e-07"),
        ({"epsilon": np.inf}, ValueError, "epsilon: inf, expected a finite number"),
        ({"sparse_update": "sometimes"}, ValueError, "sparse_update: 'sometimes', expected one of 'dense', 'lazy'"),
    ],
    ids=str,
)
def test_bad_constructor_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastadam.Adam(**arguments)


@pytest.mark.parametrize("name", ["learning_rate", "lr", "beta_1", "beta_2", "decay", "epsilon", "clipvalue"])
def test_a_bad_value_set_later_is_refused_and_the_old_one_kept(name, trained):
    with pytest.raises(ValueError, match="nan"):
        setattr(trained.optimizer, name, np.nan)
    trained.assert_unchanged()


@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "beta_2", "epsilon", "decay"])
def test_a_callable_that_returns_nonsense_changes_nothing(name, trained):
    setattr(trained.optimizer, name, lambda: np.nan)
    with pytest.raises(ValueError, match="nan"):
        trained.optimizer.apply_gradients(trained.good_pairs())
    setattr(trained.optimizer, name, trained.before[3][name])
    trained.assert_unchanged()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w[:-1], ValueError, "weight list of length 6, but the optimizer was expecting 7 weights"),
        (lambda w: [*w, w[-1]], ValueError, "weight list of length 8, but the optimizer was expecting 7 weights"),
        (lambda w: [], ValueError, "weight list of length 0, but the optimizer was expecting 7 weights"),
        (lambda w: [*w[:-1], np.ones(3, F32)], ValueError,
         "weights[6]: Optimizer weight shape (2, 2) not compatible with provided weight shape (3,)"),
        (lambda w: [w[0], w[1][:1], *w[2:]], ValueError, "weights[1]: Optimizer weight shape (3,) not compatible"),
        (lambda w: [-1, *w[1:]], ValueError, "Expected weights[0] >= 0, received: -1"),
        (lambda w: [7.5, *w[1:]], ValueError, "weights[0]: 7.5, expected a whole number of steps"),
        (lambda w: [*w[:-1], np.full((2, 2), "x")], TypeError, "weights[6]: dtype <U1, expected float32"),
        (lambda w: [*w[:-1], np.zeros((2, 2), "V4")], TypeError, "weights[6]: dtype |V4, expected float32"),
    ],
)  # fmt: skip
def test_bad_weights_are_refused(change, error, message, trained):
    weights = change([w + 1 for w in trained.optimizer.get_weights()])
    with pytest.raises(error, match=re.escape(message)):
        trained.optimizer.set_weights(weights)
    trained.assert_unchanged()


@pytest.mark.parametrize("value", [-1, 2.5, np.nan, "3", None, True, 2**63 - 1, 2**70])
def test_bad_iterations_are_refused(value, trained):
    with pytest.raises((TypeError, ValueError), match="iterations"):
        trained.optimizer.iterations = value
    trained.assert_unchanged()


STEP_ARGUMENTS = {
    "step bool": ({"step": True}, TypeError, "step: True, expected an integer of at least 1"),
    "step zero": ({"step": 0}, ValueError, "step: 0, expected an integer of at least 1"),
    "step negative": ({"step": -3}, ValueError, "step: -3, expected an integer of at least 1"),
    "step float": ({"step": 1.0}, TypeError, "step: 1.0, expected an integer of at least 1"),
    "step huge": ({"step": 2**63}, ValueError, "step: 9223372036854775808, expected"),
    "rate": ({"learning_rate": np.inf}, ValueError, "learning_rate: inf"),
    "clip": ({"clipvalue": -1}, ValueError, "Expected clipvalue >= 0, received: -1"),
    "decay": ({"decay": -1}, ValueError, "Expected decay >= 0, received: -1"),
    "epsilon": ({"epsilon": -1}, ValueError, "Expected epsilon >= 0, received: -1"),
    "factor": ({"grad_factor": np.nan}, ValueError, "grad_factor: nan, expected a finite number"),
    "factors": ({"grad_factor": [1.0, 2.0]}, ValueError, "grad_factor: 2 numbers, expected 1, one for each variable"),
    "m shape": ({"m": np.zeros(4, F32)}, ValueError, "m[0]: shape (4,), expected (5,) like vars[0]"),
    "m dtype": ({"m": np.zeros(5)}, TypeError, "m[0]: float64, expected float32 for float32 vars[0]"),
    "v list": ({"v": [0.0] * 5}, ValueError, "v: 5 arrays, expected 1, one for each variable"),
    "v strided": ({"v": np.zeros(10, F32)[::2]}, ValueError, "v[0]: strides (8,) for shape (5,), expected a contiguous array"),
    "vhat length": ({"vhat": []}, ValueError, "vhat: 0 arrays, expected 1, one for each variable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEP_ARGUMENTS)
def test_adam_step_refuses_bad_arguments(kind):
    change, error, message = STEP_ARGUMENTS[kind]
    arrays = {"vars": np.ones(5, F32), "m": np.zeros(5, F32), "v": np.zeros(5, F32)}
    arguments = {**arrays, "grads": np.ones(5, F32), "step": 1, **change}
    with pytest.raises(error, match=re.escape(message)):
        fastadam.adam_step(**arguments)
    np.testing.assert_array_equal(arrays["vars"], np.ones(5, F32))
    np.testing.assert_array_equal(arrays["m"], np.zeros(5, F32))


def test_adam_step_refuses_state_that_overlaps():
    state = np.zeros(8, F32)
    with pytest.raises(ValueError, match=re.escape("v[0]: overlaps m[0] in memory")):
        fastadam.adam_step(np.ones(5, F32), np.ones(5, F32), state[:5], state[3:], step=1)
    assert not state.any()


def test_adam_step_refuses_one_variable_with_two_states():
    var, gradient = np.ones(5, F32), np.ones(5, F32)
    states = [np.zeros(5, F32) for _ in range(4)]
    with pytest.raises(ValueError, match=re.escape("overlaps")):
        fastadam.adam_step([var, var], [gradient, gradient], states[:2], states[2:], step=1)
    np.testing.assert_array_equal(var, np.ones(5, F32))


def test_a_slot_made_read_only_is_not_written(trained):
    trained.optimizer.weights[-1].flags.writeable = False
    weights = [w + 1 for w in trained.optimizer.get_weights()]
    with pytest.raises(ValueError, match=re.escape("vhat[1]: was made read-only, expected a writable array")):
        trained.optimizer.apply_gradients(trained.good_pairs())
    with pytest.raises(ValueError, match=re.escape("weights[6]: was made read-only, expected a writable array")):
        trained.optimizer.set_weights(weights)
    trained.assert_unchanged()


def test_slots_ask_for_known_names(trained):
    with pytest.raises(KeyError, match="velocity: not a slot of vars"):
        trained.optimizer.get_slot(trained.variables[0], "velocity")
    with pytest.raises(KeyError, match="not a variable of this optimizer"):
        trained.optimizer.get_slot(np.ones(3, F32), "m")
    with pytest.raises(ValueError, match="initializer: 'glorot', expected 'zeros', 'ones', a callable or an array"):
        trained.optimizer.add_slot(trained.variables[0], "extra", "glorot")
    with pytest.raises(ValueError, match=re.escape("initializer: shape (4,), expected (3,)")):
        trained.optimizer.add_slot(trained.variables[0], "extra", np.zeros(4))
    trained.assert_unchanged()


@pytest.mark.parametrize(
    ("arguments", "dtype", "message"),
    [
        ({"beta_1": 1 - 1e-10}, F32, "beta_1: 1.000000 is 1 in float32, expected less"),
        ({"beta_2": 1 - 1e-10}, np.float16, "beta_2: 1.000000 is 1 in float32, expected less"),
        ({"epsilon": 1e-40}, F32, "epsilon: so small that it is flushed to zero in float32, expected at least 1.2e-38"),
        ({"epsilon": 1e-310}, np.float64, "epsilon: so small that it is flushed to zero in float64"),
        ({"epsilon": 1e39}, F32, "epsilon: infinite in float32"),
        ({"learning_rate": 1e39}, F32, "learning_rate: with this decay the step size is not finite in float32"),
        ({"decay": 1e39}, F32, "learning_rate: with this decay the step size is not finite in float32"),
    ],
)
def test_a_number_that_the_dtype_cannot_hold_changes_nothing(arguments, dtype, message):
    w = np.ones(5, dtype)
    optimizer = fastadam.Adam(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.apply_gradients([(np.ones(5, dtype), w)])
    np.testing.assert_array_equal(w, np.ones(5, dtype))
    assert len(optimizer.weights) == 1
    assert optimizer.iterations == 0
    if dtype != np.float64:  # in double the same numbers are good
        fastadam.Adam(**arguments).apply_gradients([(np.ones(5), np.ones(5))])


def test_a_factor_that_float32_cannot_hold_is_refused():
    w = np.ones(5, F32)
    with pytest.raises(ValueError, match=re.escape("grad_factor[0]: infinite in float32, expected a finite number")):
        fastadam.adam_step(w, np.ones(5, F32), np.zeros(5, F32), np.zeros(5, F32), step=1, grad_factor=1e308)
    assert w.tolist() == [1] * 5


def test_memory_that_was_freed_under_the_optimizer_is_not_taken_for_a_variable():
    """`refcheck=False` lets NumPy free memory that others hold."""
    w = np.zeros(1000, F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.ones(1000, F32), w)])
    address = w.ctypes.data
    w.resize(100_000, refcheck=False)
    reused = [x for x in (np.zeros(1000, F32) for _ in range(50)) if x.ctypes.data == address]
    for x in reused:
        with pytest.raises(ValueError, match="lies where a variable of this optimizer was before its memory was freed"):
            optimizer.apply_gradients([(np.ones(1000, F32), x)])


def test_a_gradient_that_frees_its_variable_while_it_is_read_is_refused():
    n = 100_000
    w = np.zeros(n, F32)
    armed = []

    class Freeing:
        def __array__(self, dtype=None, copy=None):
            gradient = np.ones(n, F32)
            if armed:
                w.resize(1, refcheck=False)
            return gradient

    optimizer = fastadam.Adam()
    optimizer.apply_gradients([(Freeing(), w)])
    armed.append(True)
    with pytest.raises(ValueError, match="was given other memory while the step was prepared|shares memory"):
        optimizer.apply_gradients([(Freeing(), w)])
    assert optimizer.iterations == 1


def test_a_step_inside_a_step_is_refused(trained):
    class Stepping:
        def __array__(self, dtype=None, copy=None):
            trained.optimizer.apply_gradients(trained.good_pairs())
            return np.ones(5, F32)

    with pytest.raises(RuntimeError, match="apply_gradients of optimizer Adam was called from within itself"):
        trained.optimizer.apply_gradients([*trained.good_pairs(), (Stepping(), np.ones(5, F32))])
    trained.assert_unchanged()
    trained.optimizer.learning_rate = lambda: trained.optimizer.apply_gradients(trained.good_pairs())
    with pytest.raises(RuntimeError, match="was called from within itself"):
        trained.optimizer.apply_gradients(trained.good_pairs())
    trained.optimizer.learning_rate = 0.1
    trained.assert_unchanged()


def test_iterations_written_through_the_live_array_are_checked_at_the_step(trained):
    for value in (-5, 2**63 - 1):
        trained.optimizer.weights[0][...] = value
        with pytest.raises(ValueError, match="iterations"):
            trained.optimizer.apply_gradients(trained.good_pairs())
    trained.optimizer.weights[0][...] = 2
    trained.assert_unchanged()


def test_build_refuses_what_a_step_would_refuse(trained):
    shared = np.zeros(10, F32)
    with pytest.raises(ValueError, match=re.escape("vars[1]: overlaps vars[0] in memory")):
        trained.optimizer.build([shared[:6], shared[4:]])
    with pytest.raises(TypeError, match="var_list: NoneType, expected a list"):
        trained.optimizer.build(None)
    with pytest.raises(TypeError, match="weights: int, expected a list"):
        trained.optimizer.set_weights(5)
    with pytest.raises(TypeError, match="config: NoneType, expected a dict"):
        fastadam.Adam.from_config(None)
    with pytest.raises(TypeError, match="slot_name: 5, expected a string"):
        trained.optimizer.add_slot(trained.variables[0], 5)
    trained.assert_unchanged()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc", "value: dtype <U3, expected real numbers"),
        ([1 + 2j], "value: dtype complex128, expected real numbers"),
        ([[1], [2, 3]], "value: list that is not an array of numbers"),
        (None, "value: dtype object, expected real numbers"),
    ],
)
def test_variable_refuses_what_is_not_numbers(value, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        fastadam.Variable(value)
    with pytest.raises(TypeError, match="value: dtype complex128, expected real numbers"):
        fastadam.Variable([1.0]).assign([1j])


def test_an_exporter_that_fails_is_named():
    class Broken:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            raise BufferError("not today")

    message = re.escape("vars[0]: Broken that cannot be read as it lies in memory (not today)")
    with pytest.raises(ValueError, match=message):
        fastadam.Adam().apply_gradients([(GRADIENT, Broken())])
