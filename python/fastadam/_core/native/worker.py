"""Threads for work that no signal handler may cut off: Python runs these on the main thread only."""

from __future__ import annotations

import _thread
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

__all__ = ["Handle", "Worker", "is_worker"]

Result = TypeVar("Result")


class Handle(Generic[Result]):
    """Work that runs once, and what waits for it. A signal handler that raises leaves no lock held.

    (``concurrent.futures.Future`` waits with a condition, whose lock Ctrl-C can leave held.)
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work
        self._found: list[Result] = []
        self._error: BaseException | None = None
        self._is_done = False
        self._waiting: list[_thread.LockType] = []  # one for each thread that waits

    def done(self) -> bool:
        """Whether the work is done, or has failed."""
        return self._is_done

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the work.

        Args:
            timeout: The most seconds to wait; None for no limit.

        Raises:
            TimeoutError: It is not done yet.
        """
        self.wait(timeout)
        if self._error is not None:
            raise self._error
        return self._found[0]

    def wait(self, timeout: float | None = None) -> None:
        """Like :meth:`result`, without the result."""
        gate = _thread.allocate_lock()
        gate.acquire()
        self._waiting.append(gate)
        if not self._is_done and not gate.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError(f"result: not done after {timeout} s")

    def run(self) -> None:
        """Do the work here, unless that was done before."""
        if self._work is None:
            return
        try:
            self._found.append(self._work())
        except BaseException as error:
            self._error = error
        self._work = None
        self._is_done = True
        for gate in self._waiting:
            gate.release()


class _Shared:
    """What a worker and its thread have in common; the thread does not keep the worker alive."""

    def __init__(self, tasks: deque[Handle[Any]]) -> None:
        self.tasks = tasks
        self.tokens: SimpleQueue[bool] = SimpleQueue()  # True: there may be tasks; False: end
        self.owner = _thread.allocate_lock()  # held by the thread
        self.busy = _thread.allocate_lock()  # held while a task runs


_live: dict[int, weakref.ref[Worker]] = {}
_idle: list[Worker] = []
_MOST_IDLE = 4


class Worker:
    """Does tasks one after the other on a thread of its own, which ends with the worker.

    A process that forks waits for the task that is being done. Its child has a thread of its own, which goes on with
    the others.
    """

    def __init__(self) -> None:
        self._shared = _Shared(deque())
        _live[id(self)] = weakref.ref(self)

    @classmethod
    def take(cls) -> Worker:
        """One that is idle, or a new one."""
        try:
            return _idle.pop()
        except IndexError:
            return cls()

    def give_back(self) -> None:
        """Let others take it, now or when its tasks are done."""
        if len(_idle) < _MOST_IDLE:
            _idle.append(self)

    def submit(self, task: Handle[Result]) -> None:
        """Have a task done after those before; a signal can come before or after that, or before :meth:`wake`."""
        self._shared.tasks.append(task)
        self.wake()

    def complete(self, task: Handle[Result]) -> Result:
        """Have a task done, and return its result. If a signal handler raises meanwhile, the task is done first."""
        try:
            self.submit(task)
            task.wait()
        except BaseException:
            while self.has(task):
                try:
                    self.wake()
                    task.wait()
                except BaseException:
                    continue
            raise
        return task.result()

    def has(self, task: Handle[Result]) -> bool:
        """Whether a task was submitted and is not done yet."""
        return task in self._shared.tasks

    def wake(self) -> None:
        """Have all tasks done that were submitted."""
        shared = self._shared
        shared.tokens.put(True)
        if shared.owner.locked():
            return
        try:
            _thread.start_new_thread(_work, (shared,))
        except RuntimeError:  # there are too many, or the interpreter ends
            with shared.owner:
                _work_off(shared)

    def __del__(self, live: dict[int, weakref.ref[Worker]] = _live) -> None:
        """End the thread. The global name is gone by then if the interpreter ends."""
        live.pop(id(self), None)
        shared: _Shared | None = vars(self).get("_shared")  # none if a signal has cut off the constructor
        if shared is not None:
            shared.tokens.put(False)

    def renew(self) -> None:
        """In a forked child, where the thread does not exist."""
        self._shared = _Shared(self._shared.tasks)
        if self._shared.tasks:
            self.wake()


_of_thread = threading.local()


def is_worker() -> bool:
    """Whether this thread is that of a worker: whoever waits for it may hold a lock for it."""
    return hasattr(_of_thread, "works")


def _work(shared: _Shared) -> None:
    if not shared.owner.acquire(blocking=False):
        return  # two were started
    _of_thread.works = True
    while shared.tokens.get():
        _work_off(shared)


def _work_off(shared: _Shared) -> None:
    while shared.tasks:
        with shared.busy:
            shared.tasks[0].run()
            shared.tasks.popleft()


# ---- forks -----------------------------------------------------------------------------------------------------------

_paused: list[_Shared] = []


def _pause() -> None:
    for reference in list(_live.values()):
        worker = reference()
        if worker is not None:
            shared = worker._shared
            shared.busy.acquire()
            _paused.append(shared)


def _go_on() -> None:
    while _paused:
        _paused.pop().busy.release()


def _renew_all() -> None:
    _paused.clear()
    for reference in list(_live.values()):
        worker = reference()
        if worker is not None:
            worker.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_pause, after_in_parent=_go_on, after_in_child=_renew_all)
