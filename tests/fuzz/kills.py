"""SIGKILL while a training writes its files: save, save_delta, merge_deltas, and a new base that replaces deltas.

Each case makes a training, forks a child that steps and writes without end, and kills it: in every other case before a
line of Python of the code that writes, which is the same line in every run; in the others at a random moment, which may
be in the middle of a system call. The files must then be those from before or after the call that was cut off, load to
the bits of as many uninterrupted steps, and be good for another step and another file.

"savers": processes and threads save optimizers to one path at once while the main thread loads it. It must always find
a whole file of one of them, and at the end no temporary file. Here a case is a save.

The last line says how many kills there were, how many hit the call, and how many found the state before and after it.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import campaign
import fastadam
import numpy as np
from file_cases import KINDS, STEPS, Files, Truth, count_lines, lines_of_saving


class Shared:
    """What the child tells its parent: how many steps its files are good for, and whether a call is running."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 16)

    def tell(self, steps, running):
        self._memory[:16] = struct.pack("qq", steps, running)

    def read(self):
        return struct.unpack("qq", self._memory[:16])


def write_without_end(files, kind, shared, ready, last_line):
    lines = iter(range(10**9))

    def die_there():
        if next(lines) == last_line:
            os.kill(os.getpid(), signal.SIGKILL)

    os.write(ready, b"x")
    if last_line is not None:
        sys.settrace(lines_of_saving(die_there))
    while True:
        shared.tell(files.training.time, True)
        files.write(kind)
        shared.tell(files.training.time, False)
        time.sleep(0)


def kills(arguments):
    kind, truth, found = arguments.what, Truth(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        lines = count_lines(lambda: files.write(kind))
        start = time.perf_counter()
        for _ in range(5):
            files.write(kind)
        seconds = (time.perf_counter() - start) / 5

    def case(index, rng):
        with tempfile.TemporaryDirectory() as folder:
            files, shared, (begun, ready) = Files(Path(folder)), Shared(), os.pipe()
            last_line = rng.randrange(2 * lines) if index % 2 else None
            child = os.fork()
            if not child:
                try:
                    write_without_end(files, kind, shared, ready, last_line)
                finally:
                    os._exit(1)
            os.read(begun, 1)
            if last_line is None:
                time.sleep(rng.uniform(0, 3 * seconds))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            for end in (begun, ready):
                os.close(end)
            assert os.WIFSIGNALED(status), f"the child ended by itself: {status}"
            steps, running = shared.read()
            steps = max(steps, 3)  # killed before it told anything
            again = files.load()
            done = again.training.time - steps
            assert 0 <= done <= STEPS[kind], f"the files are of step {again.training.time}, expected {steps} or after"
            assert done == 0 or running
            truth.check(again.training)
            again.write(kind)
            truth.check(again.load().training)
            known = ("base", "delta_", ".fastadam-")
            assert all(path.name.startswith(known) for path in Path(folder).iterdir())
        found["at a line" if index % 2 else "at a random moment"] += 1
        found["inside"] += running
        found["after" if done else "before"] += 1

    count = campaign.run_cases(arguments, case)
    print(
        f"kills {kind}: seed {arguments.seed}, {count} SIGKILLs ({found['at a line']} before a line of Python, "
        f"{found['at a random moment']} at a random moment), {found['inside']} inside of the call; "
        f"{found['before']} left the state from before it, {found['after']} a later one; all loaded to the bits of "
        "uninterrupted steps and went on"
    )


SIZE = 20_000
SAVERS = 3  # processes, each with as many threads


def save_often(path, number, count):
    """Save optimizers whose weights are all one number, which no other saver has."""
    optimizer = fastadam.Adam(0.1)
    optimizer.build([np.zeros(SIZE, np.float32)])
    for k in range(count):
        value = number * 10_000 + k
        optimizer.set_weights([value, np.full(SIZE, value), np.full(SIZE, value)])
        optimizer.save(path)


def save_on_threads(path, first, count):
    failures = []

    def save(number):
        try:
            save_often(path, number, count)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(first + k,)) for k in range(SAVERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def savers(arguments):
    each = -(-arguments.count // SAVERS**2)
    with tempfile.TemporaryDirectory() as folder:
        path, loads, seen = Path(folder) / "opt", 0, set()
        save_often(path, 0, 1)
        children = []
        for process in range(SAVERS):
            if not (child := os.fork()):
                code = 1
                try:
                    save_on_threads(path, 1 + process * SAVERS, each)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        codes = []
        while children:
            count, m, v = fastadam.Adam.load(path, [np.zeros(SIZE, np.float32)]).get_weights()
            assert (m == count).all(), "a file of two savers"
            assert (v == count).all(), "a file of two savers"
            loads += 1
            seen.add(int(count) // 10_000)
            ended, status = os.waitpid(children[0], os.WNOHANG)
            if ended:
                children.pop(0)
                codes.append(status)
        assert codes == [0] * SAVERS, f"a process of savers failed: {codes}"
        assert [p.name for p in Path(folder).iterdir()] == ["opt"], "temporary files were left"
    print(
        f"kills savers: {each * SAVERS**2} saves by {SAVERS} processes of {SAVERS} threads to one path, {loads} loads found "
        f"whole files of {len(seen)} savers; no temporary file was left"
    )


def main():
    arguments = campaign.parser(__doc__, count=300, what=[*KINDS, "savers"]).parse_args()
    (savers if arguments.what == "savers" else kills)(arguments)


if __name__ == "__main__":
    main()
