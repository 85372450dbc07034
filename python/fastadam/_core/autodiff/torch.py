"""Gradients by PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np

from fastadam._core.autodiff.tape import Loss, Refresh, Resolve, Tape, check_loss, seed_of
from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.variable import Variable

__all__ = ["TorchTape"]


class TorchTape(Tape):
    """PyTorch on the CPU: tensors that share the memory of the variables."""

    def __init__(self, variables: Sequence[Variable] | None, refresh: Refresh) -> None:
        super().__init__(variables, refresh)
        self._torch = importlib.import_module("torch")

    def run(self, loss: Loss) -> AnyArray:
        with self._torch.enable_grad():
            return super().run(loss)

    def leaf(self, variable: Variable) -> AnyArray:
        return self.constant(variable).requires_grad_()

    def rows(self, variable: Variable, ids: HostArray) -> AnyArray:
        return self.array(self.memory(variable, ids)).requires_grad_()

    def array(self, values: HostArray) -> AnyArray:
        if values.dtype.name == "bfloat16":  # PyTorch does not accept NumPy's bfloat16, but has the same bits
            return self._torch.from_numpy(values.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(values)

    def differentiate(self, loss: Loss, resolve: Resolve, upstream: HostArray | None) -> list[AnyArray]:
        result, variables = self.run(loss), resolve()
        check_loss(result, upstream)
        leaves = [*(self.leaf_of(variable) for variable in variables), *(rows for _, _, rows in self.gathered)]
        owners = [*variables, *(variable for variable, _, _ in self.gathered)]
        read = [i for i, leaf in enumerate(leaves) if leaf is not None]
        gradients: list[AnyArray] = [None] * len(leaves)
        if read and getattr(result, "requires_grad", False):
            seed = self._torch.from_numpy(seed_of(upstream, np.empty(result.shape))).to(result.dtype)
            inputs = [leaves[i] for i in read]
            tensors = self._torch.autograd.grad(result, inputs, seed, allow_unused=True)
            for i, tensor in zip(read, tensors, strict=True):
                gradients[i] = None if tensor is None else self._to_numpy(tensor, owners[i])
        return self.gradients(variables, gradients[: len(variables)], gradients[len(variables) :])

    def _to_numpy(self, tensor: AnyArray, variable: Variable) -> AnyArray:
        dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        if dense.dtype == self._torch.bfloat16:
            return dense.view(self._torch.int16).numpy().view(variable.dtype)
        return dense.numpy()
