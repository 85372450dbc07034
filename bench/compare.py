"""fastadam beside every peer that is installed, and the traffic floor: arrays, lists of tensors, options.

    python bench/compare.py [--turns N] [--tensorflow PYTHON] [--only WORD ...]

Each contender's result is checked against float64 before it is timed. Times are ratios to the floor of the same run.
bench/results/compare.json has the last figures of every case, and the plots are made of them.

PYTHON: the interpreter of an environment with tensorflow-cpu 2.15.1, if it is to take part.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from common import BYTES_PER_ELEMENT, RESULTS, Worker, available_memory, ratio, read_json, take_turns, write_json
from models import gpt2, resnet50

PEERS = {  # contender: the package that it needs
    "torch": "torch",
    "torch_kernel": "torch",
    "deepspeed": "deepspeed",
    "optax": "optax",
    "bitsandbytes": "bitsandbytes",
    "tensorflow": None,
    "numpy": "numpy",
}
SIZES = [36, 1024, 2**15, 2**18, 2**21, 2**25, 2**27]
ARRAYS = [f"{size} float32" for size in SIZES]
IN_CACHE = 2**18
LARGE = 2**21  # from here on without the contenders that take seconds
SLOW = ("numpy", "bitsandbytes", "tensorflow")


@dataclass
class Case:
    """One list of tensors, and who steps it with which options."""

    name: str
    sizes: list[int]
    contenders: list[str] = field(default_factory=lambda: ["fastadam", "fastadam_kernel", *PEERS])
    options: dict[str, Any] = field(default_factory=dict)  # of all
    ours: dict[str, dict[str, Any]] = field(default_factory=dict)  # further runs of fastadam by name
    item_bytes: int = BYTES_PER_ELEMENT


def cases() -> Iterator[Case]:
    for name, size in zip(ARRAYS, SIZES, strict=True):
        case = Case(name, [size])
        if size <= IN_CACHE:
            case.contenders.insert(0, "divider")
        yield case if size <= LARGE else Case(case.name, [size], [n for n in case.contenders if n not in SLOW])
    yield Case("1000 x 64", [64] * 1000)
    yield Case("ResNet-50", resnet50())
    yield Case("GPT-2 124M", gpt2(), [name for name in ("fastadam", "fastadam_kernel", *PEERS) if name not in SLOW])
    clips = {name: {name: 1.0} for name in ("clipvalue", "clipnorm", "global_clipnorm")}
    decays = {"weight_decay": {"weight_decay": 0.01}}
    yield Case("2**25 with options", [2**25], ["fastadam"], ours=clips | decays)
    for size in (2**18, 2**25):
        yield Case(f"{size} one thread", [size], ["fastadam"], ours={"one thread": {"threads": 1}})
    yield Case("2**25 amsgrad", [2**25], ["fastadam", "torch"], {"amsgrad": True}, item_bytes=36)
    for dtype in ("float16", "bfloat16"):
        for size in (2**18, 2**25):
            yield Case(f"{size} {dtype}", [size], ["fastadam", "torch", "deepspeed"], {"dtype": dtype}, item_bytes=22)


def start(case: Case, name: str, tensorflow: str | None) -> Worker | None:
    """A worker, or None if the peer is not installed or cannot do this."""
    options = case.options | case.ours.get(name, {})
    module = "fastadam" if name in case.ours else name
    if module == "tensorflow":
        options |= {"python": tensorflow}
    try:
        worker = Worker(f"dense_contenders.{module}", case.sizes, **options)
    except RuntimeError as error:
        print(f"{case.name}: {error}")
        return None
    worker.name = name
    return worker


def installed(name: str, tensorflow: str | None) -> bool:
    """Whether a contender can take part."""
    if name == "tensorflow":
        return tensorflow is not None
    return name not in PEERS or importlib.util.find_spec(PEERS[name]) is not None


def measure(case: Case, turns: int, tensorflow: str | None) -> dict[str, Any]:
    """Seconds per step, and times the floor. As many contenders take turns with the floor as fit in memory."""
    names = [name for name in [*case.contenders, *case.ours] if installed(name, tensorflow)]
    at_once = max(1, int(0.8 * available_memory() / (24 * sum(case.sizes))) - 1)
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for first in range(0, len(names), at_once):
        started = (start(case, name, tensorflow) for name in ["floor", *names[first : first + at_once]])
        workers = [worker for worker in started if worker is not None]
        try:
            times = take_turns(workers, turns)
            ratios |= {worker.name: ratio(worker, workers[0]) for worker in workers}
            seconds = times | seconds
        finally:
            for worker in workers:
                worker.close()
    elements = sum(case.sizes)
    rates = {name: elements * case.item_bytes / t / 1e9 for name, t in seconds.items()}
    facts = {"tensors": len(case.sizes), "elements": elements, "bytes per element": case.item_bytes}
    return {"case": case.name, **facts, "seconds": seconds, "times the floor": ratios, "GB/s": rates}


def show(row: dict[str, Any]) -> None:
    for name, t in row["seconds"].items():
        over = row["times the floor"][name]
        print(f"{row['case']:<20}{name:<18}{t * 1e6:>12.1f} us{row['GB/s'][name]:>9.2f} GB/s{over:>9.2f}", flush=True)


def plot_arrays(rows: list[dict[str, Any]]) -> None:
    """Bandwidth against the size of one array."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in ("floor", "fastadam", "fastadam_kernel", *PEERS):
        points = [(row["elements"], row["GB/s"][name]) for row in rows if name in row["GB/s"]]
        style = {"floor": "k:", "fastadam": "o-", "fastadam_kernel": "o:"}.get(name, "s--")
        if points:
            axes.loglog(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.set_xlabel("float32 elements of one array")
    axes.set_ylabel(f"GB/s at {BYTES_PER_ELEMENT} bytes per element")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "arrays.png", dpi=110)
    plt.close(figure)


def plot_lists(rows: list[dict[str, Any]]) -> None:
    """Time of a step of each list, times the floor."""
    from matplotlib import pyplot as plt

    names = [name for name in ("fastadam", *PEERS) if any(name in row["seconds"] for row in rows)]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for k, name in enumerate(names):
        places = [i + 0.8 * k / len(names) for i, row in enumerate(rows) if name in row["seconds"]]
        heights = [row["times the floor"][name] for row in rows if name in row["seconds"]]
        axes.bar(places, heights, 0.8 / len(names), label=name)
    axes.axhline(1, color="k", linestyle=":")
    axes.set_xticks([i + 0.4 for i in range(len(rows))], [row["case"] for row in rows])
    axes.set_yscale("log")
    axes.set_ylabel("time of a step, times the floor")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(RESULTS / "lists.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--tensorflow", metavar="PYTHON")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases with one of these in their name")
    arguments = parser.parse_args()
    rows = {row["case"]: row for row in read_json("compare")}
    for case in cases():
        if not arguments.only or any(word in case.name for word in arguments.only):
            rows[case.name] = measure(case, arguments.turns, arguments.tensorflow)
            show(rows[case.name])
    known = [rows[case.name] for case in cases() if case.name in rows]
    write_json("compare", known)
    plot_arrays([row for row in known if row["case"] in ARRAYS])
    plot_lists([row for row in known if row["tensors"] > 1])


if __name__ == "__main__":
    main()
