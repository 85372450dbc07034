"""Gradients by JAX."""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.autodiff.tape import Gathered, Loss, Refresh, Resolve, Tape, check_loss, seed_of
from fastadam._core.variable import Variable

__all__ = ["JaxTape"]

_gathered_from: weakref.WeakSet[Variable] = weakref.WeakSet()


class _UnexpectedGather(BaseException):
    """Raised through a loss that gathers rows which nobody asked for before."""


class JaxTape(Tape):
    """JAX: the loss is traced as a function of the variables and rows it reads, which must be known before it runs.

    A run that only asks for them goes before where variables are not known, or have been gathered from.
    """

    def __init__(
        self, variables: Sequence[Variable] | None, refresh: Refresh, expected: Sequence[Gathered] = ()
    ) -> None:
        super().__init__(variables, refresh)
        self._jax = importlib.import_module("jax")
        self._numpy = importlib.import_module("jax.numpy")
        self._known = variables
        self._expected = expected
        self._asks = False
        self._values: dict[int, Any] = {}
        self._rows: Sequence[Any] = ()
        self._read: Sequence[Variable] = ()
        self._depends = False

    def leaf(self, variable: Variable) -> Any:
        return self._values[id(variable)] if id(variable) in self._values else self.constant(variable)

    def rows(self, variable: Variable, ids: npt.NDArray[Any]) -> Any:
        if self._asks:
            known = self._values.get(id(variable))
            return self.array(self.memory(variable, ids)) if known is None else known[ids]
        at = len(self._gathered)
        if at == len(self._rows) and not self._expected:
            _gathered_from.add(variable)
            raise _UnexpectedGather
        expected, known_ids, _ = self._expected[at] if at < len(self._rows) else (None, ids, None)
        if expected is not variable or not np.array_equal(known_ids, ids):
            raise ValueError("loss: gathers other rows in its second run, expected the same; draw them outside of it")
        return self._rows[at]

    def array(self, values: npt.NDArray[Any]) -> Any:
        # A copy: JAX may share NumPy's memory and compute later, when the variable has been updated.
        return self._numpy.array(values, copy=True)

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: Any) -> list[Any]:
        if self._known is not None and not any(variable in _gathered_from for variable in self._known):
            with contextlib.suppress(_UnexpectedGather), self._precision(self._known):
                return self._pull_back(loss, self._known, upstream)
        return self._ask(loss, resolve)._pull_back_precisely(loss, upstream)

    def _ask(self, loss: Loss, resolve: Resolve) -> JaxTape:
        """A tape that knows what the loss reads."""
        asking = JaxTape(self._known, self._refresh)
        asking._asks = True
        if self._known is None:
            asking.run(loss)
        else:
            with self._precision(self._known):
                shapes = [self._jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self._known]
                self._jax.eval_shape(lambda values: asking._traced(loss, self._known or (), values, (), None), shapes)
        wanted = resolve()
        tape = JaxTape(wanted, self._refresh, [g for g in asking._gathered if any(g[0] is v for v in wanted)])
        tape._read = [variable for variable, _ in asking._seen.values() if tape._wants(variable)]
        return tape

    def _pull_back_precisely(self, loss: Loss, upstream: Any) -> list[Any]:
        assert self._known is not None
        with self._precision(self._known):
            return self._pull_back(loss, self._read, upstream)

    def _traced(self, loss: Loss, variables: Sequence[Variable], values: Any, rows: Any, upstream: Any) -> Any:
        self._values = {id(variable): array for variable, array in zip(variables, values, strict=True)}
        self._rows = rows
        result = self.run(loss)
        check_loss(result, upstream)
        self._depends = isinstance(result, self._jax.core.Tracer)
        return self._numpy.asarray(result)

    def _pull_back(self, loss: Loss, read: Sequence[Variable], upstream: Any) -> list[Any]:
        assert self._known is not None
        distinct = list({id(variable): variable for variable in read}.values())
        values = [self.constant(variable) for variable in distinct]
        rows = [self.array(self.memory(variable, ids)) for variable, ids, _ in self._expected]
        result, pull_back = self._jax.vjp(lambda v, r: self._traced(loss, distinct, v, r, upstream), values, rows)
        if not self._depends:
            return [None] * len(self._known)
        seed = self._numpy.asarray(seed_of(upstream, np.empty(result.shape)), result.dtype)
        of_values, of_rows = pull_back(seed)
        found = {id(variable): np.asarray(part) for variable, part in zip(distinct, of_values, strict=True)}
        of_read = [found[id(v)] if self.leaf_of(v) is not None else None for v in self._known]
        return self.gradients(self._known, of_read, [np.asarray(part) for part in of_rows])

    def _precision(self, variables: Sequence[Variable]) -> contextlib.AbstractContextManager[Any]:
        """JAX computes in double only where it is allowed to; here, for double variables."""
        if all(variable.dtype != np.float64 for variable in variables):
            return contextlib.nullcontext()
        if hasattr(self._jax, "enable_x64"):
            return self._jax.enable_x64(True)  # type: ignore[no-any-return]
        return importlib.import_module("jax.experimental").enable_x64()  # type: ignore[no-any-return]
