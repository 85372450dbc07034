"""Random programs of steps and everything between them, against Adam in NumPy float32: the same bits.

    python tests/fuzz/programs.py --seed 1 --count 2000

A program makes an optimizer with random options and variables, then up to 40 commands: steps with dense gradients and
IndexedSlices, options that change, gather and sync, files, deltas, pickles, deep copies, resize, reset, forget, other
numbers of threads and instruction sets. `adam_in_numpy.py` computes the same and shares nothing with the library.
Variables and slots are compared after every few commands, bit by bit. In the closing line a case is counted by the mode of its table; it begins with "changed" if a program changed
the mode. Norms that are clipped are summed in another order here: that could round a factor differently, once in about
10^7 steps.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import children
import numpy as np
from adam_in_numpy import F32, MODES, Options, Reference, State


class Program:
    def __init__(self, rng, folder, tell):
        import fastadam

        self.fastadam, self.rng, self.folder, self.tell = fastadam, rng, Path(folder), tell
        self.told = []
        self.options = Options(rng)
        rows, width = int(rng.integers(2, 40)), int(rng.choice([1, 2, 3, 5, 17, 130]))
        if rng.random() < 0.1:
            rows, width = (
                int(rng.integers(2049, 4000)),
                int(rng.choice([1, 3])),
            )  # row numbers of two digits for the sort
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
                count = self.rng.integers(0, 8) if self.rng.random() < 0.9 else self.rng.integers(65, 400)
                indices = self.rng.integers(len(w), size=count)
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
            raise children.Finding(f"iterations {self.optimizer.iterations}, expected {self.reference.calls}")

    def same(self, found, expected, what):
        found, expected = np.asarray(found), np.asarray(expected)
        if found.shape != expected.shape or found.dtype != expected.dtype or found.tobytes() != expected.tobytes():
            wrong = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))[:3].tolist()
            raise children.Finding(f"{what} differs, first at {wrong}")


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
    children.run("programs", start, children.arguments(__doc__, 300))
