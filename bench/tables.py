"""A table and its moments in files, against the same in memory: what steps on uniform ids make resident and take.

The time is that of a step once every page is resident.

    python bench/tables.py [--turns N] [--rows N] [--ids N] [--mode MODE]

Needs 12 bytes of disk, and 24 of memory, for each element of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import Contender, Worker, take_turns

PLACES = ("memory", "files")


def _arrays(place: str, shape: tuple[int, int]) -> list[np.ndarray]:
    """The table, resident, or table, m and v in files of holes, which have no name any more and go with the process."""
    if place == "memory":
        return [np.ones(shape, np.float32)]
    with contextlib.ExitStack() as names:
        files = [names.enter_context(tempfile.NamedTemporaryFile(dir=".")) for _ in range(3)]
        return [np.memmap(file.name, np.float32, "w+", shape=shape) for file in files]


def _begin(sizes, place, mode):
    import fastadam

    rows, width, count = sizes
    table, *moments = _arrays(place, (rows, width))
    optimizer = fastadam.Adam(0.001, sparse_update=mode)
    if moments:
        optimizer.build([table], slots=[dict(zip("mv", moments, strict=True))])
    rng = np.random.default_rng(0)
    values = rng.standard_normal((count, width), dtype=np.float32)

    def step():
        ids = rng.integers(0, rows, count)
        optimizer.gather(table, ids)
        optimizer.apply_gradients([(fastadam.IndexedSlices(values, ids), table)])

    return optimizer, table, step


def resident(sizes, place, mode):
    """Bytes of anonymous memory and of files that become resident for each row that steps touch for the first time."""

    def now():
        lines = Path("/proc/self/status").read_text().splitlines()
        found = dict(line.split(":") for line in lines if line.startswith(("RssAnon", "RssFile")))
        return np.array([int(found[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")])

    _, _, step = _begin(sizes, place, mode)
    step()
    before = now()
    for _ in range(20):
        step()
    print(place, *((now() - before) / (20 * sizes[2]) / 1024).round(1), file=sys.stderr, flush=True)
    return Contender(lambda: None)


def steady(sizes, place, mode):
    """Steps once every row has been touched, so that every page is resident."""
    import fastadam

    optimizer, table, step = _begin(sizes, place, mode)
    values = np.full((100_000, sizes[1]), 1e-3, np.float32)
    for first in range(0, sizes[0], len(values)):
        ids = np.arange(first, min(first + len(values), sizes[0]))
        optimizer.apply_gradients([(fastadam.IndexedSlices(values[: len(ids)], ids), table)])
    for _ in range(500):
        step()
    return Contender(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ids", type=int, default=512)
    parser.add_argument("--mode", default="deferred")
    arguments = parser.parse_args()
    sizes, mode = [arguments.rows, arguments.width, arguments.ids], arguments.mode
    print("KiB per row touched first: anonymous, of files")
    for place in PLACES:
        Worker("tables.resident", sizes, place=place, mode=mode).close()
    workers = [Worker("tables.steady", sizes, place=place, mode=mode) for place in PLACES]
    for worker, place in zip(workers, PLACES, strict=True):
        worker.name = place
    times = take_turns(workers, arguments.turns, 0.3)
    for worker in workers:
        worker.close()
    for place in PLACES:
        print(f"{place:<10}{times[place] * 1e6:10.1f} us{times[place] / times['memory']:8.2f}", flush=True)


if __name__ == "__main__":
    main()
