"""The step while gradients still come: how much of its time is hidden, and what it costs to be wrong about a clip.

    python bench/overlap.py [--turns N] [--only WORD ...]

The rules are those of bench/compare.py, and every step has the bits of the plain one. The share that is hidden is (step
after - overlap) / (step after - nothing but the gradients). Overlapped steps are timed after 100 others, when the logs
that undo them hold no whole copies any more. On the CPU the backward pass and the step share the threads; gradients
that arrive, as from a GPU, leave them idle. bench/results/overlap.json has the last figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from common import Worker, read_json, take_turns, write_json
from models import small_gpt

CLIPS = (None, "never", "always", "tenth")
RATES = (2, 8)  # GB/s
STEPS = 10  # in one call of a contender; the same number as there
SPLITS = {"overlap, 1 + 1 threads": (1, 1), "overlap, 2 + 2 threads": (2, 2)}  # of the backward pass and the step
GRADIENTS, AFTER = "gradients", "step after"


@dataclass
class Case:
    """Gradients, with and without a step."""

    name: str
    function: str  # of bench/overlap_contenders.py
    sizes: list[int]
    contenders: dict[str, dict[str, Any]]  # their options
    steps: int = STEPS
    calls: int | None = 1  # in a turn; None: as many as in other benchmarks


def gpt_sizes() -> list[int]:
    return [parameter.numel() for parameter in small_gpt().parameters()]


def clipped(clip: str | None) -> str:
    return f", clipped: {clip}"


def cases() -> Iterator[Case]:
    contenders: dict[str, dict[str, Any]] = {GRADIENTS: {"how": GRADIENTS}}
    for clip in CLIPS:
        contenders[AFTER + clipped(clip)] = {"how": AFTER, "clip": clip}
        for name, (backward, step) in SPLITS.items():
            options = {"how": "overlap", "clip": clip, "threads": backward, "step_threads": step}
            contenders[name + clipped(clip)] = options
    yield Case("GPT", "gpt", [], contenders)
    for rate in RATES:
        contenders = {GRADIENTS: {"how": GRADIENTS, "rate": rate}}
        for clip in CLIPS:
            for how in (AFTER, "overlap"):
                contenders[how + clipped(clip)] = {"how": how, "clip": clip, "rate": rate}
        yield Case(f"arrivals, {rate} GB/s", "arrivals", gpt_sizes(), contenders)
    hows = ("plain", "made early", "undone and made again", "given up")
    yield Case("undo, 2^24", "undo", [2**24], {how: {"how": how} for how in hows}, steps=1, calls=None)


def measure(case: Case, turns: int) -> dict[str, Any]:
    """Seconds per step, medians and minima, and what follows from them."""
    workers: list[Worker] = []
    try:
        for name, options in case.contenders.items():
            workers.append(Worker(f"overlap_contenders.{case.function}", case.sizes, **options))
            workers[-1].name = name
        take_turns(workers, turns, steps_per_turn=case.calls)
        times = {worker.name: [t / case.steps for t in worker.times] for worker in workers}
    finally:
        for worker in workers:
            worker.close()
    quotients = undone(times) if case.function == "undo" else hidden(times)
    from overlap_contenders import LOG_BYTES

    if case.function in LOG_BYTES:
        quotients["bytes of the log for each parameter after step 100"] = LOG_BYTES[case.function]()
    return {
        "case": case.name,
        "seconds": {name: median(each) for name, each in times.items()},
        "least seconds": {name: min(each) for name, each in times.items()},
        "quotients": quotients,
    }


def hidden(times: dict[str, list[float]]) -> dict[str, float]:
    """The share of the step's time that each way hides, of steps with the same clip."""
    alone, shares = median(times[GRADIENTS]), {}
    for clip in CLIPS:
        after = median(times[AFTER + clipped(clip)])
        for name in times:
            if name.startswith("overlap") and name.endswith(clipped(clip)):
                shares[f"hidden, {name}"] = (after - median(times[name])) / (after - alone)
    return shares


def undone(times: dict[str, list[float]]) -> dict[str, float]:
    """The cost of a log, of undoing a step, and of both with the step that follows, in plain steps."""
    plain, early, again, given_up = (median(times[how]) for how in times)
    return {
        "made early": early / plain,
        "undone": (given_up - early) / plain,
        "undone and made again": (again - early) / plain,
    }


def show(row: dict[str, Any]) -> None:
    for name, t in row["seconds"].items():
        least = row["least seconds"][name]
        print(f"{row['case']:<20}{name:<40}{t * 1e3:>9.2f} ms, least {least * 1e3:.2f}", flush=True)
    for name, quotient in row["quotients"].items():
        print(f"{row['case']:<20}{name}: {quotient:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with one of these in their name")
    parser.add_argument("--no-results", action="store_true", help="nothing is written")
    arguments = parser.parse_args()
    rows = {row["case"]: row for row in read_json("overlap")}
    for case in cases():
        if not arguments.only or any(word in case.name for word in arguments.only):
            rows[case.name] = measure(case, arguments.turns)
            show(rows[case.name])
    if not arguments.no_results:
        write_json("overlap", [rows[case.name] for case in cases() if case.name in rows])


if __name__ == "__main__":
    main()
