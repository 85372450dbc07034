"""Signal handlers that raise at any moment: SIGINT, SIGALRM and SIGTERM, sent by the operating system.

Each case makes an optimizer, and sends a signal at a random moment of one call: a step of some kind, set_weights,
averages, resize, reset, gather; or of a call that writes a file. What the call changes has then either happened or not,
no lock is held, and the training goes on to the bits of one that was never interrupted.

Which call, which signal and when follows from the seed; where the signal strikes does not quite: `--only N --repeat 1000`.
The last line says how many signals struck inside of a call.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import campaign
import numpy as np
from file_cases import KINDS, Files, Truth
from test_interrupts import ones, require_free, same, state_of, step_with_halves, trained, with_rows_that_wait
from test_interrupts_by_signals import SIGNALLED, Alarm

SIGNALS = [signal.SIGINT, signal.SIGALRM, signal.SIGTERM]


def with_codes():
    optimizer, variables = trained(0, moments="8bit")
    variables = ones(5000, 4)
    step_with_halves(optimizer, variables)
    return optimizer, variables


def step_in_buckets(optimizer, variables):
    try:
        optimizer.begin_step(early=True)
        for variable in variables:
            optimizer.step_bucket([(np.full_like(variable, 0.5), variable)])
        optimizer.end_step()
    except KeyboardInterrupt:
        optimizer.abort_step()  # the step was made, or is still open
        raise


CALLS = {
    **SIGNALLED,
    "reset": (trained, lambda o, v: o.reset()),
    "resize": (trained, lambda o, v: o.resize(v[1], v[1], rows=[1, 0])),
    "gather": (with_rows_that_wait, lambda o, t: o.gather(t[1], [0, 4])),
    "iterations": (with_rows_that_wait, lambda o, t: setattr(o, "iterations", 9)),
    "first step": (lambda: trained(0), step_with_halves),
    "8bit": (with_codes, step_with_halves),
    "buckets": (trained, step_in_buckets),
    "clipped buckets": (lambda: trained(global_clipnorm=0.1), step_in_buckets),
    "clipped": (lambda: trained(global_clipnorm=0.1), step_with_halves),
}


def attack_call(alarm, rng, name):
    """Whether the signal struck inside."""
    make, call = CALLS[name]
    outcomes = []
    for made in (False, True):
        optimizer, variables = make()
        start = time.perf_counter()
        if made:
            call(optimizer, variables)
        seconds = time.perf_counter() - start
        outcomes.append(state_of(optimizer, variables))
    optimizer, variables = make()
    alarm.set(rng.uniform(0, 1.5 * seconds))
    try:
        alarm.is_armed = True
        call(optimizer, variables)
        alarm.is_armed = False
        struck = False
    except KeyboardInterrupt:
        struck = True
    alarm.wait()
    require_free(getattr(optimizer, "inner_optimizer", optimizer))
    found = state_of(optimizer, variables)
    assert any(same(found, outcome) for outcome in outcomes), f"{name}: neither the state before nor after the call"
    return struck


def attack_file(alarm, rng, kind, truth, seconds):
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        alarm.set(rng.uniform(0, 1.2 * seconds[kind]))
        try:
            alarm.is_armed = True
            files.write(kind)
            alarm.is_armed = False
            struck = False
        except KeyboardInterrupt:
            struck = True
        alarm.wait()
        require_free(files.training.optimizer)
        truth.check(files.load().training)
        files.training.time = int(files.training.optimizer.iterations)
        truth.check(files.training)
        files.write(kind)
        again = files.load().training
        assert again.time == files.training.time, "the file is not of the last call"
        truth.check(again)
        names = {path.name[:5] for path in Path(folder).iterdir()}
        assert names <= {"base", "delta"}, f"temporary files were left: {names}"
    return struck


def main():
    parser = campaign.parser(__doc__, count=300)
    parser.add_argument("--repeat", type=int, default=1, help="times that each case is tried (default: 1)")
    arguments, truth, found = parser.parse_args(), Truth(), Counter()
    seconds = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            files = Files(Path(folder))
            start = time.perf_counter()
            files.write(kind)
            seconds[kind] = time.perf_counter() - start

    def case(_index, rng):
        name, alarm = rng.choice([*CALLS, *2 * KINDS]), alarms[rng.choice(SIGNALS)]
        for _ in range(arguments.repeat):
            if name in KINDS:
                found["file"] += attack_file(alarm, rng, name, truth, seconds)
            else:
                found["call"] += attack_call(alarm, rng, name)

    with contextlib.ExitStack() as stack:
        alarms = {number: stack.enter_context(Alarm.installed(number)) for number in SIGNALS}
        count = campaign.run_cases(arguments, case)
    print(
        f"signals: seed {arguments.seed}, {count} cases; {found['call']} signals struck inside of a call of an "
        f"optimizer, {found['file']} inside of a call that writes a file; all calls had happened or not, and all went on"
    )


if __name__ == "__main__":
    main()
