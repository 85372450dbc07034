"""A GPU: how near to its bandwidth, against torch fused and a CuPy kernel, on one array, on lists, and on tables.

    python bench/on_gpu.py [--turns N]  # needs a GPU, CuPy and a CUDA build of torch; writes bench/results/on_gpu.json

Bytes over time, by events of the device, against a device-to-device copy in the same run: 28 bytes per element of a
float32 step, 2 of a byte copied. Contenders take turns in one process; `host`: how long a call holds the caller.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from common import BYTES_PER_ELEMENT, write_json
from models import gpt2, llama, resnet50

LISTS = {"one array of 2^28": [2**28], "ResNet-50": resnet50(), "GPT-2 124M": gpt2(), "Llama-like": llama()}
RATE = 1e-3
Step = Callable[[], object]


def arrays(sizes: list[int]):
    import cupy

    return [[cupy.random.standard_normal(size, dtype=cupy.float32) for size in sizes] for _ in range(2)]


def ours(sizes: list[int]) -> Step:
    import fastadam

    variables, gradients = arrays(sizes)
    optimizer = fastadam.Adam(RATE)
    pairs = list(zip(gradients, variables, strict=True))
    return lambda: optimizer.apply_gradients(pairs)


def parameters(sizes: list[int]):
    import torch

    found = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in sizes]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter)
    return found


def torch_fused(sizes: list[int]) -> Step:
    import torch

    return torch.optim.Adam(parameters(sizes), lr=RATE, fused=True).step


def fastadam_torch(sizes: list[int]) -> Step:
    import fastadam.torch

    return fastadam.torch.Adam(parameters(sizes), lr=RATE, fused=True).step


def cupy_kernel(sizes: list[int]) -> Step:
    import cupy

    kernel = cupy.ElementwiseKernel(
        "float32 g, float32 alpha",
        "float32 w, float32 m, float32 v",
        "m += (g - m) * 0.1f; v += (g * g - v) * 0.001f; w -= m * alpha / (sqrtf(v) + 1e-7f)",
        "adam",
    )
    variables, gradients = arrays(sizes)
    state = [(cupy.zeros_like(w), cupy.zeros_like(w)) for w in variables]

    def step() -> None:
        for w, g, (m, v) in zip(variables, gradients, state, strict=True):
            kernel(g, cupy.float32(RATE), w, m, v)

    return step


def table(mode: str, rows: int, width: int, ids: int) -> Step:
    import cupy
    import fastadam

    variable = cupy.random.standard_normal((rows, width), dtype=cupy.float32)
    optimizer = fastadam.Adam(RATE, sparse_update=mode)
    batches = [
        fastadam.IndexedSlices(
            cupy.random.standard_normal((ids, width), dtype=cupy.float32), cupy.random.randint(0, rows, ids)
        )
        for _ in range(50)
    ]
    state = {"step": 0}

    def step() -> None:
        state["step"] += 1
        optimizer.apply_gradients([(batches[state["step"] % len(batches)], variable)])

    return step


def copy_seconds(size: int, turns: int) -> float:
    """Seconds per byte moved of a copy between two arrays on the device."""
    import cupy

    a, b = (cupy.empty(size, cupy.float32) for _ in range(2))
    times = take_turns({"copy": lambda: cupy.copyto(b, a)}, turns)
    return times["copy"][0] / (8 * size)


def take_turns(steps: dict[str, Step], turns: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a step on the device, and for which it holds the caller."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    for step in steps.values():
        for _ in range(3):
            step()
    stream.synchronize()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            started = time.perf_counter()
            begin.record(stream)
            for _ in range(10):
                step()
            end.record(stream)
            held = (time.perf_counter() - started) / 10
            end.synchronize()
            found[name].append((cupy.cuda.get_elapsed_time(begin, end) / 1e4, held))
    return {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11)
    arguments = parser.parse_args()
    import cupy
    import torch

    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    rows: list[dict] = [{"device": device, "torch": torch.__version__, "cupy": cupy.__version__}]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        per_byte = copy_seconds(2**29, arguments.turns)
        print(f"{device}: a copy moves {1e-12 / per_byte:.2f} TB/s")
        for name, sizes in LISTS.items():
            steps = {
                "fastadam": ours(sizes),
                "fastadam.torch": fastadam_torch(sizes),
                "torch fused": torch_fused(sizes),
                "CuPy kernel": cupy_kernel(sizes),
            }
            floor = sum(sizes) * BYTES_PER_ELEMENT * per_byte
            rows.append({"list": name, **report(name, take_turns(steps, arguments.turns), floor)})
            steps.clear()
            cupy.get_default_memory_pool().free_all_blocks()
            torch.cuda.empty_cache()
        size, width, ids = 10_000_000, 64, 65536
        for mode in ("dense", "deferred", "deferred_fast", "lazy"):
            name = f"{size} x {width}, {ids} ids, {mode}"
            floor = 24 * size * width * per_byte  # a pass over the table
            rows.append({"table": mode, **report(name, take_turns({mode: table(mode, size, width, ids)}, 5), floor)})
            cupy.get_default_memory_pool().free_all_blocks()
    write_json("on_gpu", rows)


def report(name: str, times: dict[str, tuple[float, float]], floor: float) -> dict[str, object]:
    for contender, (seconds, held) in times.items():
        print(f"{name:>40} {contender:>20} {seconds * 1e6:>10.1f} us, {floor / seconds:.2f} of the copy's bandwidth,"
              f" host {held * 1e6:.0f} us", flush=True)  # fmt: skip
    return {"seconds": times, "of the copy's bandwidth": {name: floor / s for name, (s, _) in times.items()}}


if __name__ == "__main__":
    main()
