"""Gradients by JAX."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence

import numpy as np

from fastadam._core.autodiff.tape import Gathered, Loss, Refresh, Resolve, Tape, check_loss, seed_of
from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.variable import Variable, unwrap

__all__ = ["JaxTape"]


class JaxTape(Tape):
    """JAX: the loss runs twice, first on abstract values to learn what it reads, then as a function of those inputs."""

    def __init__(self, variables: Sequence[Variable] | None, refresh: Refresh) -> None:
        super().__init__(variables, refresh)
        self._jax = importlib.import_module("jax")
        self._numpy = importlib.import_module("jax.numpy")
        self._variables = variables
        self._values: dict[int, AnyArray] = {}  # by id of the variable
        self._expected: list[Gathered] = []
        self._rows: Sequence[AnyArray] = ()
        self._depends = False

    def leaf(self, variable: Variable) -> AnyArray:
        _require_same(id(variable) in self._values, "reads other variables")
        return self._values[id(variable)]

    def rows(self, variable: Variable, ids: HostArray) -> AnyArray:
        at = len(self.gathered)
        table, first_ids, _ = self._expected[at] if at < len(self._expected) else (None, ids, None)
        _require_same(table is variable and np.array_equal(first_ids, ids), "gathers other rows")
        return self._rows[at]

    def array(self, values: HostArray) -> AnyArray:
        # A copy: JAX may share NumPy's memory and compute later, after the variable was updated.
        return self._numpy.array(values, copy=True)

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: HostArray | None) -> list[AnyArray]:
        recorder = _RecordingTape(self._variables, self._refresh)
        with self._precision(self._variables or ()):
            recorder.record(loss)
        variables = resolve()
        self._wanted = {id(variable) for variable in variables}
        self._expected = [gathered for gathered in recorder.gathered if self._wants(gathered[0])]
        read = [variable for variable, _ in recorder.seen.values() if self._wants(variable)]
        with self._precision(variables):
            return self._pull_back(loss, variables, read, upstream)

    def _pull_back(
        self, loss: Loss, variables: Sequence[Variable], read: Sequence[Variable], upstream: HostArray | None
    ) -> list[AnyArray]:
        values = {id(variable): self.constant(variable) for variable in read}
        rows = [self.array(self.memory(variable, ids)) for variable, ids, _ in self._expected]
        result, pull_back = self._jax.vjp(lambda v, r: self._traced(loss, v, r, upstream), values, rows)
        if not self._depends:
            return [None] * len(variables)
        seed = self._numpy.asarray(seed_of(upstream, np.empty(result.shape)), result.dtype)
        of_values, of_rows = pull_back(seed)
        dense = {key: np.asarray(gradient) for key, gradient in of_values.items()}
        return self.gradients(variables, [dense.get(id(v)) for v in variables], [np.asarray(g) for g in of_rows])

    def _traced(
        self, loss: Loss, values: dict[int, AnyArray], rows: Sequence[AnyArray], upstream: HostArray | None
    ) -> AnyArray:
        self._values, self._rows = values, rows
        result = self.run(loss)
        check_loss(result, upstream)
        _require_same(values.keys() <= self.seen.keys(), "reads other variables")
        _require_same(len(self.gathered) == len(rows), "gathers other rows")
        self._depends = isinstance(result, self._jax.core.Tracer)
        return self._numpy.asarray(result)

    def _precision(self, variables: Sequence[Variable]) -> contextlib.AbstractContextManager[object]:
        """Allow JAX to compute in float64 if a variable is float64."""
        if all(variable.dtype != np.float64 for variable in variables):
            return contextlib.nullcontext()
        if hasattr(self._jax, "enable_x64"):
            return self._jax.enable_x64(True)  # type: ignore[no-any-return]
        return importlib.import_module("jax.experimental").enable_x64()  # type: ignore[no-any-return]


class _RecordingTape(JaxTape):
    """Records what a loss reads in ``jax.eval_shape``, where all that depends on the variables is abstract."""

    def record(self, loss: Loss) -> None:
        """Run the loss."""

        def run(number: AnyArray) -> None:
            self._number = number
            with self._jax.ensure_compile_time_eval():  # all that does not depend on the variables is concrete
                self.run(loss)

        self._jax.eval_shape(run, np.float32(0))

    def leaf(self, variable: Variable) -> AnyArray:
        self._refresh(variable, None)
        return self._numpy.full_like(unwrap(variable), self._number)

    def rows(self, variable: Variable, ids: HostArray) -> AnyArray:
        shape = (*ids.shape, *variable.shape[1:])
        return self._numpy.full_like(unwrap(variable), self._number, shape=shape)


def _require_same(is_same: bool, what: str) -> None:
    if not is_same:
        raise ValueError(f"loss: {what} in its second run, expected the same; make random choices outside of the loss")
