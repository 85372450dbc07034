"""How every benchmark measures: each contender in a process of its own, in turns within one run, medians.

Two OpenMP runtimes in one process disturb each other, and the machine's speed drifts: hence processes and turns.
A contender is a function `module.name(sizes, **options) -> Contender` in this folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BYTES_PER_ELEMENT = 28  # float32 Adam: reads of var, grad, m, v and writes of var, m, v


@dataclass
class Contender:
    """What is timed, and what its result is checked by."""

    step: Callable[[], object]  # one optimizer step, finished when it returns
    read: Callable[[], list[np.ndarray]] | None = None  # the variables; None: nothing to check
    epsilon_hat: bool = False  # TensorFlow's epsilon; else PyTorch's, added after the bias correction
    fixed_step: int | None = None  # the step count of every step; None: from 1
    weight_decay: float = 0.0  # decoupled
    copies: Callable[[], list[np.ndarray]] | None = None  # bfloat16 copies of the variables, if the step writes them


class Worker:
    """A contender in a process of its own, waiting to be told how many steps to time."""

    def __init__(self, name: str, sizes: list[int], python: str = sys.executable, **options) -> None:
        self.name = name
        self.times: list[float] = []
        threads = str(len(os.sched_getaffinity(0)))
        # Huge pages for what PyTorch allocates, as NumPy and fastadam have them.
        settings = {"OMP_NUM_THREADS": threads, "THP_MEM_ALLOC_ENABLE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._process = subprocess.Popen(
            [python, str(HERE / "common.py"), name, json.dumps(sizes), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )
        while (answer := self._process.stdout.readline()) != "ready\n":  # libraries may print before
            if not answer:
                raise RuntimeError(f"{name}: did not start")

    def turn(self, steps: int) -> float:
        """Seconds per step over `steps` steps."""
        print(steps, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name}: died with exit status {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()


def take_turns(
    workers: list[Worker], turns: int, seconds_per_turn: float = 0.1, steps_per_turn: int | None = None
) -> dict[str, float]:
    """Median seconds per step of each worker; `steps_per_turn` is for those that have run long enough before."""
    steps = {}
    for worker in workers:
        if steps_per_turn is None:
            worker.turn(2)
        steps[worker.name] = steps_per_turn or max(1, int(seconds_per_turn / max(worker.turn(3), 1e-7)))
    order = random.Random(0)
    for _ in range(turns):
        for worker in order.sample(workers, len(workers)):
            time.sleep(0.03)  # libgomp's idle threads of the worker before spin for 5 ms and more
            worker.times.append(worker.turn(steps[worker.name]))
    return {worker.name: statistics.median(worker.times) for worker in workers}


def ratio(worker: Worker, other: Worker) -> float:
    """Median over the turns of the quotient of their times, which drifts less than the quotient of medians."""
    return statistics.median(a / b for a, b in zip(worker.times, other.times, strict=True))


def available_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_floor(function: str):
    """A function of bench/floor.cpp, compiled with the widest instruction set that fastadam uses here."""
    import fastadam

    flags = {
        "avx512": ["-mavx512f", "-mprefer-vector-width=512"],
        "avx2": ["-mavx2"],
        "baseline": [],
        "neon": [],
    }[fastadam.isas()[-1]]
    library = Path(tempfile.mkdtemp()) / "floor.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", *flags, "-shared", "-fPIC"]
    subprocess.run([*command, str(HERE / "floor.cpp"), "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))[function]
    found.argtypes = [ctypes.c_void_p]
    return found


def machine_facts() -> dict[str, object]:
    """What a reader needs to judge a figure."""
    import fastadam

    cpu = platform.processor()
    with contextlib.suppress(OSError):
        cpu = next(x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x)
    facts = {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "isa": fastadam.current_isa(),
        "threads": fastadam.get_num_threads(),
        "fastadam": fastadam.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for package in ("numpy", "torch", "deepspeed", "jaxlib", "optax", "bitsandbytes", "torchao"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    return facts


def read_json(name: str) -> list[dict]:
    """The rows that were written last, if any."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write_json(name: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {path.relative_to(HERE.parent)}")


def _reference(w: np.ndarray, g: np.ndarray, contender: Contender, steps: int, amsgrad: bool) -> np.ndarray:
    """Adam in float64: learning rate 1e-3, betas 0.9 and 0.999, epsilon 1e-7."""
    w, g = w.astype(np.float64), g.astype(np.float64)
    m, v, vhat = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for step in range(1, steps + 1):
        t = contender.fixed_step or step
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        vhat = np.maximum(vhat, v) if amsgrad else v
        correction = np.sqrt(1 - 0.999**t)
        epsilon = 1e-7 if contender.epsilon_hat else 1e-7 * correction
        w = w * (1 - 1e-3 * contender.weight_decay)
        w = w - 1e-3 * correction / (1 - 0.9**t) * m / (np.sqrt(vhat) + epsilon)
    return w


def _check(make: Callable[..., Contender], options: dict, sizes: list[int]) -> None:
    """Three steps against float64: within two roundings of the dtype, and a per mille of the way.

    A copy must be the variable as it is after these steps, rounded once to nearest even, to the bit.
    """
    from dense_contenders import buffers, rounded

    known = {"dtype", "amsgrad", "moments", "master", "backend", "ours", "gradients", "clip", "buckets", "telemetry"}
    if not set(options) <= known:  # other ways to clip, decay: the reference has none
        return
    dtype = options.get("dtype", "float32")
    contender = make(sizes, **options)
    if contender.read is None:
        return
    for _ in range(3):
        contender.step()
    variables, gradients = buffers(sizes, dtype)
    gradients = [rounded(g, options.get("gradients", dtype)).astype(np.float64) for g in gradients]
    if clip := options.get("clip"):
        norm = np.sqrt(sum(np.vdot(g, g) for g in gradients))
        gradients = [g * min(1.0, clip / norm) for g in gradients]
    precision = "float32" if options.get("master") == "split" else dtype  # what is read of split masters is float32
    unit = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[precision]
    part = 1e-3 if dtype == "float32" else 0.05  # PyTorch's moments of half parameters are half, too
    # Rounding changes a moment in 8 bits by up to 1/8, in bfloat16 by 1/128: of the way, 0.05 and 0.003 were found.
    way = 3e-3 * {"bfloat16": 0.05, "8bit": 0.3}.get(options.get("moments"), part)
    for found, w, g in zip(contender.read(), variables, gradients, strict=True):
        expected = _reference(w, g, contender, 3, bool(options.get("amsgrad")))
        wrong = np.abs(found.astype(np.float64) - expected) > 2 * unit * np.abs(expected) + way
        if wrong.any():
            raise RuntimeError(f"wrong result: {found[wrong][:3]}, expected {expected[wrong][:3]}")
    for found, w in zip(contender.copies() if contender.copies else [], contender.read(), strict=False):
        wrong = found.view(np.uint16) != rounded(w, "bfloat16").view(np.uint16)
        if wrong.any():
            raise RuntimeError(f"wrong copy: {found[wrong][:3]} of {w[wrong][:3]}")


def _serve(name: str, sizes: list[int], options: dict) -> None:
    """The worker's side: time as many steps as each line of stdin asks for."""
    module, _, function = name.rpartition(".")
    make = getattr(importlib.import_module(module), function)
    if not function.endswith("table") and module != "table_contenders":  # tables have different rules
        _check(make, options, [1000, 37])
        if module == "host_contenders":  # in DRAM the copies may be written in another way than in a cache
            _check(make, options, [2**22 + 5])
        if name == "small_contenders.fastadam":  # smaller tensors keep float32 moments
            _check(make, options, [2**13 + 5])
    step = make(sizes, **options).step
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter()
        for _ in range(count):
            step()
        print((time.perf_counter() - start) / count, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
