"""Gradients by JAX."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.autodiff.tape import Gathered, Loss, Refresh, Resolve, Tape, check_loss, seed_of
from fastadam._core.variable import Variable

__all__ = ["JaxTape"]


class JaxTape(Tape):
    """JAX: the loss runs twice, first without numbers to learn what it reads, then as a function of that."""

    def __init__(self, variables: Sequence[Variable] | None, refresh: Refresh) -> None:
        super().__init__(variables, refresh)
        self._jax = importlib.import_module("jax")
        self._numpy = importlib.import_module("jax.numpy")
        self._variables = variables
        self._values: dict[int, Any] = {}  # by id of the variable
        self._expected: list[Gathered] = []
        self._rows: Sequence[Any] = ()
        self._depends = False

    def leaf(self, variable: Variable) -> Any:
        _require_same(id(variable) in self._values, "reads other variables")
        return self._values[id(variable)]

    def rows(self, variable: Variable, ids: npt.NDArray[Any]) -> Any:
        at = len(self._gathered)
        expected, known_ids, _ = self._expected[at] if at < len(self._expected) else (None, ids, None)
        _require_same(expected is variable and np.array_equal(known_ids, ids), "gathers other rows")
        return self._rows[at]

    def array(self, values: npt.NDArray[Any]) -> Any:
        # A copy: JAX may share NumPy's memory and compute later, when the variable has been updated.
        return self._numpy.array(values, copy=True)

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: Any) -> list[Any]:
        asking = _AskingTape(self._variables, self._refresh)
        with self._precision(self._variables or ()):
            asking.ask(loss)
        variables = resolve()
        self._wanted = {id(variable) for variable in variables}
        self._expected = [gathered for gathered in asking._gathered if self._wants(gathered[0])]
        read = [variable for variable, _ in asking._seen.values() if self._wants(variable)]
        with self._precision(variables):
            return self._pull_back(loss, variables, read, upstream)

    def _pull_back(
        self, loss: Loss, variables: Sequence[Variable], read: Sequence[Variable], upstream: Any
    ) -> list[Any]:
        values = {id(variable): self.constant(variable) for variable in read}
        rows = [self.array(self.memory(variable, ids)) for variable, ids, _ in self._expected]
        result, pull_back = self._jax.vjp(lambda v, r: self._traced(loss, v, r, upstream), values, rows)
        if not self._depends:
            return [None] * len(variables)
        seed = self._numpy.asarray(seed_of(upstream, np.empty(result.shape)), result.dtype)
        of_values, of_rows = pull_back(seed)
        found = {key: np.asarray(part) for key, part in of_values.items()}
        return self.gradients(variables, [found.get(id(v)) for v in variables], [np.asarray(part) for part in of_rows])

    def _traced(self, loss: Loss, values: dict[int, Any], rows: Sequence[Any], upstream: Any) -> Any:
        self._values, self._rows = values, rows
        result = self.run(loss)
        check_loss(result, upstream)
        _require_same(values.keys() <= self._seen.keys(), "reads other variables")
        _require_same(len(self._gathered) == len(rows), "gathers other rows")
        self._depends = isinstance(result, self._jax.core.Tracer)
        return self._numpy.asarray(result)

    def _precision(self, variables: Sequence[Variable]) -> contextlib.AbstractContextManager[Any]:
        """JAX computes in double only where it is allowed to; here, for double variables."""
        if all(variable.dtype != np.float64 for variable in variables):
            return contextlib.nullcontext()
        if hasattr(self._jax, "enable_x64"):
            return self._jax.enable_x64(True)  # type: ignore[no-any-return]
        return importlib.import_module("jax.experimental").enable_x64()  # type: ignore[no-any-return]


class _AskingTape(JaxTape):
    """Notes what a loss reads, by a run of ``jax.eval_shape``: what depends on the variables has no numbers there."""

    def ask(self, loss: Loss) -> None:
        """Run the loss."""

        def run(number: Any) -> None:
            self._number = number
            with self._jax.ensure_compile_time_eval():  # what does not depend on them keeps its numbers
                self.run(loss)

        self._jax.eval_shape(run, np.float32(0))

    def leaf(self, variable: Variable) -> Any:
        self._refresh(variable, None)
        return self._numpy.full_like(variable._value, self._number)

    def rows(self, variable: Variable, ids: npt.NDArray[Any]) -> Any:
        shape = (*ids.shape, *variable.shape[1:])
        return self._numpy.full_like(variable._value, self._number, shape=shape)


def _require_same(is_same: bool, what: str) -> None:
    if not is_same:
        raise ValueError(f"loss: {what} in its second run, expected the same; draw them outside of it")
