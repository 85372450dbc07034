"""Parameters that step together, and the native plan that they are stepped with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadam._core.deferred.history import History
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gpu import cuda_module
from fastadam._core.native.plan import Plan, StepHyper
from fastadam.torch._counts import StepCounts, lies_on_gpu
from fastadam.torch._states import HALF, SLOTS
from fastadam.torch._views import View, gradient_like, is_lazy_view, is_plain, local_of

__all__ = ["Kind", "ParameterSet"]


class Kind:
    """How the parameters of a set are stepped."""

    def __init__(self, mode: str, *, rows: bool, amsgrad: bool, decays: bool) -> None:
        self.mode = mode  # sparse_update
        self.rows = rows  # their sparse gradients are rows, not dense ones that are mostly zero
        self.slots = tuple(SLOTS) if amsgrad else ("m", "v")
        self.state_keys = [SLOTS[name] for name in self.slots]
        self.decays = decays


class ParameterSet:
    """Parameters of one group and device with one step count, their states, and a native plan of both.

    Args:
        params: The parameters.
        states: Their states, with torch's keys.
        labels: What messages call them.
        positions: Their places in the group.
        kind: How they are stepped.
        tables: Their histories in a deferred mode, or None for each.
        context: On a GPU, what the set that this one replaces had there.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: list[dict[str, Any]],
        labels: list[str],
        positions: list[int],
        kind: Kind,
        tables: list[History] | list[None],
        context: Any = None,
    ) -> None:
        self.params, self.states, self.labels = params, states, labels
        self.positions, self.kind, self.tables = positions, kind, tables
        self.device = params[0].device
        self.reversed = [-1.0] * len(params)  # factors of gradients to be maximized
        self.counts = StepCounts([state["step"] for state in states])
        self._columns = self._read_columns()
        self._check_slots()
        self._views: dict[int, View] = {}
        for i, row in enumerate(zip(*self._columns, strict=True)):
            if not is_plain(row):
                self._views[i] = View(row, labels[i])
        # Where sparse gradients came before: torch takes a millisecond to say that they cannot be read as dense ones.
        self._sparse: set[int] = set()
        self._half = {i for i, m in enumerate(self._columns[1]) if m.dtype in HALF}
        self.context = context
        self._make_plan()

    # ---- the plan --------------------------------------------------------------------------------------------------

    def _read_columns(self) -> list[list[Tensor]]:
        """The parameters, then each of their slots."""
        return [self.params, *[[state[key] for state in self.states] for key in self.kind.state_keys]]

    def _check_slots(self) -> None:
        for name, column in zip(self.kind.slots, self._columns[1:], strict=True):
            for label, param, slot in zip(self.labels, self.params, column, strict=True):
                found = f"state of {label}: {SLOTS[name]}"
                if not isinstance(slot, Tensor):
                    raise TypeError(f"{found}: {type(slot).__name__}, expected a tensor")
                if slot.shape != param.shape:
                    raise ValueError(f"{found}: shape {tuple(slot.shape)}, expected {tuple(param.shape)}")
                if is_lazy_view(slot):
                    raise ValueError(f"{found}: a conjugated or negated view, expected a tensor of its own")
                if slot.device != param.device:
                    raise ValueError(f"{found}: on {slot.device}, expected {param.device}")

    def _natives(self) -> list[list[Tensor]]:
        """The columns as the plan reads them."""
        if not self._views:
            return self._columns
        columns = [column[:] for column in self._columns]
        for i, view in self._views.items():
            for column, seen in zip(columns, view.read([c[i] for c in self._columns]), strict=True):
                column[i] = seen
        return columns

    def _make_plan(self) -> None:
        native = cuda_module() if self.device.type == "cuda" else _cpu
        params, *slots = self._natives()
        named = dict(zip(self.kind.slots, slots, strict=True))
        self.buffers = [native.Buffer(param, label) for param, label in zip(params, self.labels, strict=True)]
        if self.device.type == "cuda" and self.context is None:
            self.context = native.Context(self.buffers[0].device)
        self.plan = Plan(
            self.buffers,
            named,
            decays=[self.kind.decays] * len(params),
            positions=self.positions,
            lazy=self.kind.mode == "lazy",
            histories=[None if table is None else table.native for table in self.tables],
            context=self.context,
        )
        self._slices = native.Slices

    def is_current(self) -> bool:
        """Whether parameters and states still are the memory that the plan was made of."""
        try:
            self._columns = self._read_columns()
        except KeyError:
            return False
        for i, view in self._views.items():
            if not view.fits([column[i] for column in self._columns]):
                return False
        params, *slots = self._natives()
        return self.plan.holds(params, dict(zip(self.kind.slots, slots, strict=True)))

    def move_to(self, params: list[Tensor], states: list[dict[str, Any]]) -> bool:
        """Go on with other tensors of the same memory; False if they are not."""
        self.params, self.states = params, states
        self.counts = StepCounts([state["step"] for state in states])
        return self.is_current()

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured, from which nothing can be read."""
        return self.context is not None and torch.cuda.is_current_stream_capturing()

    @property
    def counts_on_gpu(self) -> bool:
        """Whether the parameters and their step counts lie on one GPU, which can skip a step by itself."""
        return self.context is not None and self.counts.device == self.device

    def can_count(self, hyper: StepHyper) -> bool:
        """On a GPU: whether it can count its steps, or read a rate, with these betas; not to be asked in a capture."""
        return self.plan.can_count(hyper)

    def rate_on_gpu(self, rate: Any, hyper: StepHyper) -> Tensor | None:
        """A learning rate that the GPU is to read for itself; with betas for which it cannot, the host waits for it."""
        if not lies_on_gpu(rate) or not (self.is_capturing() or self.can_count(hyper)):
            return None
        found: Tensor = rate
        return found

    def set_device_numbers(
        self, rate: Any, grad_scale: Tensor | None = None, found_inf: Tensor | None = None, *, counts: bool = False
    ) -> None:
        """Numbers of the next step that lie on the GPU, or None; ``counts``: so does the number of the step."""
        self.plan.set_device_numbers(rate, grad_scale, found_inf, counts)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def read_gradients(self, gradients: list[Any], *, densify: bool) -> list[Any]:
        """As the plan takes them, as far as it is known without reading each; ``densify``: no rows."""
        self._densify = densify
        for i, view in self._views.items():
            if not gradients[i].is_sparse:
                gradients[i] = view.of(gradient_like(gradients[i], self.params[i], self.labels[i]))
        for i in self._half:
            if gradients[i].dtype != self.params[i].dtype:
                gradients[i] = gradients[i].to(self.params[i].dtype)
        for i in self._sparse:
            if gradients[i].is_sparse:
                gradients[i] = self._rows_of(gradients[i], i)
        return gradients

    def check(self, gradients: list[Any], hyper: StepHyper, factors: list[float]) -> list[Any]:
        """Raise what is wrong with a step; the gradients, converted as far as they have to be."""
        gradients = self.plan.check(gradients, self._converted)
        self.plan.check_numbers(hyper, factors)
        return gradients

    def step(self, gradients: list[Any], hyper: StepHyper, factors: list[float], counter: Any) -> None:
        """Step, or raise what is wrong and change nothing; :meth:`finish` is due once ``counter`` has gone up."""
        for i, view in self._views.items():
            view.load([column[i] for column in self._columns])
        self.plan.step(gradients, hyper, factors, counter, self._converted)

    def finish(self, count: int | Tensor) -> None:
        """Say that a step was made, the ``count``-th; may be repeated if it was cut off.

        A tensor: the count as the GPU has it, which knows whether the step was skipped.
        """
        self._note_written()
        if isinstance(count, Tensor):
            self.counts.follow(count)
        else:
            self.counts.set(count)

    def finish_in_graph(self, found_inf: Tensor | None) -> None:
        """Say that a step was captured, which replays skip unless ``found_inf`` is None or 0."""
        self._note_written()
        self.counts.raise_in_graph(found_inf)

    def _note_written(self) -> None:
        columns = self._columns
        for i, view in self._views.items():
            view.store([column[i] for column in columns])
        written = [tensor for column in columns for tensor in column]
        if self._views:
            written += [local_of(column[i]) for i in self._views for column in columns]
        torch.autograd.graph.increment_version(written)

    def _converted(self, gradient: Tensor, i: int) -> Any:
        """A gradient that the plan cannot read as it is."""
        if gradient.is_sparse:
            self._sparse.add(i)
        readable = self._rows_of(gradient, i) if gradient.is_sparse else self._dense(gradient, i)
        if readable is gradient:
            dtypes = f"{gradient.dtype} {gradient.layout}, expected {self.params[i].dtype}"
            raise TypeError(f"grad of {self.labels[i]}: {dtypes}")
        return readable

    def _dense(self, gradient: Tensor, i: int) -> Tensor:
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        if gradient.is_complex() and not self.params[i].is_complex():
            raise TypeError(f"grad of {self.labels[i]}: {gradient.dtype}, expected {self.params[i].dtype}")
        real = self.buffers[i].dtype
        found = gradient.detach().resolve_conj().resolve_neg().to(getattr(torch, real))
        return found.clone(memory_format=torch.contiguous_format)

    def _rows_of(self, gradient: Tensor, i: int) -> Any:
        """A sparse gradient as rows, or made dense where every row moves and rows cannot be read."""
        label, param = f"grad of {self.labels[i]}", self.params[i]
        if gradient.shape != param.shape:
            raise ValueError(f"{label}: shape {tuple(gradient.shape)}, expected {tuple(param.shape)}")
        reason = ""
        if gradient.sparse_dim() != 1:
            reason = f"{gradient.sparse_dim()} sparse axes, expected the first alone"
        elif i in self._views:
            reason = "for a parameter that is not contiguous and real, expected one that is"
        elif i in self._half:
            reason = f"with moments of {self._columns[1][i].dtype}, expected moments_dtype=torch.float32"
        if reason and self.kind.rows:
            raise ValueError(f"{label}: sparse with sparse_update={self.kind.mode!r} and {reason}")
        if reason or self._densify:
            dense = gradient.to_dense()
            return self._views[i].of(dense).contiguous() if i in self._views else dense
        values = gradient._values().detach().resolve_neg().to(param.dtype).contiguous()
        indices = gradient._indices()[0]
        return self._slices(values, indices.numpy() if indices.is_cpu else indices)
