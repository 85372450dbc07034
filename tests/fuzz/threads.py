"""Threads that use one optimizer at once: what they see, and the state at the end, has to be that of a serial order.

Each case makes an optimizer with random options and lets 8 threads make random calls of it at the same time: steps,
gather, sync, reset, resize, save, get_config, get_weights, set_weights, deepcopy, pickle, assignments. Then it looks for
an order in which one thread, making the same calls of an equal optimizer, gets every result to the bit, every error with
its text, and the same state at the end. Which calls are made follows from the seed; how they interleave does not, so a
case that failed may have to be repeated: `--only N --repeat 1000`.

"core" attacks fastadam.Adam, "torch" fastadam.torch.Adam.

The last line says how many calls were explained, how many of them raised an error that a serial call raises too, and
how many cases had calls that overlapped.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import tempfile
from collections import Counter
from pathlib import Path

import campaign
import fastadam
import numpy as np
from serial_order import Operation, UndecidedError, explain, run_at_once

THREADS, CALLS = 8, 3
BIAS = 4100  # long enough for 8-bit moments
ROWS = {"small": (60, 8), "large": (1000, 32)}
OPTIONS = [
    {},
    {"amsgrad": True, "weight_decay": 0.01},
    {"use_ema": True},
    {"global_clipnorm": 1.0},
    {"gradient_accumulation_steps": 2},
    {"moments": "8bit"},
    {"sparse_update": "lazy"},
    {"sparse_update": "deferred"},
    {"sparse_update": "deferred", "weight_decay": 0.01, "max_staleness": 3},
    {"sparse_update": "deferred", "amsgrad": True, "gradient_accumulation_steps": 2},
]


def bytes_of(arrays):
    return [np.asarray(array).tobytes() for array in arrays]


def slices(shape, seed):
    rng = np.random.RandomState(seed)
    ids = rng.randint(0, shape[0], 20)
    return fastadam.IndexedSlices(rng.standard_normal((20, shape[1])).astype(np.float32), ids)


class World:
    """An optimizer with two variables, three steps old."""

    def __init__(self, options, shape, folder):
        self.shape, self.folder = shape, folder
        self.table, self.bias = np.ones(shape, np.float32), np.ones(BIAS, np.float32)
        self.optimizer = fastadam.Adam(0.1, **options)
        for seed in (1, 2, 3):  # the first gradient of the table is sparse: 8-bit moments are not for it
            self.step(seed)
        self.like = [np.zeros_like(w) for w in self.optimizer.get_weights()]

    def step(self, seed):
        rng = np.random.RandomState(seed)
        dense = rng.standard_normal(BIAS).astype(np.float32)
        first = slices(self.shape, seed) if seed % 4 else rng.standard_normal(self.shape).astype(np.float32)
        pairs = [(first, self.table), (dense, self.bias)]
        return self.optimizer.apply_gradients(pairs if seed % 3 else pairs[:1]).item()

    def state(self):
        weights = bytes_of(self.optimizer.get_weights())
        return [*bytes_of([self.table, self.bias]), *weights, json.dumps(self.optimizer.get_config())]

    def saved(self, *, values):
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "opt"
        self.optimizer.save(path, values=values)
        variables = [np.zeros(self.shape, np.float32), np.zeros(BIAS, np.float32)]
        loaded = fastadam.Adam.load(path, variables)
        return bytes_of([*(variables if values else []), *loaded.get_weights()])

    def set_weights(self, seed):
        rng = np.random.RandomState(seed)
        weights = [np.abs(rng.standard_normal(np.shape(w))).astype(np.asarray(w).dtype) for w in self.like]
        self.optimizer.set_weights([np.int64(seed), *weights[1:]])


def core_operations(rng, options, shape):
    """Random calls of an optimizer of the core.

    A copy of an optimizer whose rows wait goes on with the same variable: only one of the two may move its rows. And
    its rows may keep their places alone: others would have to be moved in the same moment.
    """
    waits = options.get("sparse_update") == "deferred"
    number, ids = rng.randrange(10, 10**6), [rng.randrange(shape[0]) for _ in range(30)]
    order = np.random.RandomState(number).permutation(shape[0]) if not waits else None
    yield from 10 * [Operation("apply_gradients", lambda w: w.step(number))]
    yield Operation("set_weights", lambda w: w.set_weights(number))
    yield Operation("reset", lambda w: w.optimizer.reset(w.table, ids))
    yield Operation("resize", lambda w: w.optimizer.resize(w.table, w.table, rows=order))
    yield Operation("learning_rate =", lambda w: setattr(w.optimizer, "learning_rate", number / 10**7))
    yield Operation("iterations =", lambda w: setattr(w.optimizer, "iterations", number))
    yield Operation("beta_1 =", lambda w: setattr(w.optimizer, "beta_1", number / 10**6))

    def of_copy(twin):
        return [int(twin.iterations), *([] if waits else bytes_of(twin.get_weights()))]

    reads = {
        "get_weights": lambda w: bytes_of(w.optimizer.get_weights()),
        "gather": lambda w: w.optimizer.gather(w.table, ids).tobytes(),
        "sync": lambda w: w.optimizer.sync(),
        "save": lambda w: w.saved(values=False),
        "save(values=True)": lambda w: w.saved(values=True),
        "get_config": lambda w: json.dumps(w.optimizer.get_config()),
        "deepcopy": lambda w: of_copy(copy.deepcopy(w.optimizer)),
        "pickle": lambda w: of_copy(pickle.loads(pickle.dumps(w.optimizer))),
        "iterations": lambda w: int(w.optimizer.iterations),
        "memory": lambda w: str(fastadam.memory(w.optimizer)[0]),
    }
    for name, read in reads.items():
        yield Operation(name, read, changes=False)


def run(arguments, worlds):
    found = Counter()

    def case(_index, rng):
        state = rng.getstate()
        for _ in range(arguments.repeat):
            rng.setstate(state)
            attempt(rng)

    def attempt(rng):
        with tempfile.TemporaryDirectory() as folder:
            new_world, operations = worlds(rng, folder)
            programs = [[rng.choice(list(operations())) for _ in range(CALLS)] for _ in range(THREADS)]
            world = new_world()
            calls = run_at_once(world, programs)
            final = world.state()
            try:
                found["replays"] += explain(calls, new_world, lambda w: w.state(), final)
            except UndecidedError:
                found["undecided"] += 1
                return
            found["calls"] += len(calls)
            found["errors"] += sum(isinstance(call.found, str) and "Error: " in call.found for call in calls)
            ordered = sorted(calls, key=lambda call: call.begun)
            found["overlaps"] += any(a.ended > b.begun for a, b in itertools.pairwise(ordered))

    count = campaign.run_cases(arguments, case)
    print(
        f"threads {arguments.what}: seed {arguments.seed}, {count} cases of {THREADS} threads ({found['overlaps']} with "
        f"calls that overlap), {found['calls']} calls ({found['errors']} raised what a serial call raises); all have "
        f"a serial order, found in {found['replays']} calls, but {found['undecided']} cases with too many orders to try"
    )
    assert found["undecided"] <= max(1, count * arguments.repeat // 20), "too many undecided cases"


def core_worlds(rng, folder):
    options, shape = rng.choice(OPTIONS), rng.choice(list(ROWS.values()))
    return lambda: World(options, shape, folder), lambda: core_operations(rng, options, shape)


TORCH_OPTIONS = [
    {},
    {"amsgrad": True},
    {"global_clipnorm": 1.0},
    {"sparse_update": "lazy"},
    {"sparse_update": "deferred"},
    {"moments": "8bit"},
]


class TorchWorld:
    """An optimizer of PyTorch's, three steps old; the gradients are the same in every step."""

    def __init__(self, options):
        import fastadam.torch
        import torch

        self.torch = torch
        self.table = torch.nn.Parameter(torch.ones(ROWS["small"]))
        self.bias = torch.nn.Parameter(torch.ones(BIAS))
        self.optimizer = fastadam.torch.AdamW([self.table, self.bias], lr=0.1, **options)
        self.bias.grad = torch.linspace(-1, 1, BIAS)
        self.table.grad = torch.ones(ROWS["small"])
        if "sparse_update" in options:
            ids = torch.arange(0, 30, 2)[None]
            self.table.grad = torch.sparse_coo_tensor(ids, torch.ones(15, 8), self.table.shape, check_invariants=True)
        for _ in range(3):
            self.optimizer.step()
        self.saved = copy.deepcopy(self.optimizer.state_dict())

    def load(self, rate):
        saved = copy.deepcopy(self.saved)
        saved["param_groups"][0]["lr"] = rate
        self.optimizer.load_state_dict(saved)

    def state(self):
        self.optimizer.sync()
        states = [self.optimizer.state[param] for param in (self.table, self.bias)]
        tensors = [self.table, self.bias, *(state[name] for state in states for name in sorted(state))]
        return [*(tensor.detach().numpy().tobytes() for tensor in tensors), self.optimizer.param_groups[0]["lr"]]


def torch_operations(rng):
    rate, ids = rng.random(), [rng.randrange(ROWS["small"][0]) for _ in range(20)]
    yield from 6 * [Operation("step", lambda w: w.optimizer.step())]
    yield Operation("load_state_dict", lambda w: w.load(rate))
    yield Operation("reset", lambda w: w.optimizer.reset(w.table, ids))
    yield Operation("telemetry", lambda w: w.optimizer.telemetry(), changes=False)
    yield Operation("gather", lambda w: w.optimizer.gather(w.table, w.torch.tensor(ids)).tolist(), changes=False)
    yield Operation("sync", lambda w: w.optimizer.sync(), changes=False)
    yield Operation("state_dict", lambda w: w.optimizer.state_dict()["param_groups"], changes=False)
    yield Operation("memory", lambda w: str(fastadam.memory(w.optimizer)[0]), changes=False)


def torch_worlds(rng, _folder):
    options = rng.choice(TORCH_OPTIONS)
    return lambda: TorchWorld(options), lambda: torch_operations(rng)


def main():
    worlds = {"core": core_worlds, "torch": torch_worlds}
    parser = campaign.parser(__doc__, count=500, what=list(worlds))
    parser.add_argument("--repeat", type=int, default=1, help="times that each case is tried (default: 1)")
    arguments = parser.parse_args()
    run(arguments, worlds[arguments.what])


if __name__ == "__main__":
    main()
