"""Parameters that step together, and the native plan that steps them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastadam._core.backend import _cpu
from fastadam._core.cuda_module import cuda_module
from fastadam._core.plan import Plan, StepHyper
from fastadam._core.runtime import late_error
from fastadam._core.types import AnyGradient, NativeObject, SparseUpdate
from fastadam.torch._checks import ParamState
from fastadam.torch._deferred import Table
from fastadam.torch._layout import View, gradient_like, is_lazy_view, is_plain, local_of
from fastadam.torch._state import HALF, SLOTS
from fastadam.torch._step_count import StepCounts, is_on_gpu

__all__ = ["Kind", "ParameterSet"]


class Kind(NamedTuple):
    """How the parameters of a set are stepped."""

    mode: SparseUpdate
    rows: bool  # sparse gradients are rows; otherwise they are dense gradients that are mostly zero
    amsgrad: bool
    decays: bool  # by decoupled weight decay, if there is any

    @property
    def slots(self) -> tuple[str, ...]:
        """What native code calls the moments."""
        return tuple(SLOTS) if self.amsgrad else ("m", "v")


class ParameterSet:
    """Parameters of one group and device with one step count, their states, and a native plan of both.

    Args:
        params: The parameters.
        states: Their states, with torch's keys.
        labels: What error messages call them.
        positions: Their places in the group.
        kind: How they are stepped.
        tables: In a deferred mode, the table that each of them is.
        counts: The step counts in the states, if there is an object of them.
        context: On a GPU, the context of the set that this one replaces.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: list[ParamState],
        labels: list[str],
        positions: list[int],
        kind: Kind,
        tables: list[Table],
        counts: StepCounts | None = None,
        context: NativeObject = None,
    ) -> None:
        self.params, self.states, self.labels = params, states, labels
        self.positions, self.kind, self.tables = positions, kind, tables
        self.device = params[0].device
        self.reversed = [-1.0] * len(params)  # factors of gradients to be maximized
        self.counts = counts or StepCounts([state["step"] for state in states])
        self.is_new = True  # no step was made yet, and the states may not be the optimizer's yet
        self.is_captured = False  # by a CUDA graph, whose memory this is from then on
        # Of native steps. It goes up where no signal can come between; a GPU says later which step failed.
        self.counter = np.zeros((), np.int64)
        self._is_scaled = False  # whether some step was made, only the GPU knows
        self._converts = False  # a gradient of the last step could not be read as it was
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
        self.make_plan()

    # ---- the plan --------------------------------------------------------------------------------------------------

    def _read_columns(self) -> list[list[Tensor]]:
        """The parameters, then each of their slots."""
        keys = [SLOTS[name] for name in self.kind.slots]
        return [self.params, *[[state[key] for state in self.states] for key in keys]]

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

    def make_plan(self) -> None:
        """Make the native plan; again after the numbers of a table's history have changed."""
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
            histories=[table.history.native for table in self.tables] or None,
            context=self.context,
        )
        self._slices = native.Slices

    def is_current(self) -> bool:
        """Whether the states still have the tensors, and all tensors the memory, that the plan was made of."""
        if self.is_captured or not self.counts.are_in(self.states):
            return False
        if any(table.history.is_full for table in self.tables):
            return False
        try:
            self._columns = self._read_columns()
        except KeyError:
            return False
        for i, view in self._views.items():
            if not view.fits([column[i] for column in self._columns]):
                return False
        params, *slots = self._natives()
        return self.plan.holds(params, dict(zip(self.kind.slots, slots, strict=True)))

    def move_to(self, params: list[Tensor], states: list[ParamState]) -> bool:
        """Continue with other tensors that have the same memory; False if they have not."""
        self.params, self.states = params, states
        self.counts = StepCounts([state["step"] for state in states])
        return self.is_current()

    # ---- repeating the last step natively --------------------------------------------------------------------------

    @property
    def can_be_followed(self) -> bool:
        """Whether the last step was so plain that :class:`RepeatedSteps` can repeat it."""
        is_special = self._views or self.tables or self._converts
        return self.context is None and not is_special and self.counts.are_plain

    def follow(self, group_params: list[Tensor]) -> bool:
        """Let the plan compare parameters and states by itself from here on."""
        keys = tuple(SLOTS[name] for name in self.kind.slots)
        return self.plan.follow(group_params, self.states, keys)

    @property
    def written(self) -> list[Tensor]:
        """Every tensor that a step writes, for torch's version counters."""
        written = [tensor for column in self._columns for tensor in column]
        return written + self.counts.written

    # ---- on a GPU --------------------------------------------------------------------------------------------------

    @property
    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured, when nothing can be read."""
        return self.context is not None and torch.cuda.is_current_stream_capturing()

    @property
    def counts_on_gpu(self) -> bool:
        """Whether the parameters and their step counts are on one GPU, which can skip a step by itself."""
        return self.context is not None and self.counts.device == self.device

    def can_count(self, hyper: StepHyper) -> bool:
        """Whether the GPU can count its steps, or read a rate, with these betas; do not call it during a capture."""
        return self.plan.can_count(hyper)

    def rate_on_gpu(self, rate: float | Tensor, hyper: StepHyper) -> Tensor | None:
        """A learning rate that the GPU can read by itself; None if the host has to read it."""
        if not isinstance(rate, Tensor) or not is_on_gpu(rate) or not (self.is_capturing or self.can_count(hyper)):
            return None
        return rate

    def set_device_numbers(
        self,
        rate: Tensor | None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        counts: bool = False,
    ) -> None:
        """Set the numbers that the GPU reads in the next step; ``counts``: it also knows the number of the step."""
        self.plan.set_device_numbers(rate, grad_scale, found_inf, counts)

    def raise_late(self) -> None:
        """Raise what a GPU found wrong with a step after it had returned."""
        failure = None if self.context is None or self.is_capturing else self.context.take_failure()
        if failure is None:
            return
        calls, message = failure
        if self._is_scaled or self.context.is_captured:  # the host does not know how many steps were made since
            self.counts.set(self.context.step())
        else:
            self.counts.take_back(int(self.counter) - calls)
            self.counter[...] = calls
        raise late_error(message, "that step")

    # ---- a step ----------------------------------------------------------------------------------------------------

    def read_gradients(self, gradients: list[Tensor], *, densify: bool) -> list[AnyGradient]:
        """The gradients as the plan takes them, as far as that is known in advance; ``densify``: without rows."""
        self._densify = densify
        self._converts = False
        found: list[AnyGradient] = gradients
        for i, view in self._views.items():
            if not gradients[i].is_sparse:
                found[i] = view.of(gradient_like(gradients[i], self.params[i], self.labels[i]))
        for i in self._half:
            if gradients[i].dtype != self.params[i].dtype:
                self._converts = True
                found[i] = gradients[i].to(self.params[i].dtype)
        for i in self._sparse:
            if gradients[i].is_sparse:
                self._converts = True
                found[i] = self._rows_of(gradients[i], i)
        return found

    def check(self, gradients: list[AnyGradient], hyper: StepHyper, factors: list[float]) -> list[AnyGradient]:
        """Raise what is wrong with a step; return the gradients, converted as far as necessary."""
        gradients = self.plan.check(gradients, self._converted)
        self.plan.check_numbers(hyper, factors)
        return gradients

    def step(
        self,
        gradients: list[AnyGradient],
        hyper: StepHyper,
        factors: list[float],
        counter: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Make a step, or raise what is wrong and change nothing; call :meth:`finish` if the counter has gone up."""
        for i, view in self._views.items():
            view.load([column[i] for column in self._columns])
        self.plan.step(gradients, hyper, factors, self.counter if counter is None else counter, self._converted)

    def finish(self, count: int | Tensor) -> None:
        """Note that the ``count``-th step was made; calling it again, after a signal, is harmless.

        The count is a tensor if only the GPU knows it.
        """
        self._note_written()
        if isinstance(count, Tensor):
            self.counts.follow(count)
        else:
            self.counts.set(count)
        for table in self.tables:
            table.note_step()

    def count_after(self, found_inf: Tensor | None) -> Tensor | None:
        """The step count after the next step, on the GPU if that decides whether to skip the step; else None."""
        if found_inf is None:
            return None
        self._is_scaled = True
        return self.counts.after(found_inf)

    def finish_in_graph(self, found_inf: Tensor | None) -> None:
        """Note that a step was captured; a replay skips it unless ``found_inf`` is None or 0."""
        self._note_written()
        self.counts.raise_in_graph(found_inf)
        self.is_captured = True

    def _note_written(self) -> None:
        columns = self._columns
        for i, view in self._views.items():
            view.store([column[i] for column in columns])
        written = [tensor for column in columns for tensor in column]
        if self._views:
            written += [local_of(column[i]) for i in self._views for column in columns]
        torch.autograd.graph.increment_version(written)

    def _converted(self, gradient: Tensor, i: int) -> AnyGradient:
        """A gradient that the plan cannot read directly."""
        self._converts = True
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

    def _rows_of(self, gradient: Tensor, i: int) -> AnyGradient:
        """A sparse gradient as rows, or as a dense one where every row moves and rows cannot be read."""
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
