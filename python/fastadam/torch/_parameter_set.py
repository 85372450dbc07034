"""Parameters that step together, and the native plan that steps them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import numpy as np
import torch
from torch import Tensor

from fastadam._core.common.types import AnyGradient, Foreign
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gpu import cuda_module, late_error
from fastadam._core.native.plan import Factors, Plan, StepHyper
from fastadam.torch._checks import Group, ParamState
from fastadam.torch._copies import Copies
from fastadam.torch._deferred import Table
from fastadam.torch._formats import check_seed
from fastadam.torch._gradients import GradientReader
from fastadam.torch._layout import ALONE, Turn, View, flattened, is_lazy_view, is_plain, local_of
from fastadam.torch._state import Kind, check_slots
from fastadam.torch._step_count import StepCounts, is_on_gpu, whole_count
from fastadam.torch._stored import MASTER, SCALES

__all__ = ["ParameterSet"]


class ParameterSet:
    """Parameters of one group and device, their states, and a native plan of both.

    They have one step count on a GPU and if they are tables whose rows wait; otherwise each has its own.

    Args:
        params: The parameters.
        states: Their states, with torch's keys.
        labels: What error messages call them.
        positions: Their places in the group.
        kind: How they are stepped.
        tables: In a deferred mode, the table that each of them is.
        turn: When they are stepped among others that share memory with them.
        counts: The step counts in the states, if there is an object of them.
        context: On a GPU, the context of the set that this one replaces.
        copies: The tensors that receive rounded copies of the parameters; None for none.
        measures: Each step measures what it does to the parameters.
        numbers: The parameters' numbers in the optimizer, from which stochastic rounding derives; None for none.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: list[ParamState],
        labels: list[str],
        positions: list[int],
        kind: Kind,
        tables: Sequence[Table],
        turn: Turn = ALONE,
        counts: StepCounts | None = None,
        context: Foreign = None,
        *,
        copies: Copies | None = None,
        measures: bool = False,
        numbers: list[int] | None = None,
    ) -> None:
        self.params, self.states, self.labels = params, states, labels
        self.positions, self.kind, self.tables, self.turn = positions, kind, tables, turn
        self.copies = Copies(params, [], []) if copies is None else copies
        self._measures, self._numbers = measures, numbers
        self._keys = kind.slots
        self.device = params[0].device
        self.counts = counts or StepCounts([state["step"] for state in states])
        self.is_new = True  # no step was made yet, and the states may not be the optimizer's yet
        self.is_captured = False  # by a CUDA graph, whose memory this is from then on
        # Of native steps. It goes up where no signal can come between; a GPU says later which step failed.
        self.counter = np.zeros((), np.int64)
        self._is_scaled = False  # whether some step was made, only the GPU knows
        self._columns = self._read_columns()
        keys = [key for key in self._keys.values() if key not in SCALES.values()]
        self._shaped = 1 + len(keys)  # columns whose tensors have the shapes of the parameters
        check_slots([MASTER, *keys], self._columns[: self._shaped], params, labels, kind.stored)
        if kind.stored.is_small:
            for param, state, label in zip(params, states, labels, strict=True):
                kind.stored.check_slots(param, state, label)
        self._views: dict[int, View] = {}
        for i, label in enumerate(labels):
            if not is_plain(row := self._row(i)):
                self._views[i] = View(row, label)
        self.context = context
        self.make_plan()
        dtypes = tuple([getattr(torch, buffer.dtype) for buffer in self.buffers])
        self._gradients = GradientReader(params, labels, kind, self._columns[1], self._views, dtypes)

    # ---- the plan --------------------------------------------------------------------------------------------------

    def _read_columns(self) -> list[list[Tensor]]:
        """The parameters, or masters in their place, then each of their slots."""
        keys = self._keys.values()
        return [self.copies.stepped(self.states), *[[state[key] for state in self.states] for key in keys]]

    def _row(self, i: int) -> list[Tensor]:
        """What a step reads and writes of parameter i besides its count, scales and gradient; last its copy, if any."""
        row = [column[i] for column in self._columns[: self._shaped]]
        receivers = self.copies.receivers
        return [*row, receivers[i]] if receivers and receivers[i] is not None else row

    def _natives(self) -> tuple[list[list[Tensor]], Sequence[Tensor | None]]:
        """The columns and the receivers of copies as the plan reads them."""
        axes = self.kind.axes
        if not self._views and axes == 1:
            return self._columns, self.copies.receivers
        columns = [[flattened(t, axes) for t in column] if axes > 1 else column[:] for column in self._columns]
        receivers = [None if t is None else flattened(t, axes) if axes > 1 else t for t in self.copies.receivers]
        for i, view in self._views.items():
            seen = view.read(self._row(i))
            for column, tensor in zip(columns[: self._shaped], seen, strict=False):
                column[i] = tensor
            if len(seen) > self._shaped:
                receivers[i] = seen[-1]
        return columns, receivers

    def make_plan(self) -> None:
        """Make the native plan; again after the numbers of a table's history have changed."""
        native = cuda_module() if self.device.type == "cuda" else _cpu
        (params, *slots), receivers = self._natives()
        named = dict(zip(self._keys, slots, strict=True))
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
            copies=[None if t is None else t.detach() for t in receivers],  # they may refer to the optimizer
            context=self.context,
            stochastic_moments=self.kind.stored.moments == "bfloat16",
            stochastic_variables=self.kind.stored.rounds,
            numbers=self._numbers,
            names=self._keys,
        )
        if self._measures:
            self.plan.set_telemetry(True)

    def is_current(self, computed: Sequence[Tensor | None] | None = None) -> bool:
        """Whether the states still have the tensors, and all tensors the memory, that the plan was made of.

        Args:
            computed: For each parameter of the group None or the tensor that receives its copy; None for none.
        """
        if self.is_captured or not self.counts.are_in(self.states):
            return False
        if not self.copies.are([] if computed is None else [computed[place] for place in self.positions]):
            return False
        if any(table.history.is_full for table in self.tables):
            return False
        before = self._columns
        try:
            self._columns = self._read_columns()
        except KeyError:
            return False
        for old, new in zip(before, self._columns, strict=True):
            if all(map(is_, old, new)):
                continue
            if any(not isinstance(tensor, Tensor) or is_lazy_view(tensor) for tensor in new):
                self._columns = before
                return False
        for i, view in self._views.items():
            if not view.fits(self._row(i)):
                return False
        (params, *slots), receivers = self._natives()
        return self.plan.holds(params, dict(zip(self._keys, slots, strict=True)), receivers)

    def move_to(self, params: list[Tensor], states: list[ParamState]) -> bool:
        """Continue with other tensors that have the same memory; False if they have not."""
        self.params, self.states = params, states
        self.copies = Copies(params, [], [])
        self.counts = StepCounts([state["step"] for state in states])
        return self.is_current()

    # ---- repeating the last step natively --------------------------------------------------------------------------

    @property
    def can_be_followed(self) -> bool:
        """Whether the last step was so plain that :class:`RepeatedSteps` can repeat it."""
        is_special = self._views or self.tables or self.kind.axes > 1 or self._gradients.were_converted
        is_special = is_special or self.kind.stored.is_small
        return self.context is None and not is_special and self.counts.are_plain and self.turn.is_alone

    @property
    def is_plain(self) -> bool:
        """Whether a step is one native call, with nothing before or after it, that can be undone.

        Undoing a step rounds the copies again, which does not bring back what they were if that was something else.
        """
        are_copies_lost = self.copies.written and (self.kind.mode != "dense" or not self.copies.are_rounded)
        is_special = self._views or self.tables or self.kind.axes > 1 or are_copies_lost
        return self.context is None and not is_special and self.turn.is_alone

    def follow(self) -> bool:
        """Have the plan compare the states by itself from here on; False if it cannot."""
        return self.plan.follow(self.states, tuple(self._keys.values()), self.copies.masters(self.states))

    @property
    def written(self) -> list[Tensor]:
        """Every tensor that a step writes, for torch's version counters."""
        written = [tensor for column in self._columns for tensor in column]
        return [*written, *self.copies.written, *self.counts.written]

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

    def numbers_of(self, group: Group, step: int, gradient_scale: float) -> StepHyper:
        """The numbers of a step with the options of a group, which are checked; on a GPU without the rate.

        The epsilon of rows is not bias-corrected, as in ``torch.optim.SparseAdam``.
        """
        (beta_1, beta_2), weight_decay = group["betas"], float(group["weight_decay"])
        decoupled = group["decoupled_weight_decay"]
        if weight_decay and not decoupled and self.kind.rows:
            raise ValueError(
                f"weight_decay: {weight_decay} with sparse_update={self.kind.mode!r}, expected 0 or "
                "decoupled_weight_decay=True, for parameters with sparse gradients"
            )
        return StepHyper(
            step=step,
            learning_rate=float(group["lr"]) if self.context is None else 0.0,
            beta_1=float(beta_1),
            beta_2=float(beta_2),
            epsilon=float(group["eps"]),
            gradient_scale=gradient_scale,
            weight_decay=weight_decay if decoupled else 0.0,
            l2=0.0 if decoupled else weight_decay,
            epsilon_corrected=not self.kind.rows,
            seed=check_seed(group["seed"]) if "seed" in group else 0,
        )

    def factors_of(self, group: Group) -> list[float]:
        """The factors of the gradients besides their scale; empty for 1."""
        return [-1.0] * len(self.params) if group["maximize"] else []

    def read_gradients(self, gradients: list[Tensor], *, densify: bool) -> list[AnyGradient]:
        """The gradients as the plan takes them; ``densify``: without rows."""
        return self._gradients.read(gradients, densify=densify)

    def check(
        self, gradients: list[AnyGradient], hyper: StepHyper, factors: list[float], steps: list[int] | None = None
    ) -> list[AnyGradient]:
        """Raise what is wrong with a step; return the gradients, converted as far as necessary."""
        gradients = self.plan.check(gradients, self._gradients.convert)
        for step in {hyper.step} if steps is None else set(steps):
            self.plan.check_numbers(hyper._replace(step=step), factors)
        return gradients

    def step(
        self,
        gradients: list[AnyGradient],
        hyper: StepHyper,
        factors: list[float],
        steps: list[int] | None = None,
        clip_factors: Factors | None = None,
    ) -> bool:
        """Make a step, or raise what is wrong and change nothing; call :meth:`finish` if the counter has gone up.

        Each parameter makes its own of ``steps``; for None all make that of ``hyper``. ``clip_factors`` are of
        gradients whose norms were joined with those of other sets.

        Returns:
            False, with nothing changed, if ``hyper`` requires finite gradients and they are not.
        """
        self.copies.take_written(self.states)
        for i, view in self._views.items():
            view.load(self._row(i))
        if steps is None:
            return self.plan.step(gradients, hyper, factors, self.counter, self._gradients.convert, clip_factors)
        self.plan.step_apart(gradients, hyper, factors, self.counter, self._gradients.convert, steps, clip_factors)
        return True

    def finish(self, count: int | list[int] | Tensor) -> None:
        """Note that the ``count``-th step was made; calling it again, after a signal, is harmless.

        The count is a list if the parameters have different ones, and a tensor if only the GPU knows it.
        """
        self._note_written()
        if isinstance(count, Tensor):
            self.counts.follow(count)
        elif isinstance(count, list):
            self.counts.set_each(count)
        else:
            self.counts.set(count)
        for table in self.tables:
            table.note_step()

    @property
    def counts_may_differ(self) -> bool:
        """Whether one step can be of another number for each parameter."""
        return self.context is None and not self.tables

    def next_steps(self, counts: list[float]) -> list[int]:
        """The numbers of the next step, when these were the step counts before any set was stepped."""
        if counts.count(counts[0]) == len(counts):
            return [whole_count(counts[0], self.labels[0]) + self.turn.earlier] * len(counts)
        named = zip(counts, self.labels, strict=True)
        return [whole_count(count, label) + self.turn.earlier for count, label in named]

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
        for i, view in self._views.items():
            view.store(self._row(i))
        written = [tensor for column in self._columns for tensor in column]
        written += self.copies.written
        written += [local_of(tensor) for i in self._views for tensor in self._row(i)]
        torch.autograd.graph.increment_version(written)
        self.copies.note_step()
