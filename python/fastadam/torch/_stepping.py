"""From parameter groups to native calls: which parameters step together, and with which numbers."""

from __future__ import annotations

import threading
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadam._core.common.warning import warn
from fastadam._core.deferred.history import Numbers
from fastadam._core.native.plan import BoundedCache, StepHyper
from fastadam._core.native.slices import DEFERRED
from fastadam.torch._checks import check_flags, check_options, label_of
from fastadam.torch._chosen import ON_HOST, Call, Chosen, Key, OnGpu
from fastadam.torch._compiled import remember
from fastadam.torch._counts import whole_count
from fastadam.torch._scaling import Scaling
from fastadam.torch._sets import Kind, ParameterSet
from fastadam.torch._states import states_of
from fastadam.torch._tables import Table, Tables

if TYPE_CHECKING:
    from fastadam._core.common.types import SparseUpdate

__all__ = ["Stepper"]

_NONE, _WHOLE, _ROWS = 0, 1, 2  # a parameter without gradient, with one that moves all of it, with one that moves rows


class Stepper(torch.optim.Optimizer):
    """The step of an optimizer with torch's parameter groups and states."""

    _sparse_update: SparseUpdate
    _moments_dtype: torch.dtype | None
    _lock: threading.RLock
    _attached: set[int]
    _has_warned = False  # of a table whose rows are read as they lie

    def _reset(self) -> None:
        """Forget what was made of states that have been replaced."""
        self._sets: BoundedCache[Key, Chosen] = BoundedCache()
        self._contexts: dict[Key, Any] = {}
        self._captured: list[Chosen] = []  # CUDA graphs write to their memory
        self._tables = Tables(exact=self._sparse_update == "deferred")
        # A call, the counter before it, and what the step counts become where the GPU knows.
        self._pending: tuple[Call, int, Tensor | None] | None = None
        self._known: dict[Any, Any] | None = None  # what `state` was when it was last compared with the sets
        self._epoch = 0
        self._compiled_sets: dict[Any, ParameterSet] = {}
        self._number = remember(self)
        self.__dict__.setdefault("_attached", set())  # ids of the weights of attached modules
        self.__dict__.setdefault("_lock", threading.RLock())  # of steps and of what reads rows or states; not copied

    def _step_all(self, scaling: Scaling) -> None:
        """Step every parameter that has a gradient, or raise what is wrong and change nothing."""
        self._finish()
        if not self._knows_state():
            self._known = {**self.state}
            self._epoch += 1
        calls: list[Call] = []
        for index, group in enumerate(self.param_groups):
            gradients = [param.grad for param in group["params"]]
            mask = self._mask_of(group["params"], gradients)
            if any(mask):
                self._prepare(calls, index, group, gradients, mask, scaling)
        if len(calls) > 1:
            for i, call in enumerate(calls):
                checked = call.chosen.together.check(call.gradients, call.hyper, call.factors)
                calls[i] = call._replace(gradients=checked)
        for call in calls:
            self._make(call)

    def _knows_state(self) -> bool:
        """Whether parameters and states, and their order, are those of the last comparison; by identity, unhashed."""
        known, state = self._known, self.state
        if known is None or len(known) != len(state):
            return False
        return all(map(is_, state, known)) and all(map(is_, state.values(), known.values()))

    def _mask_of(self, params: list[Tensor], gradients: list[Any]) -> bytes:
        """The kind of each parameter."""
        if self._sparse_update == "dense":
            return bytes([gradient is not None for gradient in gradients])
        kinds = [_NONE if g is None else _ROWS if g.is_sparse else _WHOLE for g in gradients]
        if self._tables:  # they keep the epsilon of their history
            kinds = [kind and (_ROWS if p in self._tables else kind) for kind, p in zip(kinds, params, strict=True)]
        return bytes(kinds)

    def _prepare(
        self,
        calls: list[Call],
        index: int,
        group: dict[str, Any],
        gradients: list[Any],
        mask: bytes,
        scaling: Scaling,
    ) -> None:
        """Add the calls for the parameters that ``mask`` names; those of another kind, device or step count apart."""
        found = self._choose(index, group, mask)
        parts = found if isinstance(found, list) else found.parts
        for part in parts:
            self._prepare(calls, index, group, gradients, part, scaling)
        if parts or isinstance(found, list):
            return
        together = found.together
        there = ON_HOST if together.context is None else self._numbers_on_gpu(found, group, scaling)
        if there.found_inf is None and scaling.skips:
            return
        step = 1
        if not there.counts:
            counts = together.counts.read()
            if counts.count(counts[0]) != len(counts):
                parts = _by_value(mask, together.positions, counts)
                found.parts = parts if together.counts_on_gpu else []
                for part in parts:
                    self._prepare(calls, index, group, gradients, part, scaling)
                return
            step = whole_count(counts[0], together.labels[0])
        hyper = self._hyper_of(group, together, step, scaling.gradient_scale if there.grad_scale is None else 1.0)
        mine = [gradients[place] for place in together.positions]
        if found.tables and self._settle_before(found, mine, hyper, group["amsgrad"]):
            self._sets.remove(found)
            self._prepare(calls, index, group, gradients, mask, scaling)
            return
        if together.context is not None:
            rate = together.rate_on_gpu(group["lr"], hyper)
            if rate is None:
                hyper = hyper._replace(learning_rate=float(group["lr"]))
            together.set_device_numbers(rate, there.grad_scale, there.found_inf, counts=there.counts)
        factors = together.reversed if group["maximize"] else []
        mine = together.read_gradients(mine, densify=hyper.l2 != 0)
        calls.append(Call(found, mine, hyper, factors, there.found_inf))

    def _numbers_on_gpu(self, chosen: Chosen, group: dict[str, Any], scaling: Scaling) -> OnGpu:
        """Which numbers of the next step the GPU of a set knows, and the host does not wait for."""
        together = chosen.together
        chosen.raise_late()
        if self._captured:
            together.counts.forget()  # graphs may have raised them
        is_captured = together.is_capturing()
        if is_captured and (chosen.is_new or not group["capturable"]):
            raise RuntimeError(
                "a step is captured by a CUDA graph, expected capturable=True and a step before it that is not captured"
            )
        grad_scale, found_inf = scaling.on(together.device) if together.counts_on_gpu else (None, None)
        is_followed = found_inf is not None and together.counts.are_followed()  # the GPU's last step is that before
        counts = is_captured or (is_followed and together.can_count(self._hyper_of(group, together, 1, 1.0)))
        return OnGpu(grad_scale, found_inf, counts)

    def _hyper_of(self, group: dict[str, Any], together: ParameterSet, step: int, gradient_scale: float) -> StepHyper:
        """The numbers of a step, on a GPU without the rate.

        The epsilon of rows is not corrected, as that of ``torch.optim.SparseAdam``.
        """
        check_options(group)
        (beta_1, beta_2), weight_decay = group["betas"], float(group["weight_decay"])
        decoupled = group["decoupled_weight_decay"]
        if weight_decay and not decoupled and together.kind.rows:
            raise ValueError(
                f"weight_decay: {weight_decay} with sparse_update={self._sparse_update!r}, expected 0 or "
                "decoupled_weight_decay=True, for parameters with sparse gradients"
            )
        return StepHyper(
            step=step,
            learning_rate=float(group["lr"]) if together.context is None else 0.0,
            beta_1=float(beta_1),
            beta_2=float(beta_2),
            epsilon=float(group["eps"]),
            gradient_scale=gradient_scale,
            weight_decay=weight_decay if decoupled else 0.0,
            l2=0.0 if decoupled else weight_decay,
            epsilon_corrected=not together.kind.rows,
        )

    def _settle_before(self, chosen: Chosen, gradients: list[Any], hyper: StepHyper, amsgrad: bool) -> bool:
        """Rows cannot wait for a dense gradient, nor for numbers that their history does not have.

        Returns whether the set must be made again.
        """
        self._warn_of_unread(chosen.tables)
        numbers = Numbers(hyper.beta_1, hyper.beta_2, hyper.epsilon, amsgrad)
        changed = False
        for table, gradient in zip(chosen.tables, gradients, strict=True):
            table.require_untouched()
            differs = table.history.numbers != numbers
            if table.history.must_catch_up(numbers, touches_rows=gradient.is_sparse):
                table.catch_up()
            if differs:
                table.history.change_numbers(numbers)
            changed = changed or differs
        return changed

    def _warn_of_unread(self, tables: list[Table]) -> None:
        """Once: the gradient of a table is that of rows as they lay in memory, where they may wait for their steps.

        Not in its first step, before which no row waits: until the second nobody can tell whether rows will be read
        through the optimizer.
        """
        if self._has_warned:
            return
        for table in tables:
            if table.history.waits and not table.history.is_read and id(table.param) not in self._attached:
                self._has_warned = True
                warn(
                    f"{table.label}: its rows were read from its memory, where with sparse_update="
                    f"{self._sparse_update!r} they lag behind; call opt.attach(embedding) once, with the module that "
                    "looks them up, or read them by opt.gather(param, ids) or after opt.sync()"
                )
                return

    def _make(self, call: Call) -> None:
        chosen, together = call.chosen, call.chosen.together
        if together.is_capturing():
            together.step(call.gradients, call.hyper, call.factors, chosen.counter)
            together.finish_in_graph(call.found_inf)
            self._captured.append(chosen)  # its pointers are the graph's from here on
            self._sets.remove(chosen)
            return
        after = None if call.found_inf is None else together.counts.after(call.found_inf)
        chosen.is_scaled = chosen.is_scaled or after is not None
        self._pending = call, int(chosen.counter), after
        try:
            together.step(call.gradients, call.hyper, call.factors, chosen.counter)
        finally:
            self._finish()

    def _finish(self) -> None:
        """What follows a native step that was made, even if a signal raised after it; again if one cut this off."""
        if self._pending is None:
            return
        call, before, after = self._pending
        if int(call.chosen.counter) > before:
            self._adopt(call, after)
        else:
            call.chosen.together.counts.forget()
        self._pending = None

    def _adopt(self, call: Call, after: Tensor | None) -> None:
        chosen, together = call.chosen, call.chosen.together
        together.finish(call.hyper.step if after is None else after)
        if chosen.is_new:
            for param, state in zip(together.params, together.states, strict=True):
                self.state[param] = state
            self._known = None
            self._tables.keep(chosen.tables)
            chosen.is_new = False
        for table in chosen.tables:
            table.note_step()

    # ---- sets ------------------------------------------------------------------------------------------------------

    def _choose(self, index: int, group: dict[str, Any], mask: bytes) -> Chosen | list[bytes]:
        """The set of the parameters that ``mask`` names, or masks of those that must step apart."""
        if _WHOLE in mask and _ROWS in mask:
            return [mask.replace(bytes([other]), bytes([_NONE])) for other in (_ROWS, _WHOLE)]
        key = _key_of(index, group, mask)
        chosen = self._sets.get(key)
        if chosen is not None and self._is_current(chosen, group["params"]):
            return chosen
        places = [place for place, kind in enumerate(mask) if kind]
        devices = [group["params"][place].device for place in places]
        if len(set(devices)) > 1:
            return _by_value(mask, places, devices)
        made = self._new(key, group, places)
        self._sets.put(key, made)
        return made

    def _is_current(self, chosen: Chosen, params: list[Tensor]) -> bool:
        together = chosen.together
        if len(params) != len(chosen.params) or not all(map(is_, params, chosen.params)):
            return False
        if chosen.epoch != self._epoch:
            if not all(self.state.get(p) is state for p, state in zip(together.params, together.states, strict=True)):
                return False
            chosen.epoch = self._epoch
        if any(table.history.is_full for table in chosen.tables):
            return False
        return together.is_current() and together.counts.are(together.states)

    def _new(self, key: Key, group: dict[str, Any], places: list[int]) -> Chosen:
        params = [group["params"][place] for place in places]
        labels = [label_of(group, key.group, place) for place in places]
        for param, label in zip(params, labels, strict=True):
            check_flags(group, param, label, self._sparse_update)
        states = states_of(self.state, params, labels, group, self._moments_dtype)
        rows = _ROWS in key.mask
        tables: list[Table] = []
        if rows and self._sparse_update in DEFERRED:
            beta_1, beta_2 = map(float, group["betas"])
            numbers = Numbers(beta_1, beta_2, float(group["eps"]), key.amsgrad)
            for param, state, label in zip(params, states, labels, strict=True):
                tables.append(self._tables.make(param, state, label, numbers))
        for table in tables:
            if table.history.is_full:
                table.history.make_room()
        kind = Kind(self._sparse_update, rows=rows, amsgrad=key.amsgrad, decays=key.decays)
        histories: list[Any] = [table.history for table in tables] or [None] * len(params)
        together = ParameterSet(params, states, labels, places, kind, histories, self._contexts.get(key))
        if together.context is not None:
            self._contexts[key] = together.context
        return Chosen(list(group["params"]), together, tables, self._epoch)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> None:
        """Fill the lists for ``torch.compile``, which runs this while it traces; new states are the optimizer's."""
        check_options(group)
        places = [place for place, param in enumerate(group["params"]) if param.grad is not None]
        chosen = [group["params"][place] for place in places]
        index = next(index for index, other in enumerate(self.param_groups) if other is group)
        labels = [label_of(group, index, place) for place in places]
        for param, label in zip(chosen, labels, strict=True):
            check_flags(group, param, label, self._sparse_update)
            if param.grad.layout != torch.strided:
                raise ValueError(f"grad of {label}: sparse under torch.compile, expected a dense gradient")
        if not chosen:
            return
        states = states_of(self.state, chosen, labels, group, self._moments_dtype)
        for param, state in zip(chosen, states, strict=True):
            self.state[param] = state
            params.append(param)
            grads.append(param.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            if group["amsgrad"]:
                max_exp_avg_sqs.append(state["max_exp_avg_sq"])
            state_steps.append(state["step"])


def _key_of(index: int, group: dict[str, Any], mask: bytes) -> Key:
    return Key(index, mask, bool(group["amsgrad"]), bool(group["decoupled_weight_decay"]))


def _by_value(mask: bytes, places: list[int], values: list[Any]) -> list[bytes]:
    """``mask``, in parts whose parameters have one value."""
    parts: dict[Any, bytearray] = {}
    for place, value in zip(places, values, strict=True):
        parts.setdefault(value, bytearray(len(mask)))[place] = mask[place]
    return [bytes(part) for part in parts.values()]
