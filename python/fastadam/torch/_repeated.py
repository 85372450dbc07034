"""A step like the last one: one native call, which compares what can have changed."""

from __future__ import annotations

import math
from operator import is_, itemgetter
from typing import TYPE_CHECKING

from torch.autograd.graph import increment_version

from fastadam._core.native.backend import _cpu
from fastadam._core.native.plan import RepeatedSteps
from fastadam.torch._checks import Group, States, check_group
from fastadam.torch._clipping import Clipping
from fastadam.torch._formats import asked_of

if TYPE_CHECKING:
    from fastadam.torch._parameter_set import ParameterSet

__all__ = ["RepeatedStep"]

# What a step reads of a group besides its parameters.
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
_ORDER = ("foreach", "fused", "capturable", "differentiable")
_read_options = itemgetter(*_OPTIONS, *_ORDER)
_CONSTANTS = {float, int, bool, type(None)}


class RepeatedStep:
    """The last step, of one set for each group on the host; only gradients, values, counts and options may change."""

    def __init__(self, sets: list[ParameterSet], groups: list[Group], state: States, clipping: Clipping) -> None:
        self._sets, self._clipping = sets, clipping
        self._steps = RepeatedSteps([each.plan for each in sets], groups, state)
        self._written = [tensor for each in sets for tensor in each.written]
        self._copies = tuple([each.copies for each in sets if each.copies.are_any])
        # With which the plans remember the numbers of the step: the scale of the gradients, then options of the group.
        self._numbers: list[tuple[object, ...] | None] = [None] * len(sets)
        self._orders = [tuple(map(group.get, _ORDER)) for group in groups]
        self._known: list[Group] = [{**group} for group in groups]  # when their options were last compared
        self._scale = math.nan  # then

    @classmethod
    def after(
        cls, last: list[tuple[int, ParameterSet]], groups: list[Group], state: States, clipping: Clipping
    ) -> RepeatedStep | None:
        """What repeats a step with these groups and sets; None if native code cannot.

        Args:
            last: The sets that were stepped, each with the place of its group.
            groups: All groups.
            state: ``optimizer.state``.
            clipping: Options that stay as they are.
        """
        if [place for place, _ in last] != list(range(len(groups))):
            return None
        sets = [each for _, each in last]
        addresses = [address for each in sets for address in each.counts.addresses]
        if len(set(addresses)) < len(addresses):  # a step count that several groups raise
            return None
        if not all(each.can_be_followed for each in sets) or not all(each.follow() for each in sets):
            return None
        return cls(sets, groups, state, clipping)

    def make(self, groups: list[Group], state: States, gradient_scale: float) -> bool | None:
        """Make the step, or raise what is wrong and change nothing.

        Returns:
            None, with nothing changed, if it differs from the last; otherwise whether it was made: False, with nothing
            changed, if it is skipped because of gradients that are not finite.
        """
        if len(groups) != len(self._sets):
            return None
        for copies in self._copies:
            if not copies.are_untouched:
                return None
        is_same_scale = gradient_scale == self._scale
        if not is_same_scale:
            self._scale = math.nan  # until every plan remembers it
        for index, group in enumerate(groups):
            is_constant = is_same_scale and self._numbers[index] is not None
            is_known = is_constant and _cpu.same_items(group, self._known[index])
            if not is_known and not self._compare(index, group, gradient_scale):
                return None
        self._scale = gradient_scale
        was_made: bool | None = True  # a signal may come as the call returns
        try:
            was_made = self._steps.make(groups, state)
        except Exception:  # a refusal, which has written nothing
            was_made = False
            raise
        finally:
            if was_made:
                increment_version(self._written)
                for copies in self._copies:
                    copies.note_repeated()
        return was_made

    def _compare(self, index: int, group: Group, gradient_scale: float) -> bool:
        """Compare the options of a group by value; False if they ask for another plan."""
        if not all(map(is_, asked_of(group), asked_of(self._known[index]))):
            return False
        try:
            numbers = (gradient_scale, *_read_options(group))
        except KeyError:  # an option is missing
            return False
        is_constant = _are_constant(*numbers)  # a tensor can be equal to a number, and change later
        if not (is_constant and numbers == self._numbers[index]):
            if not self._remember(index, group, gradient_scale, numbers):
                return False
            self._numbers[index] = numbers if is_constant else None
        self._known[index] = {**group}
        return True

    def _remember(self, index: int, group: Group, gradient_scale: float, numbers: tuple[object, ...]) -> bool:
        """Give the plan of a group other numbers; False if they ask for another plan."""
        check_group(group, index)
        chosen, kind = self._sets[index], self._sets[index].kind
        if numbers[-len(_ORDER) :] != self._orders[index]:
            return False
        if (kind.amsgrad, kind.decays) != (bool(group["amsgrad"]), bool(group["decoupled_weight_decay"])):
            return False
        hyper = self._clipping.bound(chosen.numbers_of(group, 1, gradient_scale))
        chosen.plan.remember(hyper, factors=chosen.factors_of(group))
        return True


def _are_constant(scale: object, lr: object, betas: object, *others: object) -> bool:
    """Whether these can only be replaced; a tensor or a list may change and stay the same object."""
    return type(betas) is tuple and {type(each) for each in (scale, lr, *betas, *others)} <= _CONSTANTS
