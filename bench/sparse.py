"""IndexedSlices: a step on 4096 Zipf(1.1) ids of a table, against the floor of a pass over it, torch and TensorFlow.

    python bench/sparse.py [--turns N] [--rows N ...] [--tensorflow PYTHON]

PYTHON: the interpreter of an environment with tensorflow-cpu 2.15.1, if it is to take part.
"""

from __future__ import annotations

import argparse

from common import Worker, take_turns, write_json

MODES = ["dense", "deferred", "deferred_fast", "lazy"]
ROWS = [100_000, 1_000_000]


def measure(sizes: list[int], turns: int, tensorflow: str | None) -> dict[str, float]:
    """Median seconds per step."""
    workers = [Worker("table_floor", sizes)]
    for mode in MODES:
        workers.append(Worker("table_fastadam", sizes, mode=mode))
        workers[-1].name = mode
    workers.append(Worker("table_torch", sizes))
    if tensorflow:
        workers.append(Worker("table_tensorflow", sizes, python=tensorflow))
    try:
        return take_turns(workers, turns, 0.3)
    finally:
        for worker in workers:
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ids", type=int, default=4096)
    parser.add_argument("--tensorflow", metavar="PYTHON")
    arguments = parser.parse_args()
    results = []
    for rows in arguments.rows:
        times = measure([rows, arguments.width, arguments.ids], arguments.turns, arguments.tensorflow)
        results.append({"rows": rows, "width": arguments.width, "ids": arguments.ids, "seconds": times})
        for name, t in times.items():
            print(
                f"{rows:>10} {name:<18}{t * 1e3:10.3f} ms {t / times['table_floor']:9.4f} times the floor", flush=True
            )
    if arguments.rows == ROWS:
        write_json("sparse", results)


if __name__ == "__main__":
    main()
