"""Gradients of PyTorch as a native plan takes them: dense tensors, or the rows of sparse ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadam._core.common.types import AnyGradient
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gpu import cuda_module
from fastadam.torch._layout import View, gradient_like, require_same_field
from fastadam.torch._state import Kind
from fastadam.torch._stored import HALF

__all__ = ["GradientReader"]


_NONE: frozenset[int] = frozenset()


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
        labels: Sequence[str],
        kind: Kind,
        moments: list[Tensor],
        views: dict[int, View],
        dtypes: Sequence[torch.dtype],
    ) -> None:
        self._params, self._labels, self._kind = params, labels, kind
        self._moments, self._views, self._dtypes = moments, views, dtypes
        self.were_converted = False  # some gradient of the last step could not be read as it was
        self._densify = False
        are_random = kind.stored.moments is not None
        self._half = () if are_random else tuple([i for i, moment in enumerate(moments) if moment.dtype in HALF])
        # Where sparse gradients came before: torch takes a millisecond to say that they cannot be read as dense ones.
        self._sparse = _NONE
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
            self._sparse |= {i}
        readable = self._rows_of(gradient, i) if gradient.is_sparse else self._dense(gradient, i)
        if readable is gradient:
            dtypes = f"{gradient.dtype} {gradient.layout}, expected {self._params[i].dtype}"
            raise TypeError(f"grad of {self._labels[i]}: {dtypes}")
        return readable

    def _dense(self, gradient: Tensor, i: int) -> Tensor:
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        if i not in self._views:
            require_same_field(gradient, self._params[i], self._labels[i])
        found = gradient.detach().resolve_conj().resolve_neg().to(self._dtypes[i])
        return found.clone(memory_format=torch.contiguous_format)

    def _require_float32(self, label: str) -> None:
        """Raise ValueError if states are too small for sparse gradients."""
        stored = self._kind.stored
        if stored.moments is not None:
            raise ValueError(
                f"{label}: sparse with moments={stored.moments!r}, expected dense gradients, or float32_for= "
                "that names this parameter"
            )
        if stored.split:
            raise ValueError(
                f"{label}: sparse with master='split', expected dense gradients, or master='float32' in its group"
            )

    def _rows_of(self, gradient: Tensor, i: int) -> AnyGradient:
        """A sparse gradient as rows, or as a dense one where every row moves and rows cannot be read."""
        label, param = f"grad of {self._labels[i]}", self._params[i]
        if gradient.shape != param.shape:
            raise ValueError(f"{label}: shape {tuple(gradient.shape)}, expected {tuple(param.shape)}")
        require_same_field(gradient, param, self._labels[i])
        self._require_float32(label)
        reason = ""
        if gradient.sparse_dim() == 0 or (gradient.sparse_dim() > 1 and not self._kind.rows):
            reason = f"{gradient.sparse_dim()} sparse axes, expected one or more"
        elif i in self._views:
            reason = "for a parameter that is not contiguous and real, expected one that is"
        elif i in self._half:
            reason = f"with moments of {self._moments[i].dtype}, expected moments='float32'"
        elif self._kind.stored.rounds:
            reason = "with stochastic_rounding=True, expected False"
        if reason and self._kind.rows:
            raise ValueError(f"{label}: sparse with sparse_update={self._kind.mode!r} and {reason}")
        if reason or self._densify:
            dense = gradient.to_dense()
            return self._views[i].of(dense).contiguous() if i in self._views else dense
        values = gradient._values().detach().resolve_neg().to(self._dtypes[i])
        indices = gradient._indices()
        if self._kind.axes > 1:
            rows = _elements(indices, gradient.shape)
        elif gradient.sparse_dim() > 1:
            rows, values = _whole_rows(indices, values, label, gradient.shape)
        else:
            rows = indices[0]
        return self._slices(values.contiguous(), rows.numpy() if rows.is_cpu else rows)


def _are_inside(indices: Tensor, shape: torch.Size) -> Tensor:
    sizes = torch.tensor(shape[: len(indices)], device=indices.device).unsqueeze(1)
    return ((indices >= 0) & (indices < sizes)).all(0)


def _elements(indices: Tensor, shape: torch.Size) -> Tensor:
    """Places in the flattened axes; -1, which is refused later, for indices outside of the shape."""
    places = indices[0]
    for axis in range(1, len(indices)):
        places = places * shape[axis] + indices[axis]
    return torch.where(_are_inside(indices, shape), places, -1)


def _whole_rows(indices: Tensor, values: Tensor, label: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The rows that elements are in, and their gradients, which are zero elsewhere."""
    outside = (~_are_inside(indices, shape)).nonzero()
    if len(outside):
        found = indices[:, outside[0, 0]].tolist()
        raise ValueError(f"{label}: index {found}, expected one inside of {tuple(shape)}")
    rows, place = indices[0].unique(return_inverse=True)
    whole = values.new_zeros((len(rows), *shape[1:]))
    return rows, whole.index_put_((place, *indices[1:]), values, accumulate=True)
