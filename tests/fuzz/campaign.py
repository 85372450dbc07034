"""What the programs of this folder share: arguments, one random generator for each case, how to repeat a case alone."""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # helpers of the tests
warnings.filterwarnings("ignore", ".* a gradient for rows that wait for their steps")
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)


def parser(doc: str, *, count: int, what: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Arguments that every program has: what to attack, the seed, the number of cases, one case alone."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if what:
        made.add_argument("what", choices=what)
    made.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    made.add_argument("--count", type=int, default=count, help=f"number of cases (default: {count})")
    made.add_argument("--only", type=int, metavar="N", help="run case N alone")
    return made


def run_one(doc: str, campaigns: Mapping[str, Callable[[argparse.Namespace], None]], *, count: int) -> None:
    """Run the campaign that the command line names."""
    arguments = parser(doc, count=count, what=list(campaigns)).parse_args()
    campaigns[arguments.what](arguments)


def run_cases(arguments: argparse.Namespace, case: Callable[[int, random.Random], None]) -> int:
    """Run the cases; each has a generator of its own, so that one can be repeated without the others.

    Returns:
        The number of cases that were run.
    """
    indices = range(arguments.count) if arguments.only is None else [arguments.only]
    for index in indices:
        try:
            case(index, random.Random(f"{arguments.seed} {index}"))
        except BaseException:
            given = [argument for argument in sys.argv[1:] if not argument.startswith("--only")]
            command = shlex.join([Path(sys.executable).name, sys.argv[0], *given, f"--only={index}"])
            print(f"case {index} failed; to run it alone: {command}", file=sys.stderr, flush=True)
            raise
    return len(indices)
