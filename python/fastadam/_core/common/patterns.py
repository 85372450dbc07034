"""Regular expressions matched without backtracking: a pattern read from a file must not be able to hang a step.

The syntax is that of ``re``, which takes exponential time for patterns such as ``(a+)+$``. Here a pattern is a
nondeterministic automaton, whose possible states are followed through the text together (Thompson, "Regular expression
search algorithm", CACM 1968): the time is at most proportional to the states times the text's length, and to its square
for the states of parts that look ahead or behind, which are few. Single characters and anchors are left to ``re``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fastadam._core.common.checks import shown

__all__ = ["check_pattern", "found"]

_MOST_STATES = 2000
_LOOKING_COUNTS_AS = 20  # states, for one of a part that looks ahead or behind


def check_pattern(pattern: object) -> None:
    """Raise ValueError for what is not a pattern, or one that cannot be matched without backtracking."""
    if not isinstance(pattern, str):
        raise ValueError(f"{shown(pattern, 60)}, expected a pattern, a string")
    try:
        _compiled(pattern)
    except RecursionError:
        raise ValueError(f"{shown(pattern, 60)}, expected a pattern (its groups are nested too deeply)") from None
    except (re.error, OverflowError) as error:
        raise ValueError(f"{shown(pattern, 60)}, expected a pattern ({error})") from None
    except _UnsupportedError as error:
        expected = "a pattern that can be matched without backtracking"
        raise ValueError(f"{shown(pattern, 60)} has {error}, expected {expected}") from None


@functools.lru_cache(maxsize=4096)
def found(pattern: str, text: str) -> bool:
    """Whether ``re.search`` finds the pattern in the text."""
    return _compiled(pattern).search(text)


class _UnsupportedError(Exception):
    """A construct that no automaton can follow."""


@dataclass(eq=False)
class _State:
    """Goes on to ``next`` without reading if ``holds``; with ``reads`` it first reads a character of that kind."""

    next: list[_State] = field(default_factory=list)
    reads: re.Pattern[str] | None = None
    holds: Callable[[_Run, int], bool] | None = None
    is_end: bool = False


class _Run:
    """One text, and what is known of its positions."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.looked: dict[tuple[int, int], bool] = {}

    def ends(self, start: _State, begin: int, *, anywhere: bool, until: int | None = None) -> bool:
        """Whether a match begins at ``begin``, or anywhere from there on, and ends; if given, at ``until``."""
        last = len(self.text) if until is None else until
        states: set[_State] = set()
        for at in range(begin, last + 1):
            if anywhere or at == begin:
                states.add(start)
            states = self._closure(states, at)
            if any(state.is_end for state in states) and until in (None, at):
                return True
            if at < last:
                character = self.text[at]
                states = {s.next[0] for s in states if s.reads is not None and s.reads.fullmatch(character)}
                if not states and not anywhere:
                    return False
        return False

    def _closure(self, states: set[_State], at: int) -> set[_State]:
        """All states that can be reached without reading."""
        reached, waiting = set(states), list(states)
        while waiting:
            state = waiting.pop()
            if state.reads is not None or (state.holds is not None and not state.holds(self, at)):
                continue
            for following in state.next:
                if following not in reached:
                    reached.add(following)
                    waiting.append(following)
        return reached

    def looks(self, start: _State, at: int, *, ahead: bool) -> bool:
        """Whether a match begins here, or ends here."""
        key = (id(start), at)
        if key not in self.looked:
            if ahead:
                self.looked[key] = self.ends(start, at, anywhere=False)
            else:
                self.looked[key] = self.ends(start, 0, anywhere=True, until=at)
        return self.looked[key]


class _Automaton:
    def __init__(self, start: _State) -> None:
        self._start = start

    def search(self, text: str) -> bool:
        return _Run(text).ends(self._start, 0, anywhere=True)


Build = Callable[[_State], _State]  # makes the states of a part of the pattern, before the state that follows it


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> _Automaton:
    re.compile(pattern)  # syntax errors in the words of re
    parser = _Parser(pattern)
    return _Automaton(parser.alternatives(re.RegexFlag(0))(_State(is_end=True)))


class _Parser:
    """Reads a pattern that ``re`` has found good."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at, self._count, self._weight = pattern, 0, 0, 1

    def alternatives(self, flags: re.RegexFlag) -> Build:
        """``a|b|c``, to the end or to a closing parenthesis."""
        branches = []
        while True:
            branch, flags = self._sequence(flags)
            branches.append(branch)
            if not self._skip("|"):
                break
        return lambda after: self._state(next=[branch(after) for branch in branches])

    def _sequence(self, flags: re.RegexFlag) -> tuple[Build, re.RegexFlag]:
        """Parts one after the other, and the flags, which ``(?i)`` changes."""
        parts: list[Build] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            if change := self._match(r"\(\?([a-zA-Z]+)\)"):
                flags = _changed(flags, change[1], "")
            elif not self._match(_COMMENT):
                parts.append(self._repeated(self._part(flags)))

        def build(after: _State) -> _State:
            for part in reversed(parts):
                after = part(after)
            return after

        return build, flags

    def _repeated(self, part: Build) -> Build:
        """The part with the quantifier that follows it, perhaps after comments."""
        while self._match(_COMMENT):
            pass
        quantifier = self._match(r"[*+?]|\{(?!\})(\d*)(,?)(\d*)\}")
        if not quantifier:
            return part
        if self._skip("+"):
            raise _UnsupportedError("a possessive quantifier")
        self._skip("?")  # whether it is greedy makes no difference
        if quantifier[0] in "*+?":
            least, most = int(quantifier[0] == "+"), 1 if quantifier[0] == "?" else None
        else:
            least = int(quantifier[1] or 0)
            most = least if not quantifier[2] else int(quantifier[3]) if quantifier[3] else None

        def build(after: _State) -> _State:
            if most is None:
                loop = self._state()
                loop.next = [part(loop), after]
                state = loop
            else:
                state = after
                for _ in range(most - least):
                    state = self._state(next=[part(state), after])
            for _ in range(least):
                state = part(state)
            return state

        return build

    def _part(self, flags: re.RegexFlag) -> Build:
        """A character, a class, an anchor or a group."""
        if self._pattern[self._at] == "(":
            return self._group(flags)
        if anchor := self._match(r"[$^]|\\[AZzbB]"):
            holds = re.compile(anchor[0], flags)
            return lambda after: self._state(next=[after], holds=lambda run, at: holds.match(run.text, at) is not None)
        if self._match(r"\\(?:[1-9](?![0-7]{2})|[89])"):
            raise _UnsupportedError("a backreference")
        kind = self._match(_ONE_CHARACTER)
        text = kind[0] if kind else re.escape(self._pattern[self._at])
        self._at += not kind
        reads = re.compile(text, flags)
        return lambda after: self._state(next=[after], reads=reads)

    def _group(self, flags: re.RegexFlag) -> Build:
        if self._match(r"\(\?\(|\(\?P=|\(\?>"):
            raise _UnsupportedError("a backreference, conditional or atomic group")
        if look := self._match(r"\(\?(<?)([=!])"):
            weight, self._weight = self._weight, _LOOKING_COUNTS_AS
            start = self._inside(flags)(_State(is_end=True))
            self._weight = weight
            expected, ahead = look[2] == "=", not look[1]
            return lambda after: self._state(
                next=[after], holds=lambda run, at: run.looks(start, at, ahead=ahead) is expected
            )
        if scoped := self._match(r"\(\?([a-zA-Z]*)(?:-([a-zA-Z]+))?:"):
            return self._inside(_changed(flags, scoped[1], scoped[2] or ""))
        self._match(r"\((?:\?P<\w+>)?")
        return self._inside(flags)

    def _inside(self, flags: re.RegexFlag) -> Build:
        inner = self.alternatives(flags)
        self._skip(")")
        return inner

    def _state(
        self,
        next: list[_State] | None = None,  # noqa: A002  the name of the field
        reads: re.Pattern[str] | None = None,
        holds: Callable[[_Run, int], bool] | None = None,
    ) -> _State:
        self._count += self._weight
        if self._count > _MOST_STATES:
            where = " in parts that look ahead or behind" if self._weight > 1 else ""
            raise _UnsupportedError(f"more than {_MOST_STATES // self._weight} states{where}")
        return _State(next or [], reads, holds)

    def _match(self, expression: str) -> re.Match[str] | None:
        match = re.compile(expression).match(self._pattern, self._at)
        self._at = match.end() if match else self._at
        return match

    def _skip(self, character: str) -> bool:
        is_there = self._pattern.startswith(character, self._at)
        self._at += is_there
        return is_there


_COMMENT = r"\(\?#[^)]*\)"
_ONE_CHARACTER = (
    r"\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}|[0-7]{3}|[^0-9])"
    r"|\."
)


def _changed(flags: re.RegexFlag, on: str, off: str) -> re.RegexFlag:
    for letter in on + off:
        if letter not in "imsau":
            raise _UnsupportedError(f"the flag {letter}")
    for letter in on:
        flag = re.RegexFlag[letter.upper()]
        others = re.ASCII | re.UNICODE if letter in "au" else re.RegexFlag(0)
        flags = (flags & ~others) | flag
    for letter in off:
        flags &= ~re.RegexFlag[letter.upper()]
    return flags
