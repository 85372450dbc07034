"""The step of offloaded training: gradients in, float32 state on the host, a bfloat16 copy of the weights out.

    [PRIME_RL_KERNEL=FILE] python bench/host.py [--turns N] [--only WORD ...]

The rules are those of bench/compare.py; the copy must also be the rounding of the variable, to the bit. FILE: the
src/prime_rl/trainer/optim/cpu_adam/kernel.cpp of PrimeIntellect-ai/prime-rl, if it is to take part; it is built in
PyTorch's cache of extensions. bench/results/host.json has the last figures of every case.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common import Worker, available_memory, ratio, read_json, take_turns, write_json
from models import gpt2, resnet50

BYTES = {"float32": 30, "bfloat16": 28}  # by the gradients' dtype: they, three arrays read and written, the copy
HELD = 24  # bytes per element of a process at most: state, gradients, their casts, copies
BUCKETS = 16
DRAM = 2**25
Contenders = dict[str, tuple[str, dict[str, Any]]]  # name: function of bench/host_contenders.py, and its options


@dataclass
class Goal:
    """What a quotient of two times must be."""

    of: str
    to: str
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        bound = f"at most {self.at_most}" if self.at_least is None else f"at least {self.at_least}"
        return f"{self.of} / {self.to}, {bound}"


@dataclass
class Case:
    """One list of tensors, and who steps it."""

    name: str
    sizes: list[int]
    gradients: str
    contenders: Contenders
    goals: list[Goal]


OURS: Contenders = {
    "fastadam.adam_step": ("fastadam_function", {}),
    "fastadam.AdamW": ("fastadam_optimizer", {}),
    "fastadam.torch.AdamW": ("fastadam_torch", {}),
}
PEERS: Contenders = {"torch": ("torch", {}), "DeepSpeed": ("deepspeed", {}), "prime-rl": ("prime_rl", {})}
FLOORS: Contenders = {"floor": ("floor", {}), "floor, streamed": ("floor", {"streamed": True})}


def cases() -> Iterator[Case]:
    lists = {"2^25": [DRAM], "2^15": [2**15], "1000 x 64": [64] * 1000}
    faster = {"2^25": 1.25, "2^15": 1.5, "1000 x 64": 3.0}  # than prime-rl
    for gradients in BYTES:
        for name, sizes in lists.items():
            core = "fastadam.AdamW"
            goals = [Goal("prime-rl", core, at_least=faster[name])]
            goals.append(
                Goal("prime-rl", "fastadam.torch.AdamW", at_least=1.0 if name == "1000 x 64" else faster[name])
            )
            floors = FLOORS if name == "2^25" else {"floor": FLOORS["floor"]}
            if name == "2^25":
                goals += [Goal(ours, of, at_most=1.05) for ours in OURS for of in FLOORS]
            yield Case(f"{name}, {gradients}", sizes, gradients, floors | OURS | PEERS, goals)
        clipped = {
            name: (function, {"clip": 1.0}) for name, (function, _) in (OURS | PEERS).items() if name != "prime-rl"
        }
        unclipped = {"fastadam.torch.AdamW, not clipped": OURS["fastadam.torch.AdamW"]}
        goals = [Goal("torch", ours, at_least=2.2) for ours in [*OURS, *unclipped]]
        yield Case(f"2^25, {gradients}, clipped", [DRAM], gradients, FLOORS | clipped | unclipped, goals)
    measured = {name: ("fastadam_optimizer", {"telemetry": on}) for name, on in (("plain", False), ("measured", True))}
    yield Case("2^25, telemetry", [DRAM], "bfloat16", measured, [Goal("measured", "plain", at_most=1.02)])
    buckets = f"in {BUCKETS} buckets"
    bucketed: Contenders = {"in one": ("fastadam_torch", {}), buckets: ("fastadam_torch", {"buckets": BUCKETS})}
    for name, sizes in {"ResNet-50": resnet50(), "GPT-2 124M": gpt2()}.items():
        for gradients in BYTES:
            yield Case(f"{name}, {gradients}", sizes, gradients, bucketed, [Goal(buckets, "in one", at_most=1.05)])


def can_take_part(name: str) -> bool:
    """Whether a peer is installed, or its source known."""
    if name == "prime-rl":
        return "PRIME_RL_KERNEL" in os.environ
    package = {"torch": "torch", "DeepSpeed": "deepspeed"}.get(name, "numpy")
    return importlib.util.find_spec(package) is not None


def start(case: Case, only: list[str]) -> list[Worker]:
    """The contenders that run here, as many as fit in memory; the others are named."""
    workers: list[Worker] = []
    room = 0.8 * available_memory() / (HELD * sum(case.sizes))
    for name, (function, options) in case.contenders.items():
        if not can_take_part(name) or (only and name not in only):
            continue
        if len(workers) + 1 > room:
            print(f"{case.name}: {name}: no memory for one more process", flush=True)
            continue
        try:
            worker = Worker(f"host_contenders.{function}", case.sizes, gradients=case.gradients, **options)
        except RuntimeError as error:
            print(f"{case.name}: {name}: {error}", flush=True)
            continue
        worker.name = name
        workers.append(worker)
    return workers


def measure(case: Case, turns: int, only: list[str]) -> dict[str, Any]:
    """Seconds per step, and the quotients that the goals ask for."""
    workers = start(case, only)
    try:
        seconds = take_turns(workers, turns)
        by_name = {worker.name: worker for worker in workers}
        goals = [goal for goal in case.goals if {goal.of, goal.to} <= set(by_name)]
        quotients = {str(goal): ratio(by_name[goal.of], by_name[goal.to]) for goal in goals}
    finally:
        for worker in workers:
            worker.close()
    elements, item = sum(case.sizes), BYTES[case.gradients]
    facts = {"tensors": len(case.sizes), "elements": elements, "bytes per element": item}
    rates = {name: elements * item / t / 1e9 for name, t in seconds.items()}
    return {"case": case.name, **facts, "seconds": seconds, "GB/s": rates, "quotients": quotients}


def show(row: dict[str, Any]) -> None:
    for name, t in row["seconds"].items():
        print(f"{row['case']:<28}{name:<36}{t * 1e6:>12.1f} us{row['GB/s'][name]:>9.2f} GB/s", flush=True)
    for goal, quotient in row["quotients"].items():
        print(f"{row['case']:<28}{goal}: {quotient:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with one of these in their name")
    parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="only these; nothing is written")
    arguments = parser.parse_args()
    rows = {row["case"]: row for row in read_json("host")}
    for case in cases():
        if not arguments.only or any(word in case.name for word in arguments.only):
            rows[case.name] = measure(case, arguments.turns, arguments.contenders)
            show(rows[case.name])
    if not arguments.contenders:
        write_json("host", [rows[case.name] for case in cases() if case.name in rows])


if __name__ == "__main__":
    main()
