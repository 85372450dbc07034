"""From pairs of gradient and variable to one native call: the plans of an optimizer, and its accumulated gradients."""

from __future__ import annotations

import abc
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam._core.backend import _cpu
from fastadam._core.checks import check_list
from fastadam._core.deferred import DeferredTables
from fastadam._core.hyper import StepHyper
from fastadam._core.ops import fit_gradients, run_step
from fastadam._core.placement import assign, native_of, on_gpu
from fastadam._core.plans import PlanKey, StepPlan
from fastadam._core.slices import DEFERRED, is_native_sparse, is_sparse
from fastadam._core.slots import ACCUMULATOR, Entry, key_of
from fastadam._core.staleness import Numbers, Staleness
from fastadam._core.variable import Variable, buffers_of, unwrap
from fastadam._core.warning import warn

if TYPE_CHECKING:
    from fastadam._core.types import Gradient, VariableLike

__all__ = ["Stepper"]


class Stepper(DeferredTables):
    """``apply_gradients`` for a class that says which slots and numbers its step needs."""

    _hyper: dict[str, Any]
    _amsgrad: bool

    @abc.abstractmethod
    def _slot_names(self) -> list[str]: ...

    @abc.abstractmethod
    def _step_hyper(self, gradient_scale: float) -> StepHyper: ...

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Gradient | None, VariableLike]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> np.int64 | None:
        """Update every variable in place with its gradient, then count the step.

        All pairs are checked before anything is written: a call that raises leaves variables, slots and
        ``iterations`` as they were. A variable that comes twice is updated twice, in order, with the same t. Pairs
        whose gradient is None are left out with a warning. An empty list does nothing.

        With ``gradient_accumulation_steps`` k, k - 1 calls only add the gradients up, and the k-th updates every
        variable that had a gradient in one of the k calls with the sum divided by k.

        Args:
            grads_and_vars: Iterable of (gradient, variable). A gradient of another float dtype or layout is
                converted; gradients are not modified.
            name: Accepted for TF's signature; it names nothing here.
            experimental_aggregate_gradients: Likewise; a single process has no replicas to sum over.

        Returns:
            ``iterations`` after the step; None for an empty list.

        Raises:
            TypeError: Not pairs, or swapped ones; a list as variable, a dtype that is not float.
            ValueError: An iterator that yields nothing; all gradients None; a wrong shape; a variable that cannot be
                updated in place; variables that overlap partly; a gradient that shares memory with a variable.
        """
        return None if self._apply(grads_and_vars) is None else self.iterations

    def _apply(self, grads_and_vars: Iterable[tuple[Any, Any]], loss_scale: float | None = None) -> bool | None:
        """Whether all gradients were finite, which only a dynamic ``loss_scale`` asks for; None for an empty list."""
        pairs = check_list("grads_and_vars", grads_and_vars, "an iterable of (gradient, variable) pairs")
        if not pairs:
            return None
        with self._lock:
            now = self._now
            if now.stepping:  # by a callable hyperparameter or a gradient's ``__array__``
                raise RuntimeError(f"apply_gradients of optimizer {self.name} was called from within itself")
            now.stepping = True
            try:
                return self._step(pairs, loss_scale)
            finally:
                now.stepping = False

    def _step(self, pairs: list[Any], loss_scale: float | None) -> bool:
        first, rate = _first_variable(pairs), self._hyper["learning_rate"]
        if self._contexts or on_gpu(first) or on_gpu(rate):
            rate = self._rate_on_gpu(first, rate)
        scale = 1.0 / (loss_scale or self._extras.loss_scale_factor or 1.0)
        steps = self._extras.gradient_accumulation_steps
        hyper = self._step_hyper(1.0 / steps if steps else scale)
        found = self._find_plan(pairs)
        if found is None or len(found[1]) < len(pairs):
            _check_pairs(pairs)
        plan, gradients = found or self._make_plan(pairs, hyper, scale)
        self._plans.use(plan)
        if plan.device >= 0:
            plan.native.set_device_numbers(rate)
        if steps:
            return self._accumulate(plan, gradients, scale, loss_scale is not None, hyper)
        if loss_scale is not None:
            hyper = hyper._replace(require_finite=True)
        if plan.has_tables:
            gradients = self._settle_before(plan, gradients, hyper)
        run_step(plan.native.step, gradients, plan.buffers, plan.positions, hyper, [], self._iterations)
        if plan.has_tables:
            self._sweep(plan)
        if self._contexts and loss_scale is not None:
            self._raise_late()  # the step has been waited for
        return bool(plan.native.all_finite)

    # ---- plans -----------------------------------------------------------------------------------------------------

    def _key(self) -> PlanKey:
        return PlanKey(self._slots.version, self._amsgrad, self._sparse_update, self._extras)

    def _find_plan(self, pairs: list[Any]) -> tuple[StepPlan, list[Any]] | None:
        found = self._plans.find(pairs, self._key())
        if found is None:
            return None
        if self._now.checks_exclusions and self._extras.weight_decay:
            self._check_exclusions(pairs)
        if self._extras.excluded_names and found[0].decays != self._decays(pairs, found[0].buffers):
            return None  # a variable comes with another name
        if self._sparse_update not in DEFERRED:
            return found
        tables = zip(found[0].tables, found[1], strict=True)
        fits = all(table.steps < table.room if table else not is_sparse(gradient) for table, gradient in tables)
        return found if fits else None

    def _decays(self, pairs: list[Any], buffers: list[_cpu.Buffer]) -> list[bool]:
        variables = [variable for gradient, variable in pairs if gradient is not None]
        names = [self._name_of(variable, buffer) for variable, buffer in zip(variables, buffers, strict=True)]
        return self._extras.decays(names, buffers)

    def _check_exclusions(self, pairs: list[Any]) -> None:
        """Warn of what ``exclude_from_weight_decay`` names and no variable is."""
        self._now.checks_exclusions = False
        variables = [variable for _, variable in pairs]  # those without gradient, too
        named = [variable.name for variable in variables if isinstance(variable, Variable)]
        names = {name for name in (*named, *(entry.spec.name for entry in self._slots.entries)) if name}
        met = {key_of(entry.buffer) for entry in self._slots.entries if entry.buffer}
        met.update(map(key_of, buffers_of(variables, range(len(variables)))))
        if missing := self._extras.missing(names, met if not self._slots.waiting() else None):
            hint = ""
            if self._extras.excluded_names:
                unnamed = "without names: wrap them, fastadam.Variable(w, name=...)"
                hint = ", which are " + (f"named {sorted(names)!s:.200}" if names else unnamed)
            warn(f"exclude_from_weight_decay: {', '.join(missing)} excludes none of the variables so far{hint}")

    def _make_plan(self, pairs: list[Any], hyper: StepHyper, scale: float) -> tuple[StepPlan, list[Any]]:
        """A plan for variables not seen before, and gradients as far as they had to be converted to check the step."""
        key = self._key()  # before anything is read: what is set meanwhile, by a gradient's code, asks for another plan
        positions = [i for i, (gradient, _) in enumerate(pairs) if gradient is not None]
        gradients = [unwrap(pairs[i][0]) for i in positions]
        names = self._slot_names()
        key = key._replace(amsgrad="vhat" in names)
        buffers = buffers_of([pairs[i][1] for i in positions], positions)
        prepared = self._slots.prepare(buffers, names)
        slots = dict(zip(names, prepared.slots, strict=True))
        decays = self._decays(pairs, buffers)
        entries = [prepared.entry_of(buffer) for buffer in buffers]
        numbers = self._numbers(hyper, key.amsgrad)
        tables = [self._table_of(*found, numbers) for found in zip(buffers, entries, gradients, strict=True)]
        histories = [None if table is None else table.native for table in tables]
        context, lazy = self._context_of(buffers[0]), self.sparse_update == "lazy"
        native = native_of(buffers[0]).Plan(buffers, slots, decays, positions, lazy, histories, context)
        gradients = fit_gradients(native, gradients, buffers, positions)
        native.check_numbers(hyper, [])
        native.check_numbers(hyper._replace(gradient_scale=scale), [])  # that of accumulated gradients is another one
        given = {i: unwrap(pairs[i][1]) for i in positions}
        new = {slot_key for slot_key, _ in prepared.created if not self._slots.knows(slot_key)}
        self._replacements.look(given, buffers, new, self._plans)
        prepared.commit()  # slots are made once the whole step has been found good
        plan = StepPlan(native, key._replace(version=self._slots.version), buffers, positions, decays, tables)
        for buffer, table in zip(buffers, tables, strict=True):
            if table is not None and (entry := self._slots.entry_of(buffer)) and entry.staleness is not table:
                self._plans.clear()  # one of them may know the variable without a history
                entry.staleness = table
        self._plans.add(plan, pairs)
        return plan, gradients

    def _table_of(self, buffer: _cpu.Buffer, entry: Entry | None, gradient: Any, numbers: Numbers) -> Staleness | None:
        """The history of a variable, if it is, or with this gradient becomes, a table in a deferred mode."""
        if self.sparse_update not in DEFERRED:
            return None
        if entry is not None and entry.staleness is not None:
            if entry.staleness.steps >= entry.staleness.room:
                self._plans.clear()  # they read the old arrays, whatever becomes of this step
                entry.staleness.make_room()
            return entry.staleness.placed(buffer)
        if not is_sparse(gradient) or not buffer.shape:
            return None
        return Staleness.of(buffer, numbers, exact=self.sparse_update == "deferred")

    def _numbers(self, hyper: StepHyper, amsgrad: bool) -> Numbers:
        return Numbers(hyper.beta_1, hyper.beta_2, hyper.epsilon, amsgrad)

    def _settle_before(self, plan: StepPlan, gradients: list[Any], hyper: StepHyper) -> list[Any]:
        """Rows cannot wait for a step with a dense gradient, or with numbers that their history does not have.

        Returns the gradients, converted as far as they had to be to find this step good before rows are moved.
        """
        self._warn_of_unread(plan, gradients)
        numbers = self._numbers(hyper, plan.key.amsgrad)
        settled = [
            table is not None and table.waits and (table.numbers != numbers or not is_native_sparse(gradient))
            for table, gradient in zip(plan.tables, gradients, strict=True)
        ]
        if any(settled):
            gradients = fit_gradients(plan.native, gradients, plan.buffers, plan.positions)
            plan.native.check_numbers(hyper, [])
        for buffer, table, settles in zip(plan.buffers, plan.tables, settled, strict=True):
            entry = self._slots.entry_of(buffer) if table else None
            if table is None or entry is None:
                continue
            if settles:
                self._catch_up(entry)
            if table.numbers != numbers and self._contexts:
                self._raise_late(wait=True)  # the rows are up to date only if that was not skipped
            if table.numbers != numbers:
                table.change_numbers(numbers)
                self._plans.clear()  # they have the crossover of the old ones
        return gradients

    def _name_of(self, variable: Any, buffer: _cpu.Buffer) -> str | None:
        """Of a Variable, or the name that its array once came with."""
        if isinstance(variable, Variable) and variable.name:
            return variable.name
        entry = self._slots.entry_of(buffer)
        return None if entry is None else entry.spec.name

    # ---- accumulated gradients -------------------------------------------------------------------------------------

    def _accumulate(
        self, plan: StepPlan, gradients: list[Any], scale: float, require_finite: bool, hyper: StepHyper
    ) -> bool:
        calls, steps = int(self._iterations), self._micro_steps
        entries = [entry for buffer in plan.buffers if (entry := self._slots.entry_of(buffer))]
        before = {id(entry): (entry, entry.accumulating) for entry in entries}
        fresh = [entry for entry, cycle in before.values() if cycle != calls // steps]
        if restart := len(fresh) == len(before):
            fresh = []
        for entry, _ in before.values():
            entry.accumulating = calls // steps
        try:
            update = self._update_plan(plan.native, entries) if (calls + 1) % steps == 0 else None
            if fresh:  # refused before anything is written
                gradients = fit_gradients(plan.native, gradients, plan.buffers, plan.positions)
                plan.native.check_numbers(hyper._replace(gradient_scale=scale), [])
                (update or plan.native).check_numbers(hyper, [])
            for entry in fresh:
                assign(self._slots.slots_of(entry)[ACCUMULATOR], 0)
            arguments = (scale, require_finite, restart, update, hyper, self._iterations)
            run_step(plan.native.accumulate, gradients, plan.buffers, plan.positions, *arguments)
            if plan.device >= 0 and any(map(is_native_sparse, gradients)):
                self._raise_late(wait=True)  # a cycle is not taken back call by call
        finally:
            if int(self._iterations) == calls:  # refused, or not finite
                for entry, cycle in before.values():
                    entry.accumulating = cycle
        return bool(plan.native.all_finite)

    def _update_plan(self, plan: _cpu.Plan, entries: list[Entry]) -> Any:
        """The plan of all variables with an accumulated gradient: this call's, unless others had one before."""
        waiting = [entry for entry in self._slots.entries if self._is_accumulating(entry)]
        if len({id(entry) for entry in entries}) == len(entries) == len(waiting):
            return plan
        names, buffers = self._slot_names(), []
        for entry in waiting:
            buffer = entry.buffer or entry.origin
            if buffer is None:
                raise ValueError(f"gradients were accumulated for {entry.spec} and saved; build it, the step needs it")
            buffers.append(buffer)
        prepared = self._slots.prepare(buffers, names)
        prepared.commit()  # of a deep copy: it goes on with the same variables
        slots = dict(zip(names, prepared.slots, strict=True))
        decays = self._extras.decays([entry.spec.name for entry in waiting], buffers)
        positions = list(range(len(buffers)))
        context = self._context_of(buffers[0])
        return native_of(buffers[0]).Plan(buffers, slots, decays, positions, False, [None] * len(buffers), context)


def _first_variable(pairs: list[Any]) -> Any:
    for pair in pairs:
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and pair[0] is not None:
            return unwrap(pair[1])
    return _check_pairs(pairs)


def _check_pairs(pairs: list[Any]) -> None:
    """Raise what is wrong with the pairs; warn of gradients that are None."""
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)):
            raise TypeError(f"grads_and_vars[{i}]: {type(pair).__name__}, expected a (gradient, variable) pair")
        if len(pair) != 2:
            raise ValueError(f"grads_and_vars[{i}]: {len(pair)} items, expected a (gradient, variable) pair")
        _check_order(i, *pair)
    absent = [getattr(v, "name", None) or f"vars[{i}]" for i, (g, v) in enumerate(pairs) if g is None]
    if len(absent) == len(pairs):
        raise ValueError(f"No gradients provided for any variable: {absent}.")
    if absent:
        warn(f"Gradients do not exist for variables {absent} when minimizing the loss.")


def _check_order(i: int, gradient: Any, variable: Any) -> None:
    """Refuse a pair that is seen to be swapped; variables of one kind on both sides may hold gradients, as in TF."""
    if not _is_trainable(gradient) or _is_trainable(variable):
        return
    what = f"Variable '{gradient.name}'" if getattr(gradient, "name", None) else type(gradient).__name__
    raise TypeError(
        f"grads_and_vars[{i}]: {what} as the gradient of a {type(variable).__name__}, expected (gradient, variable); "
        "the array itself, if it does hold a gradient"
    )


def _is_trainable(value: Any) -> bool:
    """Whether it is a Variable, or a parameter of a framework; none is imported for that."""
    if isinstance(value, Variable):
        return True
    for name, path in (("torch", "nn.Parameter"), ("keras", "Variable"), ("tensorflow", "Variable")):
        found: Any = sys.modules.get(name)
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and isinstance(value, found):
            return True
    return False
