"""Random programs of everything that changes or copies an optimizer, against a model of a few lines in float64."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import fastadam
import numpy as np
from fastadam._core.parts import parts_of
from hypothesis import example, given
from hypothesis import strategies as st
from test_interrupts import interrupted

VARIABLES = 4
PLACES = st.lists(st.integers(0, VARIABLES - 1), min_size=1, unique=True)
COMMANDS = st.one_of(
    st.tuples(st.just("step"), PLACES, st.integers(-3, 3)),
    st.tuples(st.just("interrupted step"), PLACES, st.integers(0, 120)),
    st.tuples(st.sampled_from(["weights", "restore", "pickle", "deepcopy", "copy apart", "read"])),
    st.tuples(st.just("interrupted weights"), st.integers(0, 60)),
    st.tuples(st.just("iterations"), st.integers(0, 9)),
    st.tuples(st.just("resize"), st.integers(0, VARIABLES - 1)),
)


class Model:
    """Adam in float64: the state of each variable by its place, and the gradients of the present cycle."""

    def __init__(self, per_step):
        self.per_step, self.calls, self.sums = per_step, 0, {}
        self.values = [np.full(n + 1, n + 1.0) for n in range(VARIABLES)]
        self.moments = {}

    def step(self, places, gradient):
        for i in places:
            self.sums[i] = self.sums.get(i, 0.0) + gradient
        self.calls += 1
        if self.calls % self.per_step:
            return
        for i, total in self.sums.items():
            zeros = np.zeros_like(self.values[i])
            m, v = self.moments.get(i, (zeros, zeros))
            self.values[i], m, v, _ = fastadam.reference.adam_step(
                self.values[i], np.full_like(zeros, total / self.per_step), m, v, step=self.calls // self.per_step,
                learning_rate=0.1,
            )  # fmt: skip
            self.moments[i] = m, v
        self.sums = {}

    def set_steps(self, steps):
        self.calls, self.sums = steps * self.per_step, {}

    def forget_zeros(self):
        """A list of weights does not say whether a sum of zero is of gradients."""
        self.sums = {i: total for i, total in self.sums.items() if total}

    def renew(self, place):
        self.values[place] = np.full(place + 1, 1.0)
        self.moments.pop(place, None)
        self.sums.pop(place, None)


class Subject:
    """The optimizer and its variables, as a user has them."""

    def __init__(self, per_step):
        accumulation = None if per_step == 1 else per_step
        self.optimizer = fastadam.Adam(0.1, gradient_accumulation_steps=accumulation)
        self.variables = [np.full(n + 1, n + 1.0) for n in range(VARIABLES)]

    @property
    def met(self):
        """Places of the variables that have slots, in the order in which they came; each has a shape of its own."""
        return [entry.spec.shape[0] - 1 for entry in parts_of(self.optimizer).state.entries]

    def step(self, places, gradient):
        self.optimizer.apply_gradients([(np.full(i + 1, float(gradient)), self.variables[i]) for i in places])

    def restored(self):
        """Built with the sets of variables that came together, as the list of weights has them."""
        optimizer = fastadam.Adam.from_config(self.optimizer.get_config())
        sets, last = [], None
        for entry in parts_of(self.optimizer).state.entries:
            if entry.slots["m"] - 1 != last:
                sets.append([])
            last = entry.slots["m"]
            sets[-1].append(self.variables[entry.spec.shape[0] - 1])
        for variables in sets:
            optimizer.build(variables)
        optimizer.set_weights(self.optimizer.get_weights())
        self.optimizer = optimizer

    def unpickled(self):
        self.optimizer = pickle.loads(pickle.dumps(self.optimizer))
        self.optimizer.build([self.variables[i] for i in self.met])

    def copied(self, *, together):
        if together:
            self.optimizer, self.variables = copy.deepcopy((self.optimizer, self.variables))
            self.optimizer.build([self.variables[i] for i in self.met])
        else:  # it goes on with the same variables
            self.optimizer = copy.deepcopy(self.optimizer)

    def resized(self, place):
        """The variable's memory is freed, and another variable comes in its place."""
        owner = self.variables[place]
        self.variables[place] = np.full(place + 1, 1.0)
        owner.resize(10**5 + place, refcheck=False)


def run(program, per_step):
    model, tested = Model(per_step), Subject(per_step)
    for command, *arguments in program:
        if command == "step":
            model.step(*arguments)
            tested.step(*arguments)
        elif command == "interrupted step":
            places, line = arguments
            before = int(tested.optimizer.weights[0])
            interrupted(lambda p=places: tested.step(p, 2), line)
            if int(tested.optimizer.weights[0]) > before:
                model.step(places, 2)
        elif command == "interrupted weights":
            weights = tested.optimizer.get_weights()
            interrupted(lambda w=weights: tested.optimizer.set_weights(w), arguments[0])
            sums = [total for total in model.sums.values() if not total]
            if sums:  # it may have happened or not
                return
        elif command == "weights":
            tested.optimizer.set_weights(tested.optimizer.get_weights())
            model.forget_zeros()
        elif command == "restore":
            tested.restored()
            model.forget_zeros()
        elif command == "pickle":
            tested.unpickled()
        elif command in ("deepcopy", "copy apart"):
            tested.copied(together=command == "deepcopy")
        elif command == "iterations":
            tested.optimizer.iterations = arguments[0]
            model.set_steps(arguments[0])
        elif command == "resize" and per_step == 1:
            place = arguments[0]
            was_met = place in tested.met
            tested.resized(place)
            model.renew(place)
            if was_met:  # another variable, though it may be at the address that was freed; the program ends with it
                refusal = ""
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a deep copy warns that this variable is new to it
                    try:
                        tested.step([place], 1)
                    except ValueError as error:
                        refusal = str(error)
                assert not refusal or "memory was freed" in refusal
                if refusal:
                    return
                model.step([place], 1)
                np.testing.assert_allclose(tested.variables[place], model.values[place], rtol=1e-12)
                return
        for i, (found, expected) in enumerate(zip(tested.variables, model.values, strict=True)):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14, err_msg=f"{command}: variable {i}")
        assert tested.optimizer.iterations == model.calls // per_step
    tested.optimizer.build([tested.variables[i] for i in tested.met])  # a copy has not met them yet
    for i, (m, v) in model.moments.items():
        np.testing.assert_allclose(tested.optimizer.get_slot(tested.variables[i], "m"), m, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(tested.optimizer.get_slot(tested.variables[i], "v"), v, rtol=1e-12, atol=1e-14)


@given(program=st.lists(COMMANDS, max_size=14), per_step=st.sampled_from([1, 1, 2, 3]))
@example([("step", [3], 1), ("step", [3], 1), ("resize", 3)], 1)
@example([("step", [0, 1], 1), ("step", [0, 1], 1), ("step", [0], 1), ("weights",), ("step", [0], 1)], 2)
@example([("step", [0, 1], 1), ("step", [0, 1], 1), ("step", [0], 1), ("restore",), ("step", [0], 1)], 2)
def test_any_program_ends_as_the_model_does(program, per_step):
    run(program, per_step)


def test_an_accumulating_step_that_is_interrupted_at_any_line_is_made_or_not():
    for line in itertools.count(step=3):
        program = [("step", [0, 1], 1), ("interrupted step", [1, 2], line), ("step", [0], 1), ("step", [2], 1)]
        run(program * 2, 2)
        if line > 150:
            break
