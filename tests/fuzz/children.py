"""Cases in child processes: arguments, child processes that may crash, findings, and the closing line.

A program defines ``start(folder)``, which returns ``case(rng, tell, number)``. Case number n of seed s always gets the same
random numbers, so that ``--seed s --only n`` repeats it alone. ``tell(text)`` says what is about to be called; a crash is
reported with the last text. ``case`` returns a word that is counted ("accepted", "refused" ...) and raises ``Finding``,
or any other exception, if something is wrong.

The closing line is ``NAME: seed 1, cases 0 to 999: 950 refused, 50 accepted, 0 findings``. The exit status is 1 if there
were findings, each printed with the number of its case.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np


class Finding(Exception):  # noqa: N818  not an error of this program
    """Something that must not happen."""


def arguments(description, count, *, gigabytes=24, **more):
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="of the random numbers (default: from the clock)")
    parser.add_argument("--count", type=int, default=count, help=f"number of cases (default: {count})")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--only", type=int, help="one case, with what it calls")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a case hangs (default: 120)")
    parser.add_argument("--gigabytes", type=float, default=gigabytes, help=f"address space of a child ({gigabytes})")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    given = parser.parse_args()
    given.seed = int(time.time()) if given.seed is None else given.seed
    if given.only is not None:
        given.first, given.count = given.only, 1
    return given


def run(name, start, given):
    """Run the cases in child processes, each in the place of one that crashed, and exit with the closing line."""
    end, number = given.first + given.count, given.first
    tally, findings = Counter(), []
    with tempfile.TemporaryDirectory(prefix="fastadam-fuzz-") as folder:
        while number < end:
            number = _child(start, folder, range(number, end), given, tally, findings)
    if tally.total() < given.count:
        findings.append((number, "the children ended early"))
    counts = "".join(f"{count} {word}, " for word, count in sorted(tally.items()))
    kinds = f" of {len({text.partition(chr(10))[0] for _, text in findings})} kinds" if len(findings) > 1 else ""
    print(f"{name}: seed {given.seed}, cases {given.first} to {end - 1}: {counts}{len(findings)} findings{kinds}")
    sys.exit(bool(findings))


def _child(start, folder, numbers, given, tally, findings):
    """Fork a child and note what it says; the number of the case that comes after it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _serve(start, folder, numbers, given, writer)
        finally:
            os._exit(1)  # whatever happened: the rest of this function is the parent's
    os.close(writer)
    number, about, hung = numbers.start, "before its first call", False
    buffer = b""
    while True:
        if not select.select([reader], [], [], given.patience)[0]:
            os.kill(child, signal.SIGKILL)
            hung = True
            break
        data = os.read(reader, 1 << 16)
        if not data:
            break
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            kind, text = json.loads(line)
            if kind == "tell":
                about = text
            elif kind == "counted":
                tally[text] += 1
                number, about = number + 1, "before its first call"
            else:
                tally["wrong"] += 1
                findings.append((number, text))
                print(f"case {number} of seed {given.seed}: {text}\n  {about}", flush=True)
                number, about = number + 1, "before its first call"
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if hung or status:
        what = f"no answer within {given.patience:.0f} s" if hung else f"the process died: wait status {status}"
        tally["wrong"] += 1
        findings.append((number, what))
        print(f"case {number} of seed {given.seed}: {what}\n  {about}", flush=True)
        number += 1
    return number


def _serve(start, folder, numbers, given, writer):
    """Answer each number, then exit."""

    def say(kind, text):
        if given.only is not None and kind == "tell":
            print(text, flush=True)
        os.write(writer, json.dumps([kind, text]).encode() + b"\n")

    try:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (int(given.gigabytes * 2**30), most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.path[0] = str(Path(sys.path[0]).resolve())
        os.chdir(folder)  # hostile strings may be taken for paths
        case = start(folder)
        for number in numbers:
            rng = np.random.default_rng([given.seed, number])
            try:
                say("counted", case(rng, lambda text: say("tell", text), number))
            except Finding as finding:
                say("finding", str(finding))
            except BaseException as error:
                say("finding", f"{type(error).__name__} in the program\n{''.join(traceback.format_exception(error))}")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
