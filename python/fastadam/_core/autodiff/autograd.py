"""Gradients by HIPS autograd."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from fastadam._core.autodiff.tape import Loss, Refresh, Resolve, Tape, check_loss, seed_of
from fastadam._core.common.types import AnyArray, Foreign, HostArray
from fastadam._core.native.variable import Variable

__all__ = ["AutogradTape"]


class AutogradTape(Tape):
    """HIPS autograd: every variable is a root of the graph, made when the loss first reads it."""

    def __init__(self, variables: Sequence[Variable] | None, refresh: Refresh) -> None:
        super().__init__(variables, refresh)
        importlib.import_module("autograd.numpy")
        self._core = importlib.import_module("autograd.core")
        self._tracer = importlib.import_module("autograd.tracer")
        self._tracer.Box.types.update({Variable, *map(type, variables or ())})
        # Above the traces around the loss, below those inside it. autograd's own stack is not touched: threads share
        # it without a lock.
        self._trace = self._tracer.trace_stack.top + 0.5

    def leaf(self, variable: Variable) -> AnyArray:
        return self._root(self.memory(variable))

    def rows(self, variable: Variable, ids: HostArray) -> AnyArray:
        return self._root(self.memory(variable, ids))

    def _root(self, values: HostArray) -> AnyArray:
        return self._tracer.new_box(values, self._trace, self._core.VJPNode.new_root())

    def array(self, values: HostArray) -> HostArray:
        return values

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: HostArray | None) -> list[AnyArray]:
        result, variables = self.run(loss), resolve()
        if not self._tracer.isbox(result) or result._trace != self._trace:
            check_loss(result, upstream)
            return [None] * len(variables)
        if self._tracer.isbox(result._value):
            raise TypeError("loss: depends on an array that another run of autograd traces, expected only Variables")
        check_loss(result._value, upstream)
        of_root = self._backward(result._node, seed_of(upstream, result._value))
        leaves = [self.leaf_of(variable) for variable in variables]
        of_value = [None if leaf is None else of_root.get(leaf._node) for leaf in leaves]
        return self.gradients(variables, of_value, [of_root.get(rows._node) for _, _, rows in self.gathered])

    def _backward(self, end: Foreign, upstream: HostArray) -> dict[Foreign, AnyArray]:
        """Autograd's backward pass, which here returns the gradients of all roots."""
        waiting = {end: (upstream, False)}
        roots = {}
        for node in importlib.import_module("autograd.util").toposort(end):
            gradient, _ = waiting.pop(node)
            if not node.parents:
                roots[node] = gradient
            for parent, part in zip(node.parents, node.vjp(gradient), strict=False):
                waiting[parent] = self._core.add_outgrads(waiting.get(parent), part)
        return roots
