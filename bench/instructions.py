"""Counts the instructions of steps with valgrind's callgrind, which are the same on a busy machine.

    python bench/instructions.py NEW [OLD]

NEW and OLD are folders that hold a package `fastadam`; `.ci/instructions` builds both. Prints a table and, given OLD,
fails if a count is more than 5 % above OLD's. "native" is what a step executes in fastadam's libraries, "whole" is all
of it, Python included. One thread, fixed hashes, and the instruction sets that valgrind knows (not AVX-512).
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

LIMIT = 1.05
STEPS = 10  # counted, after WARM others
WARM = 20
SHIM = """
#include <valgrind/callgrind.h>
void mark(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
OWN = re.compile(r"/fastadam/.*\.(so|dylib)$")
Case = Callable[[], Callable[[], object]]


def dense(dtype: str, size: int, options: dict[str, object]) -> Case:
    def make() -> Callable[[], object]:
        import fastadam

        optimizer = fastadam.Adam(0.001, **options)
        pairs = [(np.full(size, 0.5, dtype), np.ones(size, dtype))]
        return lambda: optimizer.apply_gradients(pairs)

    return make


def rows(mode: str) -> Case:
    def make() -> Callable[[], object]:
        import fastadam

        optimizer = fastadam.Adam(0.001, sparse_update=mode)
        table = np.ones((20_000, 32), np.float32)
        ids = np.random.default_rng(0).integers(0, len(table), 500)
        pairs = [(fastadam.IndexedSlices(np.full((500, 32), 0.5, np.float32), ids), table)]
        return lambda: optimizer.apply_gradients(pairs)

    return make


CASES: dict[str, Case] = {
    "float32, 36 elements": dense("float32", 36, {}),
    "float32": dense("float32", 4096, {}),
    "float64": dense("float64", 4096, {}),
    "float16": dense("float16", 4096, {}),
    "amsgrad": dense("float32", 4096, {"amsgrad": True}),
    "average": dense("float32", 4096, {"use_ema": True}),
    "clipnorm": dense("float32", 4096, {"clipnorm": 1.0}),
    "8-bit moments": dense("float32", 4096, {"moments": "8bit"}),
    "500 rows, lazy": rows("lazy"),
    "500 rows, deferred": rows("deferred"),
    "500 rows, deferred_fast": rows("deferred_fast"),
}


def work(package: str, shim: str) -> None:
    """In the process that valgrind runs: every case between two marks."""
    import fastadam

    assert Path(fastadam.__file__).is_relative_to(package), fastadam.__file__
    mark = ctypes.CDLL(
        shim
    ).mark  # names what was counted since the last mark (CALLGRIND_ZERO_STATS leaves some counts)
    gc.disable()
    for isa in fastadam.isas():
        fastadam.set_isa(isa)
        for name, make in CASES.items():
            try:
                step = make()
            except (TypeError, ValueError):  # an option that the older of two commits does not have
                continue
            for _ in range(WARM):
                step()
            label = f"{isa}, {name}".encode()
            mark(b"")
            for _ in range(STEPS):
                step()
            mark(label)


def counts_of(dump: Path) -> tuple[str, tuple[int, int]]:
    """The label of a dump, and the instructions of one step: in fastadam's libraries, and all."""
    text = dump.read_text()
    label = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
    summary = re.search(r"^summary: (\d+)$", text, re.MULTILINE)
    names: dict[str, str] = {}
    whole = native = 0
    is_own = is_call = False
    for line in text.splitlines():
        if line.startswith("ob="):
            key, _, name = line[3:].partition(" ")
            is_own = bool(OWN.search(names.setdefault(key, name)))
        elif line.startswith("cob="):
            key, _, name = line[4:].partition(" ")
            names.setdefault(key, name)
        elif line.startswith("calls="):
            is_call = True  # the next line has the cost of the callee, which counts at its own lines
        elif line[:1].isdigit() or line[:1] in "+-*":
            parts = line.split()
            if not is_call and len(parts) > 1:  # zeros at the end are left out
                cost = int(parts[1])
                whole += cost
                native += cost if is_own else 0
            is_call = False
    if summary and whole != int(summary[1]):
        raise SystemExit(f"{dump.name}: lines of {whole} instructions, expected {summary[1]}")
    return (label[1] if label else ""), (native // STEPS, whole // STEPS)


def count(package: Path) -> dict[str, tuple[int, int]]:
    """(native, whole) of every case, by the instruction set and its name."""
    with tempfile.TemporaryDirectory() as folder:
        source, shim = Path(folder, "shim.c"), Path(folder, "shim.so")
        source.write_text(SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source], check=True)
        settings = {"PYTHONHASHSEED": "0", "PYTHONPATH": str(package), "FASTADAM_NUM_THREADS": "1"}
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
        command = [
            "valgrind", "--tool=callgrind", "--quiet", f"--callgrind-out-file={folder}/out",
            sys.executable, "-B", __file__, "--work", str(package), str(shim),
        ]  # fmt: skip
        done = subprocess.run(command, env=kept | settings, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} returned {done.returncode}:\n{done.stdout}{done.stderr}")
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        found = dict(map(counts_of, dumps))
        found.pop("", None)  # what lies between the cases
        return found


def show(new: dict[str, tuple[int, int]], old: dict[str, tuple[int, int]]) -> list[str]:
    """Print all counts; return a line for each that has risen too much."""
    kinds = ("native", "whole")
    print(f"{'instructions of one step':34}" + "".join(f"{kind:>10}{'old':>10}{'change':>9}" for kind in kinds))
    worse = []
    for case, counts in new.items():
        row = f"{case:34}"
        for kind, now, before in zip(kinds, counts, old.get(case, (0, 0)), strict=True):
            row += f"{now:10}{before or '-':>10}" + (f"{now / before - 1:+9.2%}" if before else f"{'new':>9}")
            if before and now > LIMIT * before:
                worse.append(f"{case}, {kind}: {before} before, {now} now ({now / before - 1:+.2%})")
        print(row)
    return worse


def main() -> int:
    if sys.argv[1] == "--work":
        work(*sys.argv[2:])
        return 0
    packages = [Path(argument).resolve() for argument in sys.argv[1:]]
    found = [count(package) for package in packages]
    worse = show(found[0], found[1] if len(found) > 1 else {})
    print(f"{2 * len(found[0])} counts, {len(worse)} of them more than {LIMIT - 1:.0%} above the old ones")
    print(*worse, sep="\n", end="\n" if worse else "")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
