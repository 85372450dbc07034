"""Processes that begin or end while threads use optimizers: fork, spawn, and the exit of the interpreter.

"fork": threads step, gather, save and copy without end while the main thread forks at random moments. The child must
not hang: it steps and saves every optimizer, and an optimizer of its own has the bits that it should have. Meanwhile
nothing happens to the parent: at the end each of its optimizers has the bits of as many steps on one thread.

"spawn": an optimizer goes to a new process by pickle, and steps there to the bits that it comes to here.

"exit": the interpreter ends at a random moment while daemon threads make some call without end. It must return 0 and
print nothing.

The last line says how many processes there were.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from pathlib import Path

import campaign
import fastadam
import numpy as np
from helpers import run_python
from test_threads import STEPS_OF_A_DAEMON, program_with_daemons

SIZE, ROWS = 50_000, 2000


def slices(k):
    ids = np.random.RandomState(k % 1000).randint(0, ROWS, 50)
    return fastadam.IndexedSlices(np.full((50, 8), k % 7 - 3, np.float32), ids)


class Stepped:
    """An optimizer and its variable; every step is the same for all objects of one kind."""

    def __init__(self, kind):
        self.kind = kind
        self.variable = np.ones((ROWS, 8) if kind == "deferred" else SIZE, np.float32)
        self.optimizer = fastadam.Adam(0.01, sparse_update="deferred" if kind == "deferred" else "dense")
        self.optimizer.build([self.variable])

    def step(self):
        count = int(self.optimizer.iterations)
        if self.kind == "deferred":
            self.optimizer.gather(self.variable, np.arange(100))
            self.optimizer.apply_gradients([(slices(count), self.variable)])
        else:
            self.optimizer.apply_gradients([(np.full(SIZE, count % 7 - 3, np.float32), self.variable)])

    def state(self):
        self.optimizer.sync()
        return [self.variable.tobytes(), *(np.asarray(w).tobytes() for w in self.optimizer.get_weights())]


KINDS = ["dense", "deferred"]
BESIDE = {  # what other threads do with optimizers that step
    "saves": lambda stepped, path: stepped.optimizer.save(path),
    "copies": lambda stepped, path: copy.deepcopy(stepped.optimizer),
    "pickles": lambda stepped, path: pickle.dumps(stepped.optimizer),
}


def in_the_child(all_stepped, folder):
    for k, stepped in enumerate(all_stepped):
        stepped.step()
        path = Path(folder) / f"of the child {k}"
        stepped.optimizer.save(path)
        fastadam.Adam.load(path, [np.zeros_like(stepped.variable)])
    for kind in KINDS:
        one, other = Stepped(kind), Stepped(kind)
        thread = threading.Thread(target=lambda stepped=one: [stepped.step() for _ in range(3)])
        thread.start()
        for _ in range(3):
            other.step()
        thread.join()
        assert one.state() == other.state()


def fork(arguments):
    fastadam.set_num_threads(3)
    stop = threading.Event()
    folder = tempfile.TemporaryDirectory()
    all_stepped = [Stepped(kind) for kind in KINDS]

    def without_end(call):
        while not stop.is_set():
            call()

    calls = [stepped.step for stepped in all_stepped]
    calls += [
        lambda call=call, stepped=stepped, name=name: call(stepped, Path(folder.name) / f"{name} {stepped.kind}")
        for name, call in BESIDE.items()
        for stepped in all_stepped
    ]
    for call in calls:  # what is imported late: a child waits for ever for an import that another thread had begun
        call()
    threads = [threading.Thread(target=without_end, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()

    def case(_index, rng):
        time.sleep(rng.uniform(0, 0.02))
        child = os.fork()
        if not child:
            signal.alarm(60)
            code = 1
            try:
                in_the_child(all_stepped, folder.name)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"the child hangs or failed: status {status}"

    try:
        count = campaign.run_cases(arguments, case)
    finally:
        stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread of the parent hangs"
    steps = []
    for stepped in all_stepped:
        alone = Stepped(stepped.kind)
        while alone.optimizer.iterations < stepped.optimizer.iterations:
            alone.step()
        assert alone.state() == stepped.state(), f"{stepped.kind}: the forks have changed the parent"
        steps.append(int(stepped.optimizer.iterations))
    print(
        f"processes fork: seed {arguments.seed}, {count} forks beside {len(threads)} threads, which made {sum(steps)} steps; all "
        "children worked, and the parent has the bits of one thread"
    )


def step_on(given):
    optimizer, variables, gradients = pickle.loads(given)
    optimizer.build(variables)
    for _ in range(3):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return [np.asarray(w).tobytes() for w in (*variables, *optimizer.get_weights())]


def spawn(arguments):
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=5) as pool:

        def case(_index, rng):
            options = rng.choice([{}, {"amsgrad": True}, {"use_ema": True}, {"clipnorm": 0.1}, {"moments": "8bit"}])
            sizes = [rng.choice([5, 5000, 300_000]) for _ in range(3)]
            variables = [np.linspace(-1, 1, size, dtype=np.float32) for size in sizes]
            gradients = [np.linspace(rng.random(), -1, size, dtype=np.float32) for size in sizes]
            optimizer = fastadam.Adam(0.1, **options)
            for _ in range(rng.randrange(4)):
                optimizer.apply_gradients(zip(gradients, variables, strict=True))
            given = pickle.dumps((optimizer, variables, gradients))
            assert pool.apply(step_on, (given,)) == step_on(given), f"{options}: other bits in a new process"

        count = campaign.run_cases(arguments, case)
    print(
        f"processes spawn: seed {arguments.seed}, {count} optimizers stepped in new processes to the bits of this one"
    )


OTHER_CALLS = {
    "bucketed": "o.build([large]); o.begin_step(early=True); o.step_bucket([(ones, large)]); o.end_step()",
    "copy": "import copy; o.apply_gradients([(ones, large)]); copy.deepcopy(o).get_weights()",
    "save": "import tempfile, os; o.apply_gradients([(ones, large)]); o.save(os.path.join(tempfile.mkdtemp(), 'o'))",
}


def exits(arguments):
    calls = {**STEPS_OF_A_DAEMON, **OTHER_CALLS}

    def case(_index, rng):
        name = rng.choice(list(calls))
        with tempfile.TemporaryDirectory() as folder:
            result = run_python(program_with_daemons(calls[name], rng.uniform(0, 0.05)), exits=True, TMPDIR=folder)
        assert (result.returncode, result.stderr) == (0, ""), f"{name}: {result}"

    count = campaign.run_cases(arguments, case)
    print(f"processes exit: seed {arguments.seed}, {count} interpreters ended while daemon threads worked")


def main():
    campaign.run_one(__doc__, {"fork": fork, "spawn": spawn, "exit": exits}, count=100)


if __name__ == "__main__":
    main()
