"""One step in parts: buckets of variables that come in any order, from any thread, and step or are undone together."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from fastadam._core.common.types import AnyGradient
from fastadam._core.native.backend import _cpu
from fastadam._core.native.plan import Factors, Norms, Plan, StepHyper, clip

__all__ = ["Bucket", "Guess", "OpenStep"]

Place: TypeAlias = tuple[int, ...]

_NO_FACTORS: Factors = np.empty((0, 2))


class Bucket(NamedTuple):
    """The variables of one plan, and what makes their part of the step."""

    plan: Plan
    gradients: list[AnyGradient]  # checked; they must not change before the step ends
    hyper: StepHyper
    factors: list[float]  # what gradients are multiplied by besides; empty for 1
    places: Sequence[Place]  # of the variables: in this order their squares are summed
    make: Callable[[Factors | None], object]  # makes the native step, with factors of joined norms if there are any
    note: Callable[[], None]  # notes the step once it is certain
    is_plain: bool = True  # make() does nothing but the native step, so that this can be undone


@dataclass(eq=False)
class _Part:
    """A bucket of the open step."""

    bucket: Bucket
    log: _cpu.StepLog
    norms: Norms | None = None
    used: Factors | None = None  # the factors of the step that was made early; None: it was not made


class Guess:
    """Whether early steps pay: not while most of them have to be undone."""

    _PAUSE = 16  # steps without a guess after two of the last four failed

    def __init__(self) -> None:
        self._failures: list[bool] = []
        self._pause = 0

    @property
    def pays(self) -> bool:
        """Whether the next step is made early."""
        return self._pause == 0

    def note(self, *, failed: bool) -> None:
        """After a step: whether it was, or would have been, undone."""
        self._failures = [*self._failures[-3:], failed]
        if self._pause > 0:
            self._pause -= 1
        elif sum(self._failures) >= 2:
            self._failures, self._pause = [], self._PAUSE


_live: weakref.WeakSet[OpenStep] = weakref.WeakSet()


class OpenStep:
    """A step whose buckets are given one by one.

    Without ``early`` a bucket waits for the end of the step; only norms are read before. With ``early`` it is stepped
    at once, as if nothing was clipped, and a log is kept that undoes it to the bit. All writes are made on a thread of
    its own, which no signal handler interrupts: the whole step is made, or none of it.

    Args:
        clips: The bounds of norms, as a step has them; and whether gradients must be finite.
        early: Step buckets as they come, as far as that can be undone.
        threads: The most threads of its native calls; None for as many as other calls use.
        guess: Of the optimizer.
        join: Adds to the norms of all buckets, in the order in which these came, what other processes know of them.
        logs: Of the optimizer: memory of logs, by the places of a bucket.
    """

    def __init__(
        self,
        clips: StepHyper,
        *,
        early: bool,
        threads: int | None,
        guess: Guess,
        logs: dict[object, _cpu.StepLog],
        join: Callable[[Norms], Norms] = lambda norms: norms,
    ) -> None:
        self._join = join
        self._clips, self._early, self._guess, self._logs = clips, early, guess, logs
        self._is_global = np.isfinite(clips.global_clip_norm)
        self._reads_norms = clips.require_finite or self._is_global or bool(np.isfinite(clips.clip_norm))
        self._speculates = early and (guess.pays or not self._reads_norms)
        self._parts: list[_Part] = []
        self._done: list[Future[None]] = []
        self._given: set[Place] = set()
        self._lock = threading.Lock()
        self._is_open = True
        self._pid = os.getpid()
        self._worker = ThreadPoolExecutor(1, "fastadam step", _cpu.set_thread_budget, (threads or 0,))
        _live.add(self)

    @property
    def given(self) -> set[Place]:
        """The places of the variables so far."""
        return self._given

    # ---- the buckets -----------------------------------------------------------------------------------------------

    def require(self, places: Sequence[Place], labels: Sequence[str]) -> None:
        """Raise if the step is over, or if a variable was given before."""
        if not self._is_open or os.getpid() != self._pid:
            raise RuntimeError("step_bucket: the step is over, expected begin_step() first")
        for place, label in zip(places, labels, strict=True):
            if place in self._given:
                raise ValueError(f"step_bucket: {label} was given before in this step, expected it once")

    def add(self, buckets: Sequence[Bucket]) -> Future[None]:
        """Take buckets, which have been checked. The result comes when no more is to be done before the end."""
        with self._lock:
            parts = []
            for bucket in buckets:
                self.require(bucket.places, [buffer.label for buffer in bucket.plan.buffers])
                self._given.update(bucket.places)
                log = self._logs.setdefault(tuple(bucket.places), _cpu.StepLog())
                parts.append(_Part(bucket, log))
            self._parts += parts
            done = self._worker.submit(self._begin_all, parts)
            self._done.append(done)
        return done

    def _begin_all(self, parts: list[_Part]) -> None:
        for part in parts:
            self._begin(part)

    def _begin(self, part: _Part) -> None:
        plan, gradients, hyper, factors, *_ = part.bucket
        is_early = self._speculates and part.bucket.is_plain and plan.can_undo(gradients)
        if self._reads_norms or is_early:
            part.norms = plan.norms(gradients, hyper)
        if not is_early or part.norms is None:
            return
        guess = _NO_FACTORS
        if self._reads_norms:
            bounds = hyper._replace(global_clip_norm=np.inf)  # as if it was not needed
            guess, is_finite = clip(part.norms, bounds, _ones(factors, part.norms))
            if hyper.require_finite and not is_finite:
                return
        plan.step_logged(gradients, hyper, factors, guess, part.log)
        part.used = guess

    # ---- the end ---------------------------------------------------------------------------------------------------

    def finish(self, commit: Callable[[], None]) -> bool:
        """Make the step: all of it, or raise and make none.

        Args:
            commit: Counts the step. It runs when everything has been made, without interruption.

        Returns:
            Whether it was made: False if gradients had to be finite and are not.
        """
        return self._close(lambda: self._finish(commit))

    def abort(self) -> None:
        """Undo what was made early."""
        if self._is_open:
            self._close(self._undo_all)

    def _close(self, work: Callable[[], bool]) -> bool:
        with self._lock:
            if not self._is_open:
                raise RuntimeError("end_step: no step is open, expected begin_step() first")
            self._is_open = False
        if os.getpid() != self._pid:  # a forked child has no worker; its parent was idle
            return work()
        future = self._worker.submit(work)
        interrupt: BaseException | None = None
        while not future.done():
            try:
                wait([future])
            except BaseException as signal:
                interrupt = signal
        self._worker.shutdown(wait=False)
        if interrupt is not None:
            raise interrupt
        return future.result()

    def _finish(self, commit: Callable[[], None]) -> bool:
        try:
            for done in self._done:
                done.result()
            clipped = self._joined()
        except BaseException:
            self._undo_all()
            raise
        was_early = any(part.used is not None for part in self._parts)
        if clipped is None:
            self._undo_all()
            self._guess.note(failed=was_early)
            return False
        wrong = [k for k, part in enumerate(self._parts) if part.used is not None and not _same(part.used, clipped[k])]
        for k in wrong:
            self._undo(self._parts[k])
        for part, factors in zip(self._parts, clipped, strict=True):
            if part.used is None:
                part.bucket.make(factors if len(factors) else None)
        for part in self._parts:
            part.bucket.note()
        commit()
        if self._early and self._reads_norms:
            self._guess.note(failed=bool(wrong) or (not was_early and self._would_fail(clipped)))
        return True

    def _joined(self) -> list[Factors] | None:
        """For each part the factors of its gradients; None if the step must be skipped."""
        if not self._reads_norms or not self._parts:
            return [_NO_FACTORS for _ in self._parts]
        norms = [part.norms for part in self._parts if part.norms is not None]
        sums = self._join(np.concatenate(norms))
        others = np.concatenate([_ones(part.bucket.factors, n) for part, n in zip(self._parts, norms, strict=True)])
        places = [place for part in self._parts for place in part.bucket.places]
        order = sorted(range(len(places)), key=places.__getitem__)
        found, is_finite = clip(sums[order], self._clips, others[order])
        if self._clips.require_finite and not is_finite:
            return None
        clipped = np.empty_like(found)
        clipped[order] = found
        return np.split(clipped, np.cumsum([len(n) for n in norms])[:-1])

    def _would_fail(self, clipped: list[Factors]) -> bool:
        """Whether an early step would have had other factors."""
        if not self._is_global:
            return False
        bounds = self._clips._replace(global_clip_norm=np.inf)
        for part, factors in zip(self._parts, clipped, strict=True):
            if part.norms is None:
                continue
            alone, _ = clip(part.norms, bounds, _ones(part.bucket.factors, part.norms))
            if not _same(alone, factors):
                return True
        return False

    def _undo_all(self) -> bool:
        for part in self._parts:
            if part.used is not None:
                self._undo(part)
        return False

    def _undo(self, part: _Part) -> None:
        plan, gradients, hyper, factors, *_ = part.bucket
        used, part.used = part.used, None
        if part.norms is None or used is None or not np.array_equal(plan.norms(gradients, hyper), part.norms, True):
            names = ", ".join(buffer.label for buffer in plan.buffers[:3])
            raise RuntimeError(
                f"end_step: a gradient of {names} ... has changed since step_bucket(), so that the step cannot be "
                "undone; expected gradients to stay as they are until end_step()"
            )
        plan.undo(gradients, hyper, factors, used, part.log)

    def _wait(self) -> None:
        """Before a fork: let the worker finish."""
        wait(self._done)


def _ones(factors: list[float], norms: Norms) -> Factors:
    return np.array(factors or [1.0] * len(norms))


def _same(a: Factors, b: Factors) -> bool:
    return np.array_equal(a, b, True)


def _settle() -> None:
    for step in _live:
        step._wait()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_settle)
