"""One step in parts: buckets of variables that come in any order, from any thread, and step or are undone together."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from fastadam._core.common.checks import check_count
from fastadam._core.common.types import AnyGradient
from fastadam._core.native.backend import _cpu
from fastadam._core.native.plan import Factors, Norms, Plan, StepHyper, clip
from fastadam._core.native.worker import Handle, Worker

__all__ = ["Bucket", "Guess", "OpenStep", "check_threads"]

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
    note: Callable[[], None] = lambda: None  # notes the step once it is certain
    is_plain: bool = True  # make() does nothing but the native step, so that this can be undone
    labels: Sequence[str] = ()  # what error messages call the variables; empty for those of the plan

    def labels_of(self, indices: Sequence[int]) -> list[str]:
        """What error messages call some of the variables."""
        return [self.labels[i] if self.labels else self.plan.buffers[i].label for i in indices]


@dataclass(eq=False)
class _Part:
    """A bucket of the open step."""

    bucket: Bucket
    log: _cpu.StepLog
    norms: Norms | None = None
    used: Factors | None = None  # the factors of the step that was made early; None: it was not made


class _Group(NamedTuple):
    """Buckets that were given in one call."""

    number: int
    parts: list[_Part]
    handle: Handle[None]


class Guess:
    """Whether early steps pay: not if two of the last four had to be undone, or would have been."""

    def __init__(self) -> None:
        self._failures: list[bool] = []

    @property
    def pays(self) -> bool:
        """Whether the next step is made early."""
        return sum(self._failures) < 2

    def note(self, *, failed: bool) -> None:
        """After a step: whether it was, or would have been, undone."""
        self._failures = [*self._failures[-3:], failed]


_live: list[weakref.ref[OpenStep]] = []  # a WeakSet has callbacks, in which an exception of a signal handler is lost


def _note_live(step: OpenStep) -> None:
    for ref in list(_live):
        if (other := ref()) is None or not other.is_open:
            with contextlib.suppress(ValueError):  # another thread has removed it
                _live.remove(ref)
    _live.append(weakref.ref(step))


class OpenStep:
    """A step whose buckets are given one by one. Whoever calls a method holds a lock of the optimizer.

    Without ``early`` a bucket waits for the end of the step, which reads its gradients as they are then. With ``early``
    it is stepped at once, as if no joint norm was clipped, and a log is kept that undoes it to the bit. All writes are
    made by a worker, whose thread no signal handler interrupts: the whole step is made, or none of it.

    After a fork both processes have the open step, as it was. A step that is open when the interpreter exits is undone.
    One that is dropped is not: its variables may belong to another optimizer by then.

    Args:
        clips: The bounds of norms, as a step has them; and whether gradients must be finite.
        early: Step buckets as they come, as far as that can be undone.
        threads: The most threads of its native calls; None for as many as other calls use.
        guess: Of the optimizer.
        logs: Of the optimizer: memory of logs, by the places of a bucket.
        join: Adds to the norms of all buckets, in the order in which these came, what other processes know of them.
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
        self._threads = threads or 0
        self._is_global = np.isfinite(clips.global_clip_norm)
        self._reads_norms = clips.require_finite or self._is_global or bool(np.isfinite(clips.clip_norm))
        self._speculates = early and (guess.pays or not self._reads_norms)
        self._groups: list[_Group] = []
        self._group_of: dict[Place, _Group] = {}  # also those that a signal has kept from being taken
        self.is_open = True  # until the worker has made or undone it
        self._worker = Worker.take()
        _note_live(self)

    # ---- the buckets -----------------------------------------------------------------------------------------------

    def has(self, place: Place) -> bool:
        """Whether a variable was given in this step."""
        group = self._group_of.get(place)
        return group is not None and group.number < len(self._groups) and self._groups[group.number] is group

    @property
    def places(self) -> list[Place]:
        """Of the variables so far, in the order of their buckets."""
        return [place for part in self._parts for place in part.bucket.places]

    def require(self, places: Sequence[Place], labels: Sequence[str]) -> None:
        """Raise if the step is over, or if a variable was given before."""
        if not self.is_open:
            raise RuntimeError("step_bucket: the step is over, expected begin_step() first")
        seen: set[Place] = set()
        for place, label in zip(places, labels, strict=True):
            if place in seen or self.has(place):
                raise ValueError(f"step_bucket: {label} was given before in this step, expected it once")
            seen.add(place)

    def add(self, buckets: Sequence[Bucket]) -> Handle[None]:
        """Take buckets that have been checked: all, or none if a signal handler raises.

        Returns:
            A handle that waits until there is no more to be done before the end of the step.
        """
        parts = [_Part(bucket, self._logs.setdefault(tuple(bucket.places), _cpu.StepLog())) for bucket in buckets]
        handle = Handle(partial(self._begin, parts))
        group = _Group(len(self._groups), parts, handle)
        self._group_of.update({place: group for part in parts for place in part.bucket.places})
        self._groups.append(group)
        if self._speculates:
            self._worker.submit(handle)
        else:
            handle.run()
        return handle

    def _begin(self, parts: list[_Part]) -> None:
        _cpu.set_thread_budget(self._threads)
        for part in parts:
            plan, gradients, hyper, factors, *_ = part.bucket
            if not (self._speculates and part.bucket.is_plain and plan.can_undo(gradients)):
                continue
            guess = _NO_FACTORS
            if self._reads_norms:
                part.norms = plan.norms(gradients, hyper)
                bounds = hyper._replace(global_clip_norm=np.inf)  # as if it was not needed
                guess, is_finite = clip(part.norms, bounds, _ones(factors, part.norms))
                if hyper.require_finite and not is_finite:
                    continue
            plan.step_logged(gradients, hyper, factors, guess, part.log)
            part.used = guess

    @property
    def _parts(self) -> list[_Part]:
        return [part for group in self._groups for part in group.parts]

    # ---- the end ---------------------------------------------------------------------------------------------------

    def finish(self, commit: Callable[[bool], None]) -> bool:
        """Make the step: all of it, or raise and make none.

        If a signal handler raises meanwhile, the step has been made, or it is open still.

        Args:
            commit: Notes the step when the rest has been done; nothing can come between. Its argument is the result.

        Returns:
            Whether it was made: False if gradients had to be finite and are not.

        Raises:
            RuntimeError: A gradient has changed, and the step cannot be undone whole.
        """
        return self._close(partial(self._finish, commit))

    def finish_with(self, work: Callable[[], bool]) -> bool:
        """End a step without buckets by ``work``, which makes all of it or raises; returns what that returns."""
        return self._close(work)

    def abort(self) -> None:
        """Undo what was made early; raises as :meth:`finish` does. A step that is over stays as it is."""
        if self.is_open:
            self._close(self._undo_all)

    def _close(self, work: Callable[[], bool]) -> bool:
        return self._worker.complete(Handle(partial(self._do_last, work)))

    def _do_last(self, work: Callable[[], bool]) -> bool:
        if not self.is_open:  # a signal has cut off the call that waited for the end
            return True
        _cpu.set_thread_budget(self._threads)
        try:
            for group in self._groups:
                group.handle.run()  # of those that a signal has kept from being submitted
            return work()
        finally:
            self.is_open = False
            self._worker.give_back()

    def _finish(self, commit: Callable[[bool], None]) -> bool:
        parts = self._parts
        try:
            for group in self._groups:
                group.handle.result()
            for part in parts:
                if part.used is None:
                    plan, gradients, hyper, *_ = part.bucket
                    plan.check(gradients)  # their memory is where it was
                    part.norms = plan.norms(gradients, hyper) if self._reads_norms else None
            clipped = self._joined(parts)
            if clipped is None:
                self._undo_all()
            wrong = [] if clipped is None else self._wrong(parts, clipped)
        except BaseException:
            self._undo_all()
            raise
        if clipped is None:
            self._guess.note(failed=True)
            commit(False)
            return False
        failed = bool(wrong) or (all(part.used is None for part in parts) and self._would_fail(parts, clipped))
        changed = self._make_again(wrong)
        for part, factors in zip(parts, clipped, strict=True):
            if part.used is None:
                part.bucket.make(factors if len(factors) else None)
        for part in parts:
            part.bucket.note()
        commit(True)
        for key in self._logs.keys() - {tuple(part.bucket.places) for part in parts}:
            del self._logs[key]  # of buckets that came in other steps
        if self._early and self._reads_norms:
            self._guess.note(failed=failed)
            if not self._guess.pays:
                self._logs.clear()
        _require_unchanged(changed, "The step was made")
        return True

    def _wrong(self, parts: list[_Part], clipped: list[Factors]) -> list[tuple[_Part, Factors]]:
        """The parts that were made early with other factors, and the right ones; raises if a gradient has changed."""
        wrong = [
            (part, factors)
            for part, factors in zip(parts, clipped, strict=True)
            if part.used is not None and not _same(part.used, factors)
        ]
        for part, _ in wrong:
            plan, gradients, hyper, factors, *_ = part.bucket
            if plan.changed_since(gradients, hyper, factors, part.log):
                self._undo_all()  # raises
        return wrong

    def _make_again(self, wrong: list[tuple[_Part, Factors]]) -> list[str]:
        """Make parts with the right factors in place of the wrong ones; return labels of what has changed meanwhile."""
        changed: list[str] = []
        for part, right in wrong:
            plan, gradients, hyper, factors, *_ = part.bucket
            assert part.used is not None
            found = plan.undo(gradients, hyper, factors, part.used, part.log, right)
            part.used = right
            changed += part.bucket.labels_of(found)
        return changed

    def _joined(self, parts: list[_Part]) -> list[Factors] | None:
        """For each part the factors of its gradients; None if the step must be skipped."""
        if not self._reads_norms or not parts:
            return [_NO_FACTORS for _ in parts]
        norms = [part.norms for part in parts if part.norms is not None]
        sums = self._join(np.concatenate(norms))
        others = np.concatenate([_ones(part.bucket.factors, n) for part, n in zip(parts, norms, strict=True)])
        places = [place for part in parts for place in part.bucket.places]
        order = sorted(range(len(places)), key=places.__getitem__)
        found, is_finite = clip(sums[order], self._clips, others[order])
        if self._clips.require_finite and not is_finite:
            return None
        clipped = np.empty_like(found)
        clipped[order] = found
        return np.split(clipped, np.cumsum([len(n) for n in norms])[:-1])

    def _would_fail(self, parts: list[_Part], clipped: list[Factors]) -> bool:
        """Whether an early step would have had other factors."""
        if not self._is_global:
            return False
        bounds = self._clips._replace(global_clip_norm=np.inf)
        for part, factors in zip(parts, clipped, strict=True):
            if part.norms is None:
                continue
            alone, _ = clip(part.norms, bounds, _ones(part.bucket.factors, part.norms))
            if not _same(alone, factors):
                return True
        return False

    def _undo_all(self) -> bool:
        self._undo(self._parts)
        return False

    def _undo(self, parts: Sequence[_Part]) -> None:
        """Undo what was made of these, as far as possible."""
        changed: list[str] = []
        for part in parts:
            plan, gradients, hyper, factors, *_ = part.bucket
            used, part.used = part.used, None
            if used is None:
                continue
            try:
                try:
                    found = plan.undo(gradients, hyper, factors, used, part.log)
                except (RuntimeError, TypeError, ValueError):
                    found = plan.undo(_with_memory(plan, gradients), hyper, factors, used, part.log)
                changed += part.bucket.labels_of(found)
            except (RuntimeError, TypeError, ValueError) as error:  # memory of variables that was replaced
                changed.append(str(error))
        _require_unchanged(changed)


def _require_unchanged(labels: Sequence[str], outcome: str = "The step was undone") -> None:
    """Raise if there are labels: of variables whose gradients have changed."""
    if not labels:
        return
    names = ", ".join(labels[:3]) + (" ..." if len(labels) > 3 else "")
    raise RuntimeError(
        f"gradients of {names}: changed since step_bucket() or the backward pass, expected them as they were until the "
        "step ends. "
        f"{outcome}, but moments of these variables have taken the wrong one"
    )


def _with_memory(plan: Plan, gradients: list[AnyGradient]) -> list[AnyGradient]:
    """The gradients, with zeros for those whose memory was taken away since they were checked."""
    usable: list[AnyGradient] = [np.zeros(buffer.shape, np.float32) for buffer in plan.buffers]
    for i, gradient in enumerate(gradients):
        zeros, usable[i] = usable[i], gradient
        try:
            plan.check(usable)
        except (RuntimeError, TypeError, ValueError):
            usable[i] = zeros
    return usable


def _ones(factors: list[float], norms: Norms) -> Factors:
    return np.array(factors or [1.0] * len(norms))


def _same(a: Factors, b: Factors) -> bool:
    return np.array_equal(a, b, True)


@atexit.register
def _abort_all() -> None:
    for ref in _live:
        if (step := ref()) is not None:
            with contextlib.suppress(RuntimeError):
                step.abort()


def check_threads(name: str, value: object) -> int:
    """A number of threads that the library takes, as an int."""
    count = check_count(name, value)
    if count > _cpu.most_threads:
        raise ValueError(f"{name}: {count}, expected an integer from 1 to {_cpu.most_threads}")
    return count
