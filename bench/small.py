"""The step with moments in few bits and split masters, beside float32, traffic floors, bitsandbytes and torchao.

    python bench/small.py [--turns N] [--only WORD ...] [--elements N] [--peers-python FILE]

The rules are those of bench/compare.py. Every row has the float32 step of the same run. FILE: the Python in which
bitsandbytes and torchao are installed, if it is another one. With another number of elements nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from common import Worker, ratio, read_json, take_turns, write_json
from host import DRAM, Goal, show

PEERS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}


@dataclass
class Choice:
    """Formats of the state, and what they have to reach."""

    name: str
    options: dict[str, str]
    item: float  # bytes moved per element, with gradients like the variables
    faster: float | None = None  # than float32


FLOAT32 = Choice("float32", {}, 28)
CHOICES = [
    FLOAT32,
    Choice("bfloat16 moments", {"moments": "bfloat16"}, 20, 1.3),
    Choice("split, bfloat16 moments", {"dtype": "bfloat16", "master": "split", "moments": "bfloat16"}, 18, 1.4),
    Choice("8-bit moments", {"moments": "8bit"}, 16 + 1 / 32, 1.5),
    Choice("split, 8-bit moments", {"dtype": "bfloat16", "master": "split", "moments": "8bit"}, 14 + 1 / 32, 1.7),
]


def contenders(choice: Choice, peers_python: str) -> list[tuple[str, str, dict[str, str], float, str]]:
    """Name, function of bench/small_contenders.py, its options, bytes per element, and the Python that runs it."""
    rows = [("float32", "fastadam", {}, FLOAT32.item, sys.executable)]
    if choice is not FLOAT32:
        rows.append((choice.name, "fastadam", choice.options, choice.item, sys.executable))
    rows.append(("floor", "floor", choice.options, choice.item, sys.executable))
    if choice.options == {"moments": "8bit"}:
        rows += [(name, function, {"moments": "8bit"}, 16 + 1 / 16, peers_python) for name, function in PEERS.items()]
    return rows


def goals(choice: Choice) -> list[Goal]:
    found = [Goal(choice.name, "floor", at_most=1.25)]
    if choice.faster is not None:
        found.append(Goal("float32", choice.name, at_least=choice.faster))
    return found + [Goal(peer, choice.name, at_least=20) for peer in PEERS]


def measure(choice: Choice, elements: int, turns: int, peers_python: str) -> dict[str, Any]:
    """Seconds per step, and the quotients that the goals ask for."""
    workers: dict[str, Worker] = {}
    items = {}
    try:
        for name, function, options, item, python in contenders(choice, peers_python):
            try:
                workers[name] = Worker(f"small_contenders.{function}", [elements], python=python, **options)
            except RuntimeError as error:
                print(f"{choice.name}: {name}: {error}", flush=True)
                continue
            workers[name].name, items[name] = name, item
        seconds = take_turns(list(workers.values()), turns)
        reached = [goal for goal in goals(choice) if {goal.of, goal.to} <= set(workers)]
        quotients = {str(goal): ratio(workers[goal.of], workers[goal.to]) for goal in reached}
    finally:
        for worker in workers.values():
            worker.close()
    rates = {name: elements * items[name] / t / 1e9 for name, t in seconds.items()}
    facts = {"elements": elements, "bytes per element": items}
    return {"case": choice.name, **facts, "seconds": seconds, "GB/s": rates, "quotients": quotients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows with one of these in their name")
    parser.add_argument("--elements", type=int, default=DRAM)
    parser.add_argument("--peers-python", default=sys.executable, metavar="FILE")
    arguments = parser.parse_args()
    rows = {row["case"]: row for row in read_json("small")}
    for choice in CHOICES:
        if not arguments.only or any(word in choice.name for word in arguments.only):
            rows[choice.name] = measure(choice, arguments.elements, arguments.turns, arguments.peers_python)
            show(rows[choice.name])
    if arguments.elements == DRAM:
        write_json("small", [rows[choice.name] for choice in CHOICES if choice.name in rows])


if __name__ == "__main__":
    main()
