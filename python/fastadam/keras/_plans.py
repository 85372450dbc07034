"""Native plans for the arrays that Keras's variables hold, on its torch and NumPy backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING

import numpy as np
from keras.src.backend import get_autocast_scope, in_stateless_scope

from fastadam._core.native.arrays import native_for
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gpu import cuda_module
from fastadam._core.native.plan import BoundedCache, Plan, StepHyper

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, Foreign

__all__ = ["KerasPlans", "plan_of_nothing"]


class KerasPlans:
    """A plan for each set of variables that are stepped together."""

    def __init__(self) -> None:
        self._cache: BoundedCache[tuple[int, int], KerasPlan] = BoundedCache()

    def of(self, held: list[list[Foreign]], names: list[str], *, in_place: bool) -> KerasPlan:
        """The plan of these variables.

        Args:
            held: Variables, then the slots of each name.
            names: The names of the slots.
            in_place: Whether arrays may be written without an ``assign``.
        """
        values = values_of([variable for variables in held for variable in variables])
        if not in_place:
            return KerasPlan(held, names, values, in_place=False)
        key = id(held[0][0]), len(held[0])
        plan = self._cache.get(key)
        if plan is None or not plan.fits(values):
            plan = KerasPlan(held, names, values, in_place=True)
            self._cache.put(key, plan)
        return plan


class KerasPlan:
    """A plan for the arrays that Keras's variables hold; :meth:`fits` says whether they still hold these."""

    def __init__(self, held: list[list[Foreign]], names: list[str], values: list[AnyArray], *, in_place: bool) -> None:
        """``held``: variables, then the slots of each name; ``values``: the arrays in them, in one list."""
        self._in_place = in_place and not in_stateless_scope()
        self._values = values
        self._copies: list[tuple[Foreign, AnyArray]] = []  # variables whose value cannot be written in place
        self._tensors: list[AnyArray] = []  # of PyTorch, written in place
        keras_variables = [variable for variables in held for variable in variables]
        arrays = list(map(self._writable, keras_variables, values))
        count = len(held[0])
        native = native_for(arrays[:1])
        buffers = [
            native.Buffer(array, f"variable '{variable.path}'")
            for variable, array in zip(held[0], arrays[:count], strict=True)
        ]
        self._names, self._count = names, count
        slots = {name: arrays[i * count : (i + 1) * count] for i, name in enumerate(names, start=1)}
        device = buffers[0].device
        self._plan = Plan(buffers, slots, context=cuda_module().Context(device) if device >= 0 else None)

    def fits(self, values: list[AnyArray]) -> bool:
        """Whether these are the arrays that the plan was made for, at the same addresses."""
        if self._copies or len(values) != len(self._values) or not all(map(is_, values, self._values)):
            return False
        variables, *slots = (values[i : i + self._count] for i in range(0, len(values), self._count))
        return self._plan.holds(variables, dict(zip(self._names, slots, strict=True)))

    def step(self, grads: list[AnyArray], hyper: StepHyper, assign: Callable[[Foreign, AnyArray], None]) -> None:
        """Update variables and slots; ``assign`` stores what could not be written in place."""
        self._plan.step(list(map(_apart, grads, self._values)), hyper)
        for variable, copy in self._copies:
            assign(variable, copy)
        if self._tensors:
            import torch

            torch.autograd.graph.increment_version(self._tensors)

    def _writable(self, variable: Foreign, value: AnyArray) -> AnyArray:
        """The array itself, or a copy if others must not see it change or the kernels cannot write to it."""
        if isinstance(value, np.ndarray):  # Keras makes zeros of float32 for variables of every dtype
            is_writable = value.flags.c_contiguous and value.flags.writeable and value.dtype.name == variable.dtype
        else:
            value = value.detach()  # shares the version counter
            is_writable = value.is_contiguous()
        if is_writable and self._in_place:
            if not isinstance(value, np.ndarray):
                self._tensors.append(value)
            return value
        is_array = isinstance(value, np.ndarray)
        copy = np.array(value, variable.dtype, order="C") if is_array else _contiguous_copy(value)
        self._copies.append((variable, copy))
        return copy


def values_of(variables: list[Foreign]) -> list[AnyArray]:
    """The ``value`` of each variable; Keras looks for scopes each time it is read, this function once."""
    first, kind = variables[0], type(variables[0])
    if in_stateless_scope() or get_autocast_scope() is not None or first.value is not first._value:
        return [variable.value for variable in variables]
    return [v._value if type(v) is kind and v._value is not None else v.value for v in variables]


@functools.cache
def plan_of_nothing(dtype: str) -> Plan:
    """A plan without elements, to check numbers with."""
    empty = np.empty(0, dtype)
    return Plan([_cpu.Buffer(empty, "nothing")], {"m": [empty], "v": [empty]})


def _contiguous_copy(tensor: AnyArray) -> AnyArray:
    import torch

    return tensor.clone(memory_format=torch.contiguous_format)


def _apart(gradient: AnyArray, value: AnyArray) -> AnyArray:
    """A gradient that can be read while ``value`` is written; a tensor is made contiguous and of ``value``'s dtype."""
    if isinstance(value, np.ndarray):
        return gradient.copy() if np.may_share_memory(gradient, value) else gradient
    if gradient.requires_grad or gradient.is_sparse:  # Keras's rule moves every row
        gradient = gradient.detach().to_dense()
    if gradient.dtype != value.dtype or not gradient.is_contiguous() or gradient.is_neg():
        gradient = gradient.resolve_neg().to(value.dtype).contiguous()
    return gradient.clone() if gradient.data_ptr() == value.data_ptr() else gradient
