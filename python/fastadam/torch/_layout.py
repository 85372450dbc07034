"""How a native plan sees tensors of PyTorch: as contiguous real memory of this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ALONE",
    "UNORDERED",
    "Turn",
    "View",
    "clusters_of",
    "flattened",
    "gradient_like",
    "in_order_of",
    "is_lazy_view",
    "is_plain",
    "local_of",
    "require_same_field",
    "span_of",
    "turns_of",
    "versions_of",
]


class Layout(NamedTuple):
    """What a view depends on."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_lazy: bool


def local_of(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this process holds; any other tensor unchanged."""
    if not hasattr(tensor, "_local_tensor"):
        return tensor
    local: Tensor = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local  # a collective may still be running


def versions_of(tensors: Sequence[Tensor]) -> list[int | None]:
    """What goes up when tensors are written to; all None if there is an inference tensor, which has no version."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [None] * len(tensors)


class Turn(NamedTuple):
    """When a parameter is stepped among others that share memory or a step count with it."""

    after: int  # how many turns come before
    earlier: int  # how often its step count is raised in this step before it is read
    owns_memory: bool  # no other parameter shares memory with it, and it comes once
    owns_count: bool  # the same of its step count

    @property
    def is_alone(self) -> bool:
        """Whether it shares nothing."""
        return self.owns_memory and self.owns_count


UNORDERED = (
    "which torch updates in an order that depends on the device; expected foreach=None, which steps them one after "
    "another"
)
ALONE = Turn(0, 0, owns_memory=True, owns_count=True)


def turns_of(params: Sequence[Tensor], steps: Sequence[Tensor | None], *, fused: bool, foreach: bool) -> list[Turn]:
    """The turn of each parameter; those with one turn are apart in memory and can be stepped together.

    As in torch, a parameter raises its step count, and is stepped, after those before it. With ``fused`` and
    ``foreach`` all step counts are raised first.

    Args:
        params: The parameters that a group steps.
        steps: Their step counts; None for a parameter that has none yet.
        fused: The option of the group.
        foreach: The option of the group.

    Raises:
        ValueError: Parameters share memory with ``foreach``, or a step count but not their dtype or device with either.
    """
    if len(params) < 2:
        return [ALONE] * len(params)
    counts_first = fused or foreach
    keys = [_count_key(*pair) for pair in zip(params, steps, strict=True)]
    raises = Counter(keys)
    turns = [ALONE] * len(params)
    spans = [span_of(param) for param in params]
    clusters = {place: places for places in clusters_of(spans) for place in places}
    if foreach and clusters:
        raise ValueError(f"foreach: True with parameters that share memory, {UNORDERED}")
    raised: Counter[Hashable] = Counter()
    last: dict[Hashable, tuple[int, Tensor]] = {}  # the turn of the last parameter with this step count
    for place, key in enumerate(keys):
        if place not in clusters and raises[key] == 1:
            continue
        start, end = spans[place]
        others = (p for p in clusters.get(place, []) if p < place)
        before = [turns[p].after for p in others if spans[p][1] > start and end > spans[p][0]]
        turn, other = last.get(key, (-1, params[place]))
        if counts_first and (other.dtype, other.device) != (params[place].dtype, params[place].device):
            raise ValueError(
                "step: one tensor in the states of parameters of different dtypes or devices, which torch steps in no "
                f"fixed order with {'fused' if fused else 'foreach'}=True; expected a tensor for each"
            )
        earlier = raises[key] - 1 if counts_first else raised[key]
        turns[place] = Turn(max([turn, *before]) + 1, earlier, place not in clusters, raises[key] == 1)
        raised[key] += 1
        last[key] = turns[place].after, params[place]
    return turns


def _count_key(param: Tensor, step: Tensor | None) -> Hashable:
    """The same for two parameters that count in one place."""
    return id(param) if step is None else (str(step.device), step.data_ptr())


def span_of(tensor: Tensor) -> tuple[tuple[str, int], tuple[str, int]]:
    """The first byte of a tensor and the one after its last, with the device."""
    local = local_of(tensor)
    start, device = local.data_ptr(), str(local.device)
    if local.is_contiguous():
        size = local.numel()
    else:
        size = 1 + sum((n - 1) * stride for n, stride in zip(local.shape, local.stride(), strict=True))
    return (device, start), (device, start + size * local.element_size())


def clusters_of(spans: list[tuple[tuple[str, int], tuple[str, int]]]) -> list[list[int]]:
    """The places of spans that overlap, directly or through others, in order; those that are alone are left out."""
    clusters: list[list[int]] = []
    order = sorted((place for place, (start, end) in enumerate(spans) if end > start), key=lambda place: spans[place])
    end = ("", 0)
    for place in order:
        if clusters and spans[place][0] < end:
            clusters[-1].append(place)
        else:
            clusters.append([place])
        end = max(end, spans[place][1])
    return [sorted(places) for places in clusters if len(places) > 1]


def is_lazy_view(tensor: Tensor) -> bool:
    """Whether the memory holds the conjugates or the negatives of the tensor's values."""
    return bool(tensor.is_conj() or tensor.is_neg())


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether a plan can read a parameter and its moments without a view."""
    return all(t.is_contiguous() and not hasattr(t, "_local_tensor") and not t.is_complex() for t in tensors)


def flattened(tensor: Tensor, axes: int) -> Tensor:
    """A view in which the first axes are one; a tensor for which there is none stays as it is."""
    return tensor.detach().flatten(0, axes - 1) if is_plain([tensor]) else tensor


def require_same_field(gradient: Tensor, parameter: Tensor, label: str) -> None:
    """Raise TypeError if one of them is complex and the other is not."""
    if gradient.is_complex() != parameter.is_complex():
        raise TypeError(f"grad of {label}: {gradient.dtype}, expected {parameter.dtype}")


def gradient_like(gradient: Tensor, parameter: Tensor, label: str) -> Tensor:
    """The gradient, distributed over processes as its parameter is."""
    if gradient.shape != parameter.shape:
        raise ValueError(f"grad of {label}: shape {tuple(gradient.shape)}, expected {tuple(parameter.shape)}")
    require_same_field(gradient, parameter, label)
    if not hasattr(parameter, "_local_tensor"):
        return gradient
    if not hasattr(gradient, "_local_tensor"):
        raise TypeError(f"grad of {label}: {type(gradient).__name__}, expected a DTensor like its parameter")
    if gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def _order_of(tensor: Tensor) -> tuple[int, ...]:
    """The axes by decreasing stride."""
    strides = tensor.stride()
    return tuple(sorted(range(len(strides)), key=lambda axis: (-strides[axis], axis)))


def in_order_of(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether the elements of a tensor lie in memory in the order in which those of a parameter do, without gaps."""
    return bool(tensor.permute(_order_of(parameter)).is_contiguous())


class View:
    """A parameter and its moments that a plan cannot read directly.

    A DTensor is read as its local shard, a complex tensor as its real and imaginary parts. The axes are permuted into
    the order in which the parameter is stored. If there still are gaps (a slice of a larger tensor, or moments in
    another order than their parameter), the tensor is copied before a step and copied back after it.

    Raises:
        ValueError: Elements of the parameter share memory (``expand``).
    """

    def __init__(self, tensors: Sequence[Tensor], label: str) -> None:
        parameter = local_of(tensors[0])
        self.is_complex = parameter.is_complex()
        self.order = _order_of(parameter)
        if parameter.numel() and any(n > 1 and not s for n, s in zip(parameter.shape, parameter.stride(), strict=True)):
            raise ValueError(f"{label}: strides {parameter.stride()}, elements share memory; expected a clone of it")
        self.layouts = _layouts_of(tensors)
        self.copies: dict[int, Tensor] = {}
        for k, tensor in enumerate(tensors):
            seen = self.of(tensor)
            if not seen.is_contiguous():
                self.copies[k] = torch.empty_like(seen, memory_format=torch.contiguous_format)

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape, its axes in the order in which the parameter is stored."""
        seen = local_of(tensor).detach()
        if not self.is_complex:
            return seen.permute(self.order)
        return torch.view_as_real(seen.resolve_conj().permute(self.order))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors have the layouts that the view was made for."""
        return _layouts_of(tensors) == self.layouts

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as the plan reads them; copies have the values of the last :meth:`load`."""
        return [self.copies[k] if k in self.copies else self.of(tensor) for k, tensor in enumerate(tensors)]

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Before a step: copy the tensors that have gaps."""
        for k, copy in self.copies.items():
            copy.copy_(self.of(tensors[k]))

    def store(self, tensors: Sequence[Tensor]) -> None:
        """After a step: copy them back."""
        for k, copy in self.copies.items():
            self.of(tensors[k]).copy_(copy)


def _layouts_of(tensors: Sequence[Tensor]) -> list[Layout]:
    locals_ = [local_of(tensor) for tensor in tensors]
    return [Layout(t.shape, t.stride(), t.dtype, t.device, is_lazy_view(t)) for t in locals_]
