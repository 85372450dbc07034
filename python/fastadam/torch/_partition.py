"""Which parameters of a group step together: those with one kind of gradient, on one device, apart in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fastadam._core.common.types import Foreign
from fastadam._core.deferred.rates import Numbers
from fastadam._core.native.backend import _cpu
from fastadam._core.native.plan import BoundedCache
from fastadam._core.native.slices import DEFERRED
from fastadam.torch._checks import Group, ParamState, States, check_flags, label_of
from fastadam.torch._copies import Copies, check_compute_params, check_groups_apart, check_place
from fastadam.torch._deferred import Table, Tables
from fastadam.torch._formats import Asked, asked_of, check_formats
from fastadam.torch._layout import UNORDERED, Turn, turns_of
from fastadam.torch._options import Options
from fastadam.torch._parameter_set import ParameterSet
from fastadam.torch._state import Kind, kind_of, states_of
from fastadam.torch._step_count import StepCounts, is_on_gpu
from fastadam.torch._stored import SLOTS, SMALL, Stored, stored_as

__all__ = ["Partitions", "refuse_new_in_capture"]

# A parameter without a gradient; with one that moves all of it; with one that moves the rows it names; with "lazy" one
# more for each further axis of the indices.
_NONE, _WHOLE, _ROWS = 0, 1, 2
_MOST_PARAMETERS = 8192  # in all sets that are kept, each with about 4 KB


class Key(NamedTuple):
    """What sets are made of beside tensors."""

    group: int  # its place
    gradients: bytes  # the kind of each parameter's gradient
    amsgrad: bool
    decays: bool
    rounds: bool  # bfloat16 parameters are rounded at random
    first: int  # the number of its first parameter in the optimizer
    order: tuple[bool, bool]  # `foreach` and `fused`, which decide about the order of parameters that share memory


@dataclass(slots=True, eq=False)
class Partition:
    """The sets of one group, and what shows that they are not out of date."""

    group: int  # its place
    params: list[Tensor]  # of the whole group
    sets: list[ParameterSet]
    epoch: int  # of `optimizer.state`, when the states were last compared

    def size(self) -> int:
        """How many parameters are in the sets."""
        return sum(len(each.params) for each in self.sets)

    def is_of(self, params: list[Tensor]) -> bool:
        """Whether the group still has the same parameters."""
        return len(params) == len(self.params) and all(map(is_, params, self.params))

    def is_current(self, group: Group, state: States, epoch: int) -> bool:
        """Whether parameters, their copies, states and their memory are the same as when the sets were made."""
        computed = group.get("compute_params")
        if not self.is_of(group["params"]) or (computed is not None and len(computed) != len(self.params)):
            return False
        for each in self.sets:
            if each.is_new or self.epoch != epoch:
                pairs = zip(each.params, each.states, strict=True)
                is_begun = self.epoch != epoch or not each.is_new
                if not all(_is_state(state.get(p), known, is_begun=is_begun) for p, known in pairs):
                    return False
        self.epoch = epoch
        return all(each.is_current(computed) for each in self.sets)


class Partitions:
    """The sets of all groups, of which the most recently used are kept."""

    def __init__(self, options: Options, tables: Tables) -> None:
        self._mode, self._options, self._tables = options.sparse_update, options, tables
        self._kept: BoundedCache[Key, Partition] = BoundedCache(_MOST_PARAMETERS, Partition.size, least=4)
        self._epoch = 0
        self._groups = 0
        self._asked: dict[int, tuple[Group, Asked]] = {}  # of each group, when its states were last found good
        self.known: States | None = None  # a copy of `optimizer.state` when it was last compared

    def note_state(self, state: States, groups: int) -> None:
        """Before a step: have the states compared again if the optimizer has got others."""
        if groups < self._groups:
            self._forget(lambda kept: kept.group >= groups)
            self._asked = {index: asked for index, asked in self._asked.items() if index < groups}
        self._groups = groups
        if self.known is None or not _cpu.same_items(state, self.known):
            self.known = {**state}
            self._epoch += 1

    def of(
        self, index: int, group: Group, first: int, state: States, gradients: list[Tensor | None], *, renew: bool
    ) -> list[ParameterSet]:
        """The sets of the parameters of a group that have a gradient, made anew if need be or if told to.

        Args:
            index: The place of the group.
            group: The group.
            first: How many parameters the groups before it have.
            state: ``optimizer.state``.
            gradients: For each parameter its gradient or None.
            renew: Make the sets anew.
        """
        kinds = self._kinds_of(group["params"], gradients)
        if not any(kinds):
            return []
        self._note_formats(index, group, state)
        rounds = self._asked[index][1].rounds
        order = bool(group.get("foreach")), bool(group.get("fused"))
        key = Key(index, kinds, bool(group["amsgrad"]), bool(group["decoupled_weight_decay"]), rounds, first, order)
        kept = self._kept.get(key)
        if kept is not None and not renew and kept.is_current(group, state, self._epoch):
            return kept.sets
        made = Partition(index, list(group["params"]), self._make(key, group, state, kept), self._epoch)
        if self._kept:
            self._forget(lambda other: other.group == index and not other.is_of(made.params))
        self._kept.put(key, made)
        return made.sets

    def _note_formats(self, index: int, group: Group, state: States) -> None:
        """Refuse options that have changed since states were begun, which stay as they are."""
        noted, asked = self._asked.get(index), asked_of(group)
        if noted is not None and noted[0] is group and all(map(is_, asked, noted[1])):
            return
        check_formats(group, self._mode)
        asked = asked_of(group)
        if noted is not None and noted[0] is group and any(state.get(param) for param in group["params"]):
            for name in ("moments", "master"):
                now, before = getattr(asked, name), getattr(noted[1], name)
                if now != before:
                    raise ValueError(
                        f"param_groups[{index}]: {name}: {now!r}, expected {before!r} as when the states were begun; a "
                        f"new optimizer with {name}={now!r} converts the state dict that it loads"
                    )
        self._asked[index] = group, asked

    def _forget(self, is_old: Callable[[Partition], bool]) -> None:
        for partition in [kept for kept in self._kept if is_old(kept)]:
            self._kept.remove(partition)

    def clear(self) -> None:
        """Forget all sets and states."""
        self._kept.clear()
        self.known = None

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[ParameterSet]:
        return (each for partition in self._kept for each in partition.sets)

    def _kinds_of(self, params: list[Tensor], gradients: list[Tensor | None]) -> bytes:
        if self._mode == "dense":
            return bytes([gradient is not None for gradient in gradients])
        kinds = [_NONE if g is None else _ROWS if g.is_sparse else _WHOLE for g in gradients]
        if self._mode == "lazy":
            for place, gradient in enumerate(gradients):
                if kinds[place] == _ROWS and gradient is not None:
                    kinds[place] += max(gradient.sparse_dim() - 1, 0)
        if self._tables:  # a table keeps the epsilon of its history
            kinds = [kind and (_ROWS if p in self._tables else kind) for kind, p in zip(kinds, params, strict=True)]
        return bytes(kinds)

    # ---- new sets --------------------------------------------------------------------------------------------------

    def _make(self, key: Key, group: Group, state: States, replaced: Partition | None) -> list[ParameterSet]:
        """New sets in the order of steps; on a GPU they continue with the contexts of those that they replace."""
        sets: list[ParameterSet] = []
        check_formats(group, self._mode)  # the caller may have changed them, and these
        check_compute_params(group, key.group, self._mode)
        check_groups_apart([(key.group, group)])
        contexts = {tuple(old.positions): old.context for old in replaced.sets} if replaced else {}
        params = group["params"]
        chosen = [place for place, code in enumerate(key.gradients) if code]
        known = {**state}  # and the states that are new
        turns = _turns_of(group, [params[place] for place in chosen], known)
        parts: dict[tuple[Turn, int, torch.device], list[int]] = {}
        for place, turn in zip(chosen, turns, strict=True):
            parts.setdefault((turn, key.gradients[place], params[place].device), []).append(place)
        for turn, code, device in sorted(parts, key=itemgetter(0, 1)):
            kind = kind_of(self._mode, code >= _ROWS, key.amsgrad, key.decays, max(code - _ROWS + 1, 1))
            made = self._make_sets(key, group, kind, parts[turn, code, device], turn, known, contexts)
            sets += made
            if not turn.is_alone:
                known.update((p, named) for each in made for p, named in zip(each.params, each.states, strict=True))
        return sets

    def _make_sets(
        self,
        key: Key,
        group: Group,
        kind: Kind,
        places: list[int],
        turn: Turn,
        known: States,
        contexts: dict[tuple[int, ...], Foreign],
    ) -> list[ParameterSet]:
        """The sets of parameters with one kind of gradient and one turn on one device.

        There is one set for each way in which states are stored, and for each step count on a GPU and of tables whose
        rows wait.
        """
        params = [group["params"][place] for place in places]
        labels = [label_of(group, key.group, place) for place in places]
        for param, label in zip(params, labels, strict=True):
            check_flags(group, param, label, self._mode)
        if kind.rows and self._mode in DEFERRED and not turn.is_alone:
            shared = "step count" if turn.owns_memory else "memory"
            raise ValueError(
                f"{labels[0]}: shares {shared} with another parameter of its group, expected each to have its own with "
                f"sparse_update={self._mode!r}"
            )
        refuse_new_in_capture(params[0])
        states = states_of(known, params, labels, self._options.state_format(group))
        asked = asked_of(group)
        stored = [
            stored_as(*each, may_be_small=asked.moments in SMALL, rounds=asked.rounds)
            for each in zip(params, states, labels, strict=True)
        ]
        counts = StepCounts([state["step"] for state in states])
        apart = [0.0] * len(places)
        if is_on_gpu(params[0]) or (kind.rows and self._mode in DEFERRED):
            apart = counts.read()
        parts: dict[tuple[Stored, float], list[int]] = {}
        for k, value in enumerate(zip(stored, apart, strict=True)):
            parts.setdefault(value, []).append(k)
        sets = []
        for (like, _), which in parts.items():
            if len(parts) > 1:
                counts = StepCounts([states[k]["step"] for k in which])
            chosen, named, called = [params[k] for k in which], [states[k] for k in which], [labels[k] for k in which]
            positions = [places[k] for k in which]
            context = contexts.get(tuple(positions))
            how = kind._replace(stored=like) if like.is_small else kind
            sets.append(self._make_set(key, group, chosen, named, called, positions, how, turn, counts, context))
        return sets

    def _make_set(
        self,
        key: Key,
        group: Group,
        params: list[Tensor],
        states: list[ParamState],
        labels: list[str],
        positions: list[int],
        kind: Kind,
        turn: Turn,
        counts: StepCounts,
        context: Foreign,
    ) -> ParameterSet:
        tables: Sequence[Table] = ()
        if kind.rows and self._mode in DEFERRED:
            beta_1, beta_2 = map(float, group["betas"])
            numbers = Numbers(beta_1, beta_2, float(group["eps"]), kind.amsgrad)
            tables = [
                self._tables.make(param, state, label, numbers)
                for param, state, label in zip(params, states, labels, strict=True)
            ]
        computed = group.get("compute_params")
        given = [] if computed is None else [computed[place] for place in positions]
        copies = Copies(params, given, states)
        measures = self._options.telemetry
        check_place(copies, params, labels, turn, measures=measures)
        return ParameterSet(
            params,
            states,
            labels,
            positions,
            kind,
            tables,
            turn,
            counts,
            context,
            copies=copies,
            measures=measures,
            numbers=[key.first + place for place in positions] if kind.stored.is_small else None,
        )


def _is_state(found: ParamState | None, known: ParamState, *, is_begun: bool) -> bool:
    """Whether the state of a parameter is the known one; unless it is begun, there may be none yet."""
    return found is known or not (is_begun or found)


def _turns_of(group: Group, params: list[Tensor], states: States) -> list[Turn]:
    if len(params) < 2:
        return turns_of(params, [None] * len(params), fused=False, foreach=False)
    known = [states.get(param) or {} for param in params]
    if group.get("foreach"):
        moments = [id(named[SLOTS["m"]]) for named in known if SLOTS["m"] in named]
        if len(set(moments)) < len(moments):
            raise ValueError(f"foreach: True with parameters that share moments, {UNORDERED}")
    steps = [named.get("step") for named in known]
    tensors = [step if isinstance(step, Tensor) else None for step in steps]
    return turns_of(params, tensors, fused=bool(group.get("fused")), foreach=bool(group.get("foreach")))


def refuse_new_in_capture(param: Tensor) -> None:
    """Raise if a CUDA graph is captured: parameters must have been stepped before."""
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step is captured by a CUDA graph, expected capturable=True and a step before it that is not captured"
        )
