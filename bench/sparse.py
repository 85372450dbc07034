"""IndexedSlices: a step on 4096 Zipf(1.1) ids of a table, against the floor of a pass over it, torch and TensorFlow.

    python bench/sparse.py [--turns N] [--rows N ...] [--tensorflow PYTHON]
    python bench/sparse.py --crossover      # uniform ids: how many make a pass over the table cheaper

PYTHON: the interpreter of an environment with tensorflow-cpu 2.15.1, if it is to take part. With the default sizes the
results and their plot are written.
"""

from __future__ import annotations

import argparse

from common import RESULTS, Worker, available_memory, take_turns, write_json

MODES = ["dense", "deferred", "deferred_fast", "lazy"]
ROWS = [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000]
TENSORFLOW_ROWS = 3_000_000  # beyond it temporaries do not fit and a step takes seconds
LABELS = {"floor": "3 reads, 3 writes of the table", "torch": "torch SparseAdam", "tensorflow": "TF"}


def contenders(sizes: list[int], tensorflow: str | None) -> list[tuple[str, dict]]:
    """Names, and how to start them."""
    ours = [(mode, {"name": "table_contenders.fastadam", "mode": mode}) for mode in MODES]
    others = [("floor", {"name": "table_contenders.floor"}), ("torch", {"name": "table_contenders.torch"})]
    if tensorflow and sizes[0] <= TENSORFLOW_ROWS:
        others.append(("tensorflow", {"name": "table_contenders.tensorflow", "python": tensorflow}))
    return others + ours


def measure(sizes: list[int], turns: int, entries: list[tuple[str, dict]]) -> dict[str, float]:
    """Median seconds per step. As many contenders take turns as fit in memory."""
    needed = 20 * sizes[0] * sizes[1]  # var, m, v, and what each makes beside them
    at_once = max(1, int(0.9 * available_memory() / needed))
    times: dict[str, float] = {}
    for first in range(0, len(entries), at_once):
        workers = []
        try:
            for name, options in entries[first : first + at_once]:
                workers.append(Worker(sizes=sizes, **options))
                workers[-1].name = name
            times |= take_turns(workers, turns, 0.3)
        finally:
            for worker in workers:
                worker.close()
    return times


def show_crossover(width: int, turns: int) -> None:
    """Times of rows that wait, over those of "dense", whatever the cost model would say of them."""
    for elements in (1 << 20, 3 << 25):  # in cache; 1.2 GB
        rows = elements // width
        for gap in (4, 8, 16, 32, 64, 128, 256):
            options = {"name": "table_contenders.fastadam", "uniform": True, "crossover": 0.0}
            entries = [(mode, {**options, "mode": mode}) for mode in MODES[:3]]
            times = measure([rows, width, rows // gap], turns, entries)
            ratios = "".join(f"{mode:>16}{times[mode] / times['dense']:6.2f}" for mode in MODES[1:3])
            print(f"{rows:>9} x {width}, one row in {gap:>3} drawn:{ratios}", flush=True)


def plot(results: list[dict]) -> None:
    """Time of a step against the rows of the table."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in ("tensorflow", "floor", "dense", "torch", *MODES[1:]):
        points = [(row["rows"], row["seconds"][name] * 1e3) for row in results if name in row["seconds"]]
        if points:
            style = "o-" if name in MODES else "s--"
            axes.loglog(*zip(*points, strict=True), style, label=LABELS.get(name, f'"{name}"'), markersize=4)
    axes.set_xlabel(f"rows of the table (width {results[0]['width']})")
    axes.set_ylabel(f"ms per step ({results[0]['ids']} Zipf(1.1) ids)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "sparse.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ids", type=int, default=4096)
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--tensorflow", metavar="PYTHON")
    arguments = parser.parse_args()
    if arguments.crossover:
        show_crossover(arguments.width, arguments.turns)
        return
    results = []
    for rows in arguments.rows:
        sizes = [rows, arguments.width, arguments.ids]
        times = measure(sizes, arguments.turns, contenders(sizes, arguments.tensorflow))
        results.append({"rows": rows, "width": arguments.width, "ids": arguments.ids, "seconds": times})
        for name, t in times.items():
            print(f"{rows:>10} {name:<18}{t * 1e3:10.3f} ms{t / times['floor']:9.4f} of the floor", flush=True)
    if arguments.rows == ROWS:
        write_json("sparse", results)
        plot(results)


if __name__ == "__main__":
    main()
