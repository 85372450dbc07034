"""How every benchmark measures: each contender in a process of its own, in turns within one run, medians.

Two OpenMP runtimes in one process disturb each other, and the machine's speed drifts: hence processes and turns.
A contender is a function `name(sizes, **options) -> step` in bench/contenders.py; `step()` makes one optimizer step.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BYTES_PER_ELEMENT = 28  # float32 Adam: reads of var, grad, m, v and writes of var, m, v


class Worker:
    """A contender in a process of its own, waiting to be told how many steps to time."""

    def __init__(self, name: str, sizes: list[int], python: str = sys.executable, **options) -> None:
        self.name = name
        self.times: list[float] = []
        self._process = subprocess.Popen(
            [python, str(HERE / "contenders.py"), name, json.dumps(sizes), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._answer() != "ready":
            raise RuntimeError(f"{name}: did not start")

    def _answer(self) -> str:
        return self._process.stdout.readline().strip()

    def turn(self, steps: int) -> float:
        """Seconds per step over `steps` steps."""
        print(steps, file=self._process.stdin, flush=True)
        answer = self._answer()
        if not answer:
            raise RuntimeError(f"{self.name}: died with exit status {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()


def take_turns(workers: list[Worker], turns: int, seconds_per_turn: float = 0.1) -> dict[str, float]:
    """Median seconds per step of each worker."""
    steps = {}
    for worker in workers:
        worker.turn(2)
        steps[worker.name] = max(1, int(seconds_per_turn / max(worker.turn(3), 1e-7)))
    for _ in range(turns):
        for worker in workers:
            time.sleep(0.03)  # libgomp's idle threads of the worker before spin for 5 ms and more
            worker.times.append(worker.turn(steps[worker.name]))
    return {worker.name: statistics.median(worker.times) for worker in workers}


def compare(names: list[str], sizes: list[int], turns: int, **options) -> dict[str, float]:
    """Median seconds per step of the contenders on one list of tensors."""
    workers = [Worker(name, sizes, **options) for name in names]
    try:
        return take_turns(workers, turns)
    finally:
        for worker in workers:
            worker.close()


def serve(step) -> None:
    """The worker's side: time as many steps as each line of stdin asks for."""
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter()
        for _ in range(count):
            step()
        print((time.perf_counter() - start) / count, flush=True)


def load_floor(function: str = "traffic_floor", pointers: int = 4):
    """A function of bench/floor.cpp, compiled with the widest instruction set that fastadam uses here."""
    import fastadam

    flags = {"avx512": ["-mavx512f", "-mprefer-vector-width=512"], "avx2": ["-mavx2"]}.get(fastadam.isas()[-1], [])
    library = Path(tempfile.mkdtemp()) / "floor.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-O3", "-std=c++17", "-fopenmp", *flags, "-shared", "-fPIC"]
    subprocess.run([*command, str(HERE / "floor.cpp"), "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))[function]
    found.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64]
    return found


def machine_facts() -> dict[str, object]:
    """What a reader needs to judge a figure."""
    import fastadam
    import numpy as np

    cpu = platform.processor()
    with contextlib.suppress(OSError):
        cpu = next(x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x)
    facts = {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "isa": fastadam.info.current_isa(),
        "threads": fastadam.info.num_threads(),
        "fastadam": fastadam.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    with contextlib.suppress(ImportError):
        import torch

        facts["torch"] = torch.__version__
    return facts


def write_json(name: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")
