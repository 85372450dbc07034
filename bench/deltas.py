"""A delta checkpoint of 1 % of the rows of a table against a full save: seconds and bytes; and what loading both takes.

The full save is of the same optimizer at the same time, with the values, and is timed in turns with the deltas.

    python bench/deltas.py [--turns N] [--rows N] [--ids N] [--mode MODE] [--folder FOLDER]

Needs 12 bytes of memory and 24 of disk for each element of the table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import write_json


def _timed(work, *arguments, **options) -> float:
    begin = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - begin


def measure(folder: Path, rows: int, width: int, ids: int, mode: str, turns: int) -> dict:
    """Every row has had a gradient; then steps on uniform ids touch about 1 % of the rows before each delta."""
    import fastadam

    rng = np.random.default_rng(0)
    table = rng.standard_normal((rows, width), dtype=np.float32)
    optimizer = fastadam.Adam(0.001, sparse_update=mode)
    values = rng.standard_normal((100_000, width), dtype=np.float32)
    for first in range(0, rows, len(values)):
        some = np.arange(first, min(first + len(values), rows))
        optimizer.apply_gradients([(fastadam.IndexedSlices(values[: len(some)], some), table)])
    times: dict[str, list[float]] = {"save": [], "save_delta": []}
    sizes: dict[str, list[int]] = {"save": [], "save_delta": []}
    for _ in range(turns):
        times["save"].append(_timed(optimizer.save, folder / "base", values=True))
        sizes["save"].append((folder / "base").stat().st_size)
        touched = set()
        while len(touched) < rows // 100:
            some = rng.integers(0, rows, ids)
            optimizer.gather(table, some)
            optimizer.apply_gradients([(fastadam.IndexedSlices(values[:ids], some), table)])
            touched.update(some.tolist())
        (folder / "delta").unlink(missing_ok=True)
        times["save_delta"].append(_timed(optimizer.save_delta, folder / "delta"))
        sizes["save_delta"].append((folder / "delta").stat().st_size)
    again = np.zeros_like(table)
    load = _timed(fastadam.Adam.load, folder / "base", [again])
    deltas = _timed(fastadam.Adam.load, folder / "base", [again], deltas=[folder / "delta"])
    optimizer.sync()
    if not np.array_equal(again, table):
        raise RuntimeError("the delta does not give back the table")
    seconds = {name: statistics.median(found) for name, found in times.items()}
    size = {name: statistics.median(found) for name, found in sizes.items()}
    return {
        "rows": rows,
        "width": width,
        "mode": mode,
        "touched": len(touched) / rows,
        "save_s": round(seconds["save"], 4),
        "save_delta_s": round(seconds["save_delta"], 4),
        "time_ratio": round(seconds["save_delta"] / seconds["save"], 5),
        "save_bytes": int(size["save"]),
        "save_delta_bytes": int(size["save_delta"]),
        "size_ratio": round(size["save_delta"] / size["save"], 5),
        "load_s": round(load, 4),
        "load_with_delta_s": round(deltas, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ids", type=int, default=512)
    parser.add_argument("--mode", nargs="+", default=["deferred", "lazy"])
    parser.add_argument("--folder", default=".", help="where the files go, for as long as it runs")
    arguments = parser.parse_args()
    found = []
    for mode in arguments.mode:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            sizes = (arguments.rows, arguments.width, arguments.ids)
            found.append(measure(Path(folder), *sizes, mode, arguments.turns))
        print(found[-1], flush=True)
    write_json("deltas", found)


if __name__ == "__main__":
    main()
