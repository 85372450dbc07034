"""Ctrl-C as the operating system sends it, at random times: a call has either happened or not."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time

import fastadam
import numpy as np
import pytest
from test_interrupts import (
    evaluate,
    ones,
    require_free,
    same,
    state_of,
    step_on_rows,
    step_with_halves,
    trained,
    with_rows_that_wait,
)


class Alarm:
    """Sends a signal from another thread, some seconds after each :meth:`set`; it raises once, if it is armed then."""

    def __init__(self, number=signal.SIGINT):
        self.number, self._main = number, threading.main_thread().ident
        self.is_armed = self.is_running = False
        self._sent, self._set, self._delay = threading.Event(), threading.Event(), 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def set(self, delay):
        self._sent.clear()
        self._delay, self.is_running = delay, False
        self._set.set()
        while not self.is_running:  # a sleep would end later than a step
            pass

    def handle(self, *_arguments):
        if self.is_armed:
            self.is_armed = False
            raise KeyboardInterrupt

    def wait(self):
        assert self._sent.wait(30)

    def _run(self):
        while True:
            self._set.wait()
            self._set.clear()
            end = time.perf_counter() + self._delay
            self.is_running = True
            while time.perf_counter() < end:
                pass
            signal.pthread_kill(self._main, self.number)
            self._sent.set()

    @classmethod
    @contextlib.contextmanager
    def installed(cls, number=signal.SIGINT):
        alarm, interval = cls(number), sys.getswitchinterval()
        before = signal.signal(number, alarm.handle)
        sys.setswitchinterval(1e-5)
        yield alarm
        sys.setswitchinterval(interval)
        signal.signal(number, before)


@pytest.fixture
def alarm():
    with Alarm.installed() as alarm:
        yield alarm


def with_a_loss_scale():
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1), 8.0, 2)
    variables = ones(3, 4)
    step_with_halves(optimizer, variables)
    return optimizer, variables


SIGNALLED = {
    "a step": (trained, step_with_halves),
    "use_ema": (lambda: trained(use_ema=True), step_with_halves),
    "accumulation": (lambda: trained(3, gradient_accumulation_steps=2), step_with_halves),
    "a loss scale": (with_a_loss_scale, step_with_halves),
    "deferred": (with_rows_that_wait, lambda o, t: step_on_rows(o, t, [1, 5])),
    "set_weights": (trained, lambda o, v: o.set_weights([a + np.ones_like(a) for a in o.get_weights()])),
    "averages": (lambda: trained(use_ema=True), evaluate),
}


@pytest.mark.parametrize("name", SIGNALLED)
def test_ctrl_c_at_a_random_time(name, alarm):
    make, call = SIGNALLED[name]
    outcomes, seconds = [], []
    for made in (False, True):
        optimizer, variables = make()
        start = time.perf_counter()
        if made:
            call(optimizer, variables)
            seconds.append(time.perf_counter() - start)
        outcomes.append(state_of(optimizer, variables))
    choose, raised, start = random.Random(0), 0, time.monotonic()
    while raised < 100 and time.monotonic() < start + 20:
        optimizer, variables = make()
        alarm.set(choose.random() * 2 * seconds[0])
        try:
            alarm.is_armed = True
            call(optimizer, variables)
            alarm.is_armed = False
        except KeyboardInterrupt:
            raised += 1
        alarm.wait()
        require_free(getattr(optimizer, "inner_optimizer", optimizer))
        found = state_of(optimizer, variables)
        assert any(same(found, outcome) for outcome in outcomes)
    assert raised
