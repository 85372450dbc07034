"""Attacks the core from many threads at once: python tests/fuzz/stress_threads.py [--threads 8] [--calls 500] [--seed 0].

Steps of shared optimizers, copies, pickles, readers, settings and deferred tables. Meant for a Python without a GIL, where
the locks of the library alone keep its state whole; with a GIL it runs as well. No step may be lost, and the results of
steps that all threads make alike are compared with those of one thread, to the bit. The closing line has the number of
calls of all threads; any error ends the program with its traceback and status 1.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
import threading
import traceback
from collections.abc import Callable

import fastadam
import numpy as np

F32 = np.float32
Work = Callable[[np.random.Generator], object]  # one call of one thread


def shared_by_variables(threads: int) -> tuple[list[Work], Callable[[int], None]]:
    optimizer, ones = fastadam.Adam(0.1), np.ones(300, F32)
    variables = [np.ones(300, F32) for _ in range(threads)]
    optimizer.build(variables)

    def check(calls: int) -> None:
        assert optimizer.iterations == calls * threads

    return [lambda _, v=v: optimizer.apply_gradients([(ones, v)]) for v in variables], check


def shared_by_all(threads: int) -> tuple[list[Work], Callable[[int], None]]:
    optimizer, ones, variable = fastadam.Adam(0.001), np.ones(300, F32), np.ones(300, F32)

    def check(calls: int) -> None:
        alone, expected = fastadam.Adam(0.001), np.ones(300, F32)
        for _ in range(calls * threads):
            alone.apply_gradients([(ones, expected)])
        assert optimizer.iterations == calls * threads
        assert variable.tobytes() == expected.tobytes()

    return [lambda _: optimizer.apply_gradients([(ones, variable)])] * threads, check


def one_each(threads: int) -> tuple[list[Work], Callable[[int], None]]:
    variables = [np.ones(2000, F32) for _ in range(threads)]
    optimizers = [fastadam.Adam(0.001, global_clipnorm=1.0) for _ in range(threads)]

    def check(calls: int) -> None:
        alone, expected = fastadam.Adam(0.001, global_clipnorm=1.0), np.ones(2000, F32)
        for _ in range(calls):
            alone.apply_gradients([(np.ones(2000, F32), expected)])
        assert {variable.tobytes() for variable in variables} == {expected.tobytes()}
        assert (expected < 1).all()

    return [
        lambda _, o=o, v=v: o.apply_gradients([(np.ones(2000, F32), v)])
        for o, v in zip(optimizers, variables, strict=True)
    ], check


def made_and_copied(threads: int) -> tuple[list[Work], Callable[[int], None]]:
    def work(_: np.random.Generator) -> None:
        optimizer, variable = fastadam.AdamW(0.001, amsgrad=True), np.ones(30, F32)
        optimizer.apply_gradients([(variable.copy(), variable)])
        assert copy.deepcopy(optimizer).get_config() == pickle.loads(pickle.dumps(optimizer)).get_config()

    return [work] * threads, lambda calls: None


def read_beside_steps(threads: int) -> tuple[list[Work], Callable[[int], None]]:
    optimizer, ones, variable = fastadam.Adam(0.001), np.ones(300, F32), np.ones(300, F32)
    optimizer.build([variable])
    kinds: list[Callable[[], object]] = [
        lambda: optimizer.apply_gradients([(ones, variable)]),
        optimizer.get_weights,
        optimizer.get_config,
        lambda: repr(optimizer),
        lambda: setattr(optimizer, "learning_rate", 0.001),
        lambda: optimizer.get_slot(variable, "m").sum(),
        lambda: pickle.dumps(optimizer),
        lambda: fastadam.set_num_threads([1, 2, 3, None][optimizer.iterations % 4]),
    ]
    return [lambda rng: kinds[rng.integers(len(kinds))]()] * threads, lambda calls: None


def one_table(threads: int) -> tuple[list[Work], Callable[[int], None]]:
    optimizer, table = fastadam.Adam(0.001, sparse_update="deferred"), np.ones((5000, 8), F32)
    optimizer.build([table])

    def work(rng: np.random.Generator) -> None:
        ids = rng.integers(0, 5000, 20)
        optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((20, 8), F32), ids), table)])
        optimizer.gather(table, ids)

    def check(calls: int) -> None:
        optimizer.sync()
        assert optimizer.iterations == calls * threads
        untouched = (table == 1).all(axis=1)
        assert ((table < 1).all(axis=1) | untouched).all()
        assert untouched.mean() < 2 * np.exp(-20 * calls * threads / 5000) + 0.01  # drawn with replacement

    return [work] * threads, check


PARTS = [shared_by_variables, shared_by_all, one_each, made_and_copied, read_beside_steps, one_table]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 8), ("calls", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    errors: list[str] = []

    def run(work: Work, seed: list[int], barrier: threading.Barrier) -> None:
        rng = np.random.default_rng(seed)
        barrier.wait()
        try:
            for _ in range(given.calls):
                work(rng)
        except Exception:
            errors.append(traceback.format_exc())

    for number, part in enumerate(PARTS):
        works, check = part(given.threads)
        barrier = threading.Barrier(given.threads)
        seeds = [[given.seed, number, i] for i in range(given.threads)]
        started = [threading.Thread(target=run, args=(w, s, barrier)) for w, s in zip(works, seeds, strict=True)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        if errors:
            print(f"{part.__name__}, seed {given.seed}:", *errors[:3], sep="\n")
            return 1
        check(given.calls)
    gil = "with a GIL" if getattr(sys, "_is_gil_enabled", lambda: True)() else "without a GIL"
    calls = given.threads * given.calls * len(PARTS)
    print(f"{calls} calls of {given.threads} threads {gil}, seed {given.seed}: no step lost, no error")
    return 0


if __name__ == "__main__":
    sys.exit(main())
