"""Gradients by PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.autodiff.tape import Loss, Refresh, Resolve, Tape, check_loss, seed_of
from fastadam._core.variable import Variable

__all__ = ["TorchTape"]


class TorchTape(Tape):
    """PyTorch on the CPU: tensors that share the memory of the variables."""

    def __init__(self, variables: Sequence[Variable] | None, refresh: Refresh) -> None:
        super().__init__(variables, refresh)
        self._torch = importlib.import_module("torch")

    def run(self, loss: Loss) -> Any:
        with self._torch.enable_grad():
            return super().run(loss)

    def leaf(self, variable: Variable) -> Any:
        return self.constant(variable).requires_grad_()

    def rows(self, variable: Variable, ids: npt.NDArray[Any]) -> Any:
        return self.array(self.memory(variable, ids)).requires_grad_()

    def array(self, values: npt.NDArray[Any]) -> Any:
        if values.dtype.name == "bfloat16":  # NumPy's bfloat16 is unknown to PyTorch; its bits are not
            return self._torch.from_numpy(values.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(values)

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: Any) -> list[Any]:
        result, variables = self.run(loss), resolve()
        check_loss(result, upstream)
        leaves = [*(self.leaf_of(variable) for variable in variables), *(rows for _, _, rows in self._gathered)]
        of = [*variables, *(variable for variable, _, _ in self._gathered)]
        known = [i for i, leaf in enumerate(leaves) if leaf is not None]
        found: list[Any] = [None] * len(leaves)
        if known and getattr(result, "requires_grad", False):
            seed = self._torch.from_numpy(seed_of(upstream, np.empty(result.shape))).to(result.dtype)
            inputs = [leaves[i] for i in known]
            parts = self._torch.autograd.grad(result, inputs, seed, allow_unused=True)
            for i, part in zip(known, parts, strict=True):
                found[i] = None if part is None else self._to_numpy(part, of[i])
        return self.gradients(variables, found[: len(variables)], found[len(variables) :])

    def _to_numpy(self, tensor: Any, variable: Variable) -> Any:
        dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        if dense.dtype == self._torch.bfloat16:
            return dense.view(self._torch.int16).numpy().view(variable.dtype)
        return dense.numpy()
