"""Gradients of PyTorch as a native plan takes them: dense tensors, or the rows of sparse ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadam._core.common.types import AnyGradient
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gpu import cuda_module
from fastadam.torch._layout import View, gradient_like
from fastadam.torch._state import HALF, Kind

__all__ = ["GradientReader"]


class GradientReader:
    """Reads the gradients of a set of parameters.

    Args:
        params: The parameters.
        labels: What error messages call them.
        kind: How they are stepped.
        moments: One moment of each.
        views: How the plan sees those that it cannot read directly.
        dtypes: The dtypes that the plan has for them.
    """

    def __init__(
        self,
        params: list[Tensor],
        labels: list[str],
        kind: Kind,
        moments: list[Tensor],
        views: dict[int, View],
        dtypes: list[torch.dtype],
    ) -> None:
        self._params, self._labels, self._kind = params, labels, kind
        self._moments, self._views, self._dtypes = moments, views, dtypes
        self.were_converted = False  # some gradient of the last step could not be read as it was
        self._densify = False
        self._half = {i for i, moment in enumerate(moments) if moment.dtype in HALF}
        # Where sparse gradients came before: torch takes a millisecond to say that they cannot be read as dense ones.
        self._sparse: set[int] = set()
        self._slices = (cuda_module() if params[0].device.type == "cuda" else _cpu).Slices

    def read(self, gradients: list[Tensor], *, densify: bool) -> list[AnyGradient]:
        """The gradients as the plan takes them, as far as that is known in advance; ``densify``: without rows."""
        self._densify = densify
        self.were_converted = False
        found: list[AnyGradient] = gradients
        for i, view in self._views.items():
            if not gradients[i].is_sparse:
                found[i] = view.of(gradient_like(gradients[i], self._params[i], self._labels[i]))
        for i in self._half:
            if gradients[i].dtype != self._params[i].dtype:
                self.were_converted = True
                found[i] = gradients[i].to(self._params[i].dtype)
        for i in self._sparse:
            if gradients[i].is_sparse:
                self.were_converted = True
                found[i] = self._rows_of(gradients[i], i)
        return found

    def convert(self, gradient: Tensor, i: int) -> AnyGradient:
        """A gradient that the plan cannot read directly."""
        self.were_converted = True
        if gradient.is_sparse:
            self._sparse.add(i)
        readable = self._rows_of(gradient, i) if gradient.is_sparse else self._dense(gradient, i)
        if readable is gradient:
            dtypes = f"{gradient.dtype} {gradient.layout}, expected {self._params[i].dtype}"
            raise TypeError(f"grad of {self._labels[i]}: {dtypes}")
        return readable

    def _dense(self, gradient: Tensor, i: int) -> Tensor:
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        if gradient.is_complex() and not self._params[i].is_complex():
            raise TypeError(f"grad of {self._labels[i]}: {gradient.dtype}, expected {self._params[i].dtype}")
        found = gradient.detach().resolve_conj().resolve_neg().to(self._dtypes[i])
        return found.clone(memory_format=torch.contiguous_format)

    def _rows_of(self, gradient: Tensor, i: int) -> AnyGradient:
        """A sparse gradient as rows, or as a dense one where every row moves and rows cannot be read."""
        label, param = f"grad of {self._labels[i]}", self._params[i]
        if gradient.shape != param.shape:
            raise ValueError(f"{label}: shape {tuple(gradient.shape)}, expected {tuple(param.shape)}")
        reason = ""
        if gradient.sparse_dim() != 1:
            reason = f"{gradient.sparse_dim()} sparse axes, expected the first alone"
        elif i in self._views:
            reason = "for a parameter that is not contiguous and real, expected one that is"
        elif i in self._half:
            reason = f"with moments of {self._moments[i].dtype}, expected moments_dtype=torch.float32"
        if reason and self._kind.rows:
            raise ValueError(f"{label}: sparse with sparse_update={self._kind.mode!r} and {reason}")
        if reason or self._densify:
            dense = gradient.to_dense()
            return self._views[i].of(dense).contiguous() if i in self._views else dense
        values = gradient._values().detach().resolve_neg().to(param.dtype).contiguous()
        indices = gradient._indices()[0]
        return self._slices(values, indices.numpy() if indices.is_cpu else indices)
