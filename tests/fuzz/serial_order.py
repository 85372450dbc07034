"""Calls of several threads at once, and the search for a serial order that explains all that they returned.

A call has a number from before it began and one from after it returned: one that had returned before another began has
to come first. An order explains the calls if each, made on one thread, returns or raises what it did, and the state at
the end is the same. (This is linearizability: M. Herlihy, J. Wing, 1990.)
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MOST_REPLAYS = 10_000


class Operation(NamedTuple):
    name: str
    run: Callable[[Any], Any]  # of a world; what it returns is compared
    changes: bool = True


@dataclass
class Call:
    operation: Operation
    begun: int = 0
    ended: int = 0
    found: Any = None

    def __str__(self) -> str:
        return f"{self.begun:3} - {self.ended:3}  {self.operation.name}: {str(self.found)[:60]}"


def outcome(operation: Operation, world: Any) -> Any:
    """What a call returned or raised."""
    try:
        return operation.run(world)
    except Exception as error:
        return f"{type(error).__name__}: {re.sub('0x[0-9a-f]+', '0x', str(error))}"


def run_at_once(world: Any, programs: Sequence[Sequence[Operation]]) -> list[Call]:
    """Run each program on a thread of its own."""
    clock, barrier = itertools.count(), threading.Barrier(len(programs))
    calls = [[Call(operation) for operation in program] for program in programs]

    def work(own: list[Call]) -> None:
        barrier.wait()
        for call in own:
            call.begun = next(clock)
            call.found = outcome(call.operation, world)
            call.ended = next(clock)

    threads = [threading.Thread(target=work, args=(own,)) for own in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a thread hangs"
    finally:
        sys.setswitchinterval(interval)
    return [call for own in calls for call in own]


class NoOrderError(AssertionError):
    """No serial order explains the calls."""


class UndecidedError(Exception):
    """There are too many orders to try all."""


def explain(
    calls: Sequence[Call], new_world: Callable[[], Any], state_of: Callable[[Any], list[Any]], final: Any
) -> int:
    """Find a serial order.

    Returns:
        The number of calls that were made to find it.

    Raises:
        NoOrderError: There is none.
        UndecidedError: None was found in many attempts.
    """
    changing = [call for call in calls if call.operation.changes]
    reading = [call for call in calls if not call.operation.changes]
    replays, longest, seen = 0, [], set()

    def listed() -> str:
        in_order = sorted(calls, key=lambda call: call.begun)
        return "\n".join(f"{' ' if call in longest else '?'} {call}" for call in in_order)

    def replay(order: list[Call]) -> Any:
        nonlocal replays
        world = new_world()
        for call in order:
            outcome(call.operation, world)
        replays += len(order) + 1
        return world

    def read_now(world: Any, changed: list[Call], read: list[Call]) -> list[Call]:
        """The calls that change nothing and fit here: none is ever the worse for being made now."""
        rest = [call for call in reading if call not in read]
        waiting = [call for call in changing if call not in changed]
        fits = []
        for call in sorted(rest, key=lambda call: call.begun):
            others = [*waiting, *(other for other in rest if other not in fits)]
            is_first = all(other.ended > call.begun for other in others if other is not call)
            if is_first and outcome(call.operation, world) == call.found:
                fits.append(call)
        return fits

    def search(world: Any, changed: list[Call], read: list[Call]) -> bool:
        nonlocal replays, longest
        read = read + read_now(world, changed, read)
        longest = max(longest, [*changed, *read], key=len)
        waiting = [call for call in changing if call not in changed]
        state = state_of(world)
        if not waiting:
            return len(read) == len(reading) and state == final
        known = (frozenset(map(id, changed)), frozenset(map(id, read)), hash(tuple(state)))
        if known in seen:  # the same calls in another order came to the same
            return False
        seen.add(known)
        unread = [call for call in reading if call not in read]
        for call in sorted(waiting, key=lambda call: call.ended):  # most often the right order
            if any(other.ended < call.begun for other in (*waiting, *unread)):
                continue
            if replays > MOST_REPLAYS:
                raise UndecidedError(listed())
            world = replay(changed)
            replays += 1
            if outcome(call.operation, world) == call.found and search(world, [*changed, call], read):
                return True
        return False

    if not search(new_world(), [], []):
        raise NoOrderError(f"no serial order explains more than {len(longest)} of these calls:\n{listed()}")
    return replays
