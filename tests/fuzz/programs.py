"""Random programs of steps and everything between them, against Adam in NumPy float32: the same bits.

    python tests/fuzz/programs.py --seed 1 --count 2000

A program makes an optimizer with random options and variables, then up to 40 commands: steps with dense gradients and
IndexedSlices, options that change, gather and sync, files, deltas, pickles, deep copies, resize, reset, forget, other
numbers of threads and instruction sets. `Reference` computes the same from the equations, in the order of operations of
TensorFlow's kernels, and shares nothing with the library. Variables and slots are compared after every few commands, bit
by bit. In the closing line a case is counted by the mode of its table; it begins with "changed" if a program changed
the mode. Norms that are clipped are summed in another order here: that could round a factor differently, once in about
10^7 steps.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import campaign
import numpy as np

F32 = np.float32
MODES = ("dense", "deferred", "lazy")


class Options:
    """What the reference needs to know of the optimizer."""

    def __init__(self, rng):
        self.learning_rate, self.beta_1, self.beta_2, self.epsilon = 0.01, 0.9, 0.999, 1e-7
        self.amsgrad = bool(rng.random() < 0.3)
        self.decay = float(rng.choice([0, 0, 0.1]))
        self.weight_decay = rng.choice([None, None, 0.1])
        self.clipvalue = rng.choice([None, None, 0.5])
        self.clipnorm = rng.choice([None, None, 1.0])
        self.global_clipnorm = rng.choice([None, 1.5]) if self.clipnorm is None else None
        self.use_ema = bool(rng.random() < 0.4)
        self.ema_momentum = 0.75
        self.loss_scale_factor = rng.choice([None, None, 64.0])
        self.gradient_accumulation_steps = rng.choice([None, None, 2, 3])
        self.sparse_update = str(rng.choice(MODES))
        overwrites = self.use_ema and self.sparse_update != "lazy" and rng.random() < 0.3
        self.ema_overwrite_frequency = 3 if overwrites else None

    @property
    def per_step(self):
        return self.gradient_accumulation_steps or 1


class State:
    """A variable of the reference: its values, its slots, and what has been accumulated."""

    def __init__(self, value):
        self.value = value.copy()
        self.slots = {}
        self.sum, self.rows = None, None  # rows: which of a lazy cycle's gradients had; None for all

    def slot(self, name, start=None):
        if name not in self.slots:
            self.slots[name] = np.zeros_like(self.value) if start is None else start.copy()
        return self.slots[name]


class Reference:
    def __init__(self, options, variables):
        self.o, self.states, self.calls = options, [State(w) for w in variables], 0

    # ---- a call of apply_gradients ---------------------------------------------------------------------------------

    def apply(self, gradients):
        """Gradients by the place of their variable: an array, or a pair of values and indices."""
        o = self.o
        if o.gradient_accumulation_steps is None:
            self.calls += 1
            self.step(gradients, self.calls, 1 / (o.loss_scale_factor or 1))
            return
        if self.calls % o.per_step == 0:
            for state in self.states:
                state.sum = state.rows = None
        for place, gradient in gradients.items():
            self.add(self.states[place], gradient)
        self.calls += 1
        if self.calls % o.per_step == 0:
            sums = {place: state.sum for place, state in enumerate(self.states) if state.sum is not None}
            self.step(sums, self.calls // o.per_step, 1 / ((o.loss_scale_factor or 1) * o.per_step))
            for state in self.states:
                state.sum = None

    def add(self, state, gradient):
        if state.sum is None:
            state.sum, state.rows = np.zeros_like(state.value), set()
        if isinstance(gradient, tuple):
            values, indices = gradient
            total = np.zeros_like(state.value)
            for row, value in zip(indices, values, strict=True):
                total[row] += value
            state.sum += total
            if state.rows is not None:
                state.rows |= set(indices.tolist())
        else:
            state.sum, state.rows = state.sum + gradient, None

    def step(self, gradients, t, scale):
        o, one = self.o, F32(1)
        factors = self.factors(gradients, scale)
        step, rate = F32(t), F32(o.learning_rate)
        if o.decay > 0:
            rate = rate / (one + F32(o.decay) * F32(t - 1))
        b1, b2 = F32(o.beta_1), F32(o.beta_2)
        root, correction = np.sqrt(one - b2**step), one - b1**step
        keep = one - F32(o.weight_decay or 0) * rate
        numbers = b1, b2, rate * root / correction, rate * (root / correction), keep
        for place, gradient in gradients.items():
            self.update(self.states[place], gradient, F32(factors[place]), numbers, t)

    def clipped(self, values, scale):
        bound = F32(np.inf if self.o.clipvalue is None else self.o.clipvalue / scale)
        return np.clip(values, -bound, bound)

    def factors(self, gradients, scale):
        o, squares = self.o, {}
        for place, gradient in gradients.items():
            values = gradient[0] if isinstance(gradient, tuple) else gradient
            squares[place] = (self.clipped(values, scale).astype(np.float64) ** 2).sum()
        self.scale = scale
        if o.clipnorm is not None:
            bounds = {place: (o.clipnorm, np.sqrt(square) * scale) for place, square in squares.items()}
        else:
            norm = np.sqrt(sum(squares.values())) * scale
            bounds = dict.fromkeys(squares, (np.inf if o.global_clipnorm is None else o.global_clipnorm, norm))
        return {place: (bound / norm if norm > bound else 1.0) * scale for place, (bound, norm) in bounds.items()}

    def update(self, state, gradient, factor, numbers, t):
        o, one = self.o, F32(1)
        b1, b2, alpha, row_alpha, keep = numbers
        m, v = state.slot("m"), state.slot("v")
        vhat = state.slot("vhat") if o.amsgrad else None
        average = state.slot("average", state.value) if o.use_ema else None
        moved = slice(None)  # which rows
        if isinstance(gradient, tuple):
            values, indices = self.clipped(gradient[0], self.scale) * factor, gradient[1]
            g = np.zeros_like(state.value)
            for row, value in zip(indices, values, strict=True):
                g[row] += value
            touched = np.unique(indices)
            if o.sparse_update == "lazy":
                moved = touched
            m[moved] *= b1
            v[moved] *= b2
            m[touched] += g[touched] * (one - b1)
            v[touched] += g[touched] * g[touched] * (one - b2)
            alpha = row_alpha
        else:
            g = self.clipped(gradient, self.scale) * factor
            if o.sparse_update == "lazy" and state.sum is gradient and state.rows is not None:
                moved = np.array(sorted(state.rows), np.int64)
            m[moved] += (g[moved] - m[moved]) * (one - b1)
            v[moved] += (g[moved] * g[moved] - v[moved]) * (one - b2)
        second = v[moved]
        if vhat is not None:
            second = vhat[moved] = np.maximum(vhat[moved], second)
        state.value[moved] = state.value[moved] * keep - m[moved] * alpha / (np.sqrt(second) + F32(o.epsilon))
        if average is not None:
            momentum = F32(o.ema_momentum if t > 1 else 0)
            average[moved] = momentum * average[moved] + (one - momentum) * state.value[moved]
            if o.ema_overwrite_frequency is not None and t % o.ema_overwrite_frequency == 0:
                state.value[...] = average

    # ---- other calls -----------------------------------------------------------------------------------------------

    def resize(self, place, value, rows):
        old, new = self.states[place], State(value)
        for name, slot in old.slots.items():
            fresh = value if name == "average" else np.zeros_like(value)
            new.slots[name] = np.where((rows >= 0)[:, None], slot[rows], fresh).astype(F32)
        if old.sum is not None:
            new.sum = np.where((rows >= 0)[:, None], old.sum[rows], 0).astype(F32)
            new.rows = None if old.rows is None else {i for i, row in enumerate(rows) if row in old.rows}
        self.states[place] = new

    def reset(self, place, rows):
        state = self.states[place]
        at = slice(None) if rows is None else rows
        for name, slot in state.slots.items():
            slot[at] = state.value[at] if name == "average" else 0
        if state.sum is not None:
            state.sum[at] = 0  # it still takes part in the step


class Program:
    def __init__(self, rng, folder, tell):
        import fastadam

        self.fastadam, self.rng, self.folder, self.tell = fastadam, rng, Path(folder), tell
        self.told = []
        self.options = Options(rng)
        rows, width = int(rng.integers(2, 40)), int(rng.choice([1, 2, 3, 5, 17, 130]))
        shapes = [(rows, width), (int(rng.integers(1, 9)),), (2, 3)][: int(rng.integers(1, 4))]
        self.variables = [self.random(shape) for shape in shapes]
        self.reference = Reference(self.options, self.variables)
        given = {
            name: value.item() if isinstance(value, np.generic) else value for name, value in vars(self.options).items()
        }
        self.optimizer = fastadam.Adam(**given)
        self.optimizer.build(self.variables)
        self.note(f"Adam({given}), shapes {shapes}")
        self.base, self.deltas = None, []
        self.order = list(range(len(shapes)))  # of the variables in the optimizer

    @property
    def ordered(self):
        return [self.variables[place] for place in self.order]

    def note(self, text):
        self.told.append(text)
        self.tell("; ".join(self.told))

    def random(self, shape):
        return (self.rng.standard_normal(shape) * F32(2) ** self.rng.integers(-3, 3, shape)).astype(F32)

    def run(self):
        for _ in range(int(self.rng.integers(5, 40))):
            names = [*["step"] * 10, *COMMANDS]
            getattr(self, names[self.rng.integers(len(names))])()
            if self.rng.random() < 0.15:
                self.compare()
        self.compare()

    # ---- commands --------------------------------------------------------------------------------------------------

    def step(self):
        gradients, pairs = {}, []
        for place, w in enumerate(self.variables):
            roll = self.rng.random()
            if place == 0 and roll < 0.7:
                indices = self.rng.integers(len(w), size=self.rng.integers(0, 8))
                gradients[place] = self.random((len(indices), w.shape[1])), indices
                pairs.append((self.fastadam.IndexedSlices(*gradients[place]), w))
            elif roll < 0.85:
                gradients[place] = self.random(w.shape)
                pairs.append((gradients[place], w))
        if not pairs:
            return
        kinds = {place: g[1].tolist() if isinstance(g, tuple) else "dense" for place, g in gradients.items()}
        self.note(f"step {kinds}")
        with np.errstate(all="ignore"):
            self.reference.apply(gradients)
        self.optimizer.apply_gradients(pairs)

    def option(self):
        choices = {
            "learning_rate": [0.01, 0.02, 0.5],
            "beta_1": [0.9, 0.5, 0.0],
            "beta_2": [0.999, 0.9],
            "epsilon": [1e-7, 1e-3],
            "weight_decay": [None, 0.1, 0.5],
            "clipvalue": [None, 0.25],
            "ema_momentum": [0.5, 0.99],
            "amsgrad": [True, False],
        }
        name = list(choices)[self.rng.integers(len(choices))]
        value = choices[name][self.rng.integers(len(choices[name]))]
        self.note(f"{name} = {value}")
        setattr(self.options, name, value)
        setattr(self.optimizer, name, value)

    def mode(self):
        if self.reference.calls % self.options.per_step or self.options.ema_overwrite_frequency:
            return
        self.options.sparse_update = self.optimizer.sparse_update = str(self.rng.choice(MODES))
        self.note(f"sparse_update = {self.options.sparse_update}")

    def gather(self):
        indices = self.rng.integers(len(self.variables[0]), size=3)
        self.note(f"gather {indices.tolist()}")
        self.same(self.optimizer.gather(self.variables[0], indices), self.reference.states[0].value[indices], "gather")

    def sync(self):
        self.note("sync")
        self.optimizer.sync()

    def file(self):
        """The state from a file, the values as they are or from it."""
        values = bool(self.rng.random() < 0.5)
        self.note(f"save and load, values={values}")
        path = self.folder / "file"
        self.optimizer.save(path, values=values)
        if values:
            self.variables = [np.full_like(w, 7) for w in self.variables]
        self.take(self.fastadam.Adam.load(path, self.ordered))

    def save_base(self):
        self.note("save base")
        self.base, self.deltas = self.folder / "base", []
        self.optimizer.save(self.base, values=True)

    def save_delta(self):
        if self.base is None:
            return
        self.note("save_delta")
        self.deltas.append(self.folder / f"delta_{len(self.deltas)}")
        self.optimizer.save_delta(self.deltas[-1])
        if self.rng.random() < 0.4:
            self.note("load the chain")
            self.variables = [np.full_like(w, 7) for w in self.variables]
            self.take(self.fastadam.Adam.load(self.base, self.ordered, deltas=self.deltas))

    def pickle(self):
        self.note("pickle")
        self.optimizer.sync()
        self.take(pickle.loads(pickle.dumps(self.optimizer)))
        self.optimizer.build(self.ordered)

    def deepcopy(self):
        self.note("deepcopy")
        optimizer, self.variables = copy.deepcopy((self.optimizer, self.variables))
        self.take(optimizer)
        self.optimizer.build(self.ordered)

    def take(self, optimizer):
        self.optimizer, self.base = optimizer, None

    def resize(self):
        old = self.variables[0]
        count = int(self.rng.integers(1, len(old) + 5))
        rows = self.rng.integers(-1, len(old), size=count)
        self.note(f"resize {rows.tolist()}")
        new = np.where((rows >= 0)[:, None], old[rows], F32(0.5)).astype(F32)
        value = self.reference.states[0].value
        self.reference.resize(0, np.where((rows >= 0)[:, None], value[rows], F32(0.5)).astype(F32), rows)
        self.optimizer.resize(old, new, rows)
        self.variables[0], self.base = new, None

    def reset(self):
        place = int(self.rng.integers(len(self.variables)))
        rows = self.rng.integers(len(self.variables[0]), size=2) if place == 0 and self.rng.random() < 0.7 else None
        self.note(f"reset {place} {rows}")
        self.reference.reset(place, rows)
        self.optimizer.reset(self.variables[place], rows)
        self.base = None

    def forget(self):
        place = int(self.rng.integers(len(self.variables)))
        self.note(f"forget {place}")
        self.optimizer.forget(self.variables[place])
        self.order.remove(place)
        self.order.append(place)
        self.reference.states[place] = State(self.reference.states[place].value)
        self.optimizer.build(self.variables[place : place + 1])
        self.base = None

    def machine(self):
        threads, isa = int(self.rng.integers(1, 4)), str(self.rng.choice(self.fastadam.isas()))
        self.note(f"{threads} threads, {isa}")
        self.fastadam.set_num_threads(threads)
        self.fastadam.set_isa(isa)

    def iterations(self):
        steps = int(self.rng.integers(0, 9))
        self.note(f"iterations = {steps}")
        self.optimizer.iterations = steps
        self.reference.calls = steps * self.options.per_step
        for state in self.reference.states:
            state.sum = state.rows = None
        self.base = None

    # ---- comparison ------------------------------------------------------------------------------------------------

    def compare(self):
        self.note("compare")
        self.optimizer.sync()
        for place, (w, state) in enumerate(zip(self.variables, self.reference.states, strict=True)):
            self.same(w, state.value, f"variable {place}")
            for name, slot in state.slots.items():
                self.same(self.optimizer.get_slot(w, name), slot, f"{name} of variable {place}")
        if self.optimizer.iterations != self.reference.calls // self.options.per_step:
            raise campaign.Finding(f"iterations {self.optimizer.iterations}, expected {self.reference.calls}")

    def same(self, found, expected, what):
        found, expected = np.asarray(found), np.asarray(expected)
        if found.shape != expected.shape or found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
            wrong = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))[:3].tolist()
            raise campaign.Finding(f"{what} differs, first at {wrong}")


COMMANDS = (
    *("option", "option", "mode", "gather", "gather", "sync", "file", "save_base", "save_delta", "save_delta"),
    *("pickle", "deepcopy", "resize", "reset", "forget", "machine", "iterations"),
)


def start(folder):
    warnings.simplefilter("ignore")
    from fastadam._core.deferred import history

    usual = history.crossover

    def case(rng, tell, number):
        history.crossover = usual if rng.random() < 0.3 else lambda shape, item_size, replays: 64  # or rows hardly wait
        program = Program(rng, folder, tell)
        first = program.options.sparse_update
        program.run()
        return first if program.options.sparse_update == first else "changed"

    return case


if __name__ == "__main__":
    campaign.run("programs", start, campaign.arguments(__doc__, 300))
