"""``exclude_from_weight_decay``: variables that do not decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastadam._core.common.checks import check_list, shown
from fastadam._core.common.patterns import check_pattern, found
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, buffers_of, key_of

if TYPE_CHECKING:
    from fastadam._core.common.types import VariableLike

__all__ = ["Exclusions"]


@dataclass(frozen=True)
class Exclusions:
    """Variables named by their memory or by patterns in their names."""

    keys: frozenset[Key] = frozenset()
    patterns: tuple[str, ...] = ()
    buffers: tuple[_cpu.Buffer, ...] = field(default=(), compare=False)  # keep memory alive, so no address is reused

    @classmethod
    def of(cls, var_list: Iterable[VariableLike] | None, var_names: Iterable[str] | None) -> Exclusions:
        """Check the arguments of ``exclude_from_weight_decay``."""
        variables = (
            [] if var_list is None else [var_list] if isinstance(var_list, str) else check_list("var_list", var_list)
        )
        if any(isinstance(variable, str) for variable in variables):
            raise TypeError(
                f"var_list: {shown(variables, 60)}, expected variables; patterns of names go to var_names=[...]"
            )
        if isinstance(var_names, str):
            raise TypeError(f"var_names: {shown(var_names)}, expected a list of patterns")
        names = [] if var_names is None else check_list("var_names", var_names)
        for i, name in enumerate(names):
            try:
                check_pattern(name)
            except ValueError as error:
                raise ValueError(f"var_names[{i}]: {error}") from None
        buffers = buffers_of(variables, range(len(variables)))
        return cls(frozenset(map(key_of, buffers)), tuple(names), tuple(buffers))

    def __bool__(self) -> bool:
        return bool(self.patterns or self.keys)

    def spare(self, names: Sequence[str | None], buffers: Sequence[_cpu.Buffer]) -> list[bool]:
        """For each variable whether nothing excludes it."""
        return [
            key_of(buffer) not in self.keys and not self._excludes(name or "")
            for name, buffer in zip(names, buffers, strict=True)
        ]

    def with_variable(self, buffer: _cpu.Buffer) -> Exclusions:
        """The same and another variable."""
        return Exclusions(self.keys | {key_of(buffer)}, self.patterns, (*self.buffers, buffer))

    def without(self, key: Key) -> Exclusions:
        """The same without the variable with this key, whose memory they keep alive."""
        buffers = tuple(known for known in self.buffers if key_of(known) != key)
        return Exclusions(self.keys - {key}, self.patterns, buffers)

    def _excludes(self, name: str) -> bool:
        return any(found(pattern, name) for pattern in self.patterns) if name else False

    def missing(self, names: Iterable[str], met: Set[Key] | None) -> list[str]:
        """What was named and excludes no variable.

        ``met``: keys of the variables met so far; None if others may still come.
        """
        patterns = [
            f"var_names[{i}] {shown(pattern)}"
            for i, pattern in enumerate(self.patterns)
            if not any(found(pattern, name) for name in names)
        ]
        listed = enumerate(map(key_of, self.buffers))
        absent = [f"var_list[{i}]" for i, key in listed if met is not None and key not in met]
        return patterns + absent
