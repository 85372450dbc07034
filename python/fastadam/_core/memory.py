"""How many bytes an optimizer holds and moves: of an optimizer as it is, and of each choice of formats."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastadam._core.common.checks import check_bool, check_choice, check_count, check_integer, check_list, check_number
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.optimizer import Optimizer
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.parts import parts_of

if TYPE_CHECKING:
    from fastadam._core.common.types import Foreign, VariableLike

__all__ = ["BANDWIDTH", "BITS", "MemoryRow", "MemoryTable", "memory"]

BANDWIDTH = 50e9  # bytes per second: two channels of DDR4-3200 have 51.2e9
BITS = ("float32", "bfloat16")  # what gradients may be
_BLOCK = 128  # elements that share a scale
_SMALL = 4096  # tensors with fewer elements keep float32 moments


class Format(NamedTuple):
    """Bytes per element of what a choice keeps."""

    name: str
    options: str  # how the choice is made
    parameter: int  # as the model uses it
    master: int  # beside it: float32 or, of a split master, the low half
    moment: int  # each
    scale: int = 0  # of a block of each moment
    reads_parameter: bool = True  # else a step only writes it, as a copy of the master


FORMATS = (
    Format("float32", "", 4, 0, 4),
    Format("float32 master, bfloat16 copy", "copies= or master='float32'", 2, 4, 4, reads_parameter=False),
    Format("bfloat16 moments", "moments='bfloat16'", 4, 0, 2),
    Format("split master, bfloat16 moments", "master='split', moments='bfloat16'", 2, 2, 2),
    Format("8-bit moments", "moments='8bit'", 4, 0, 1, 1),
    Format("split master, 8-bit moments", "master='split', moments='8bit'", 2, 2, 1, 1),
    Format("bfloat16, bfloat16 moments", "stochastic_rounding=True, moments='bfloat16'", 2, 0, 2),
    Format("bfloat16, 8-bit moments", "stochastic_rounding=True, moments='8bit'", 2, 0, 1, 1),
)


class MemoryRow(NamedTuple):
    """Bytes of one choice, of all parameters together.

    Attributes:
        name: The choice.
        options: The arguments that make it; empty for the default.
        size: Number of parameters.
        parameters: Held, as the model uses them.
        master: The float32 value beside a half copy, or the low half of a split master.
        moments: Both, or all three with AMSGrad.
        scales: Of 8-bit moments.
        average: The moving average.
        gradients: The gradients of one step.
        held: The sum of those before.
        moved: Read and written by one step.
        seconds: Of one step, if it is as fast as memory.
    """

    name: str
    options: str
    size: int
    parameters: int
    master: int
    moments: int
    scales: int
    average: int
    gradients: int
    held: int
    moved: int
    seconds: float


class MemoryTable(tuple[MemoryRow, ...]):
    """Rows of :class:`MemoryRow` that print as a table: bytes per parameter, and in all."""

    bandwidth: float  # bytes per second

    def __new__(cls, rows: Iterable[MemoryRow], bandwidth: float) -> MemoryTable:
        self = super().__new__(cls, check_list("rows", rows))
        self.bandwidth = bandwidth
        return self

    def __getnewargs__(self) -> tuple[list[MemoryRow], float]:
        return list(self), self.bandwidth

    def __repr__(self) -> str:
        """The table."""
        titles = ("parameter", "master", "moments", "scales", "average", "gradient", "held", "in all", "moved", "step")
        columns = [title for title in titles if title != "average" or any(row.average for row in self)]
        width = max((len(row.name) for row in self), default=0)
        lines = [" ".join([" " * width, *(f"{title:>9}" for title in columns)]).rstrip()]
        for row in self:
            each = [row.parameters, row.master, row.moments, row.scales, row.average, row.gradients, row.held]
            cells = dict(zip(titles, [_per(number, row.size) for number in each], strict=False))
            cells |= {"in all": _bytes(row.held), "moved": _per(row.moved, row.size), "step": _time(row.seconds)}
            lines.append(" ".join([f"{row.name:<{width}}", *(f"{cells[title]:>9}" for title in columns)]))
        count = self[0].size if self else 0
        lines.append(
            f"{count:,} parameters; bytes for each, but for `in all`. moved: read and written by a step; "
            f"step: that at {self.bandwidth / 1e9:g} GB/s."
        )
        return "\n".join(lines)


@suggests_keywords()
def memory(
    optimizer_or_shapes: Optimizer
    | int
    | Iterable[int | tuple[int, ...] | tuple[str, Foreign] | VariableLike]
    | Foreign,
    *,
    gradients: Literal["float32", "bfloat16"] | None = None,
    amsgrad: bool = False,
    use_ema: bool = False,
    bandwidth: float = BANDWIDTH,
) -> MemoryTable:
    """Bytes that training holds and that a step moves, for each choice of formats.

    The first row of an optimizer is what it holds now; the others are what its parameters would need. Choices that do
    not exist are left out: 8-bit moments with AMSGrad, and moving averages of a split master.

    Args:
        optimizer_or_shapes: A :class:`fastadam.Adam` or AdamW, or one of PyTorch such as :class:`fastadam.torch.AdamW`,
            after its first step or ``build``; or the shapes, arrays or sizes of the parameters, or pairs of a name and
            one of these; or their number, as of one tensor. Tensors of fewer than 4096 elements keep float32 moments.
        gradients: Their dtype; None: that of the parameters as the model uses them.
        amsgrad: Count the maximum of the second moments.
        use_ema: Count a float32 moving average of the parameters.
        bandwidth: Bytes per second between processor and memory, both directions together. The default, 50e9, is about
            that of two channels of DDR4-3200.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The optimizer has no state yet; a size is negative, ``gradients`` is no such dtype, or ``bandwidth``
            is not positive.

    >>> import fastadam
    >>> table = fastadam.memory([(4096, 1024), (4096,)])
    >>> [(row.name, round(row.held / row.size, 2), round(row.moved / row.size, 2)) for row in table[2:4]]
    [('bfloat16 moments', 12.0, 20.0), ('split master, bfloat16 moments', 10.0, 18.0)]
    >>> round(fastadam.memory(7 * 10**9)[-3].held / 2**30, 1)  # GiB, split master and 8-bit moments
    52.3
    """
    check_choice("gradients", gradients, BITS)
    check_bool("amsgrad", amsgrad)
    check_bool("use_ema", use_ema)
    speed = check_number("bandwidth", bandwidth)
    if not 0 < speed < math.inf:
        raise ValueError(f"bandwidth: {speed}, expected a positive number of bytes per second")
    given, rows = getattr(optimizer_or_shapes, "inner_optimizer", optimizer_or_shapes), []
    if isinstance(given, Optimizer) or hasattr(given, "param_groups"):
        found = _of_core(given) if isinstance(given, Optimizer) else _of_torch(given)
        sizes = found.sizes
        rows.append(found.row(gradients, speed))
    else:
        sizes = _sizes_of(given)
    rows += [_row(choice, sizes, gradients, amsgrad, use_ema, speed) for choice in _choices(amsgrad, use_ema)]
    return MemoryTable(rows, speed)


def _choices(amsgrad: bool, use_ema: bool) -> Iterator[Format]:
    for choice in FORMATS:
        is_split = choice.master == 2
        if not (amsgrad and choice.scale) and not (use_ema and is_split):
            yield choice


def _row(
    choice: Format, sizes: Sequence[int], gradients: str | None, amsgrad: bool, use_ema: bool, speed: float
) -> MemoryRow:
    count, moments = sum(sizes), 3 if amsgrad else 2
    large = [size for size in sizes if size >= _SMALL]
    small = count - sum(large)
    gradient = choice.parameter if gradients is None else 4 if gradients == "float32" else 2
    return _sum_up(
        choice.name,
        choice.options,
        count,
        parameters=choice.parameter * count,
        master=choice.master * count,
        moments=moments * (choice.moment * (count - small) + 4 * small),
        scales=moments * choice.scale * sum(-(-size // _BLOCK) for size in large),
        average=4 * count if use_ema else 0,
        gradients=gradient * count,
        only_written=0 if choice.reads_parameter else choice.parameter * count,
        speed=speed,
    )


def _sum_up(name: str, options: str, count: int, *, only_written: int, speed: float, **parts: int) -> MemoryRow:
    """A row: everything but gradients is read and written, gradients are read."""
    held = sum(parts.values())
    moved = 2 * (held - parts["gradients"]) - only_written + parts["gradients"]
    return MemoryRow(name, options, count, **parts, held=held, moved=moved, seconds=moved / speed)


class _Found:
    """What an optimizer holds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sizes: list[int] = []
        self.gradient_items: list[int] = []  # bytes per element of a gradient like its parameter
        self.parts = dict.fromkeys(("parameters", "master", "moments", "scales", "average", "gradients"), 0)
        self.only_written = 0
        self.accumulators = 0

    def row(self, gradients: str | None, speed: float) -> MemoryRow:
        """The bytes; gradients that it does not hold are counted as those of a step."""
        parts = {**self.parts}
        if gradients is not None or not parts["gradients"]:
            items = [{"float32": 4, "bfloat16": 2}.get(gradients or "", item) for item in self.gradient_items]
            parts["gradients"] = sum(size * item for size, item in zip(self.sizes, items, strict=True))
        parts["gradients"] += self.accumulators
        count = sum(self.sizes)
        return _sum_up(self.name, "as it is", count, only_written=self.only_written, speed=speed, **parts)


def _part_of(name: str) -> str:
    """Where a slot of the core, or an entry of a state in PyTorch, is counted."""
    if name in ("low", "master", "master_low"):
        return "master"
    return "scales" if name.endswith("_scale") else "average" if name == "average" else "moments"


def _of_core(optimizer: Optimizer) -> _Found:
    found = _Found(type(optimizer).__name__)
    parts = parts_of(optimizer)
    with parts.runtime.lock:
        slots = parts.state.slots
        for entry in slots.entries:
            size, item = math.prod(entry.recorded.shape), {"float64": 8, "float32": 4}.get(entry.recorded.dtype, 2)
            found.sizes.append(size)
            found.gradient_items.append(item)
            found.parts["parameters"] += size * item
            for name, array in slots.slots_of(entry).items():
                if name == ACCUMULATOR:
                    found.accumulators += int(array.nbytes)
                else:
                    found.parts[_part_of(name)] += int(array.nbytes)
    if not found.sizes:
        raise ValueError("optimizer: without variables, expected it after build() or its first step")
    return found


def _of_torch(optimizer: Foreign) -> _Found:
    found, has_state = _Found(type(optimizer).__name__), False
    for group in optimizer.param_groups:
        copies = group.get("compute_params") or ()
        for copy in copies:
            found.parts["parameters"] += _nbytes(copy)
            found.only_written += _nbytes(copy)
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            has_state = has_state or bool(state)
            found.sizes.append(_local(param).numel())
            found.gradient_items.append(param.element_size())
            found.parts["master" if copies else "parameters"] += _nbytes(param)
            if "master" in state:  # the parameter is a rounded copy of it
                found.only_written += _nbytes(param)
            if param.grad is not None:
                found.parts["gradients"] += _nbytes(param.grad)
            for name, value in state.items():
                if name != "step" and hasattr(value, "element_size"):
                    found.parts[_part_of(name)] += _nbytes(value)
    if not has_state:
        raise ValueError("optimizer: without state, expected it after its first step")
    return found


def _local(tensor: Foreign) -> Any:
    """The shard of a DTensor that this process holds."""
    return getattr(tensor, "_local_tensor", tensor)


def _nbytes(tensor: Foreign) -> int:
    local = _local(tensor)
    values = local._values() if local.is_sparse else local
    return int(values.numel()) * int(values.element_size())


def _sizes_of(shapes: Foreign) -> list[int]:
    """Numbers of elements."""
    if isinstance(shapes, float) and shapes.is_integer():
        shapes = int(shapes)
    if isinstance(shapes, numbers.Integral):
        return [check_count("optimizer_or_shapes", shapes)]
    if not isinstance(shapes, Iterable) or isinstance(shapes, (str, bytes, dict)) or hasattr(shapes, "shape"):
        found = type(shapes).__name__
        hint = "; of a model pass model.parameters()" if hasattr(shapes, "named_parameters") else ""
        expected = f"an optimizer, a list of shapes or arrays, or a number{hint}"
        raise TypeError(f"optimizer_or_shapes: {found}, expected {expected}")
    sizes = []
    for place, item in enumerate(shapes):
        label = f"optimizer_or_shapes[{place}]"
        is_named = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        array = item[1] if is_named else item
        shape = getattr(array, "shape", array)
        shape = (shape,) if hasattr(shape, "__index__") else shape
        if not isinstance(shape, Iterable) or isinstance(shape, (str, bytes, dict)):
            raise TypeError(f"{label}: {type(item).__name__}, expected a shape, an array or a number of elements")
        dims = [check_integer(label, dim, "a shape, an array or a number of elements") for dim in shape]
        if any(dim < 0 for dim in dims):
            raise ValueError(f"{label}: {tuple(dims)}, expected whole numbers >= 0")
        sizes.append(math.prod(dims))
    if not sum(sizes):
        raise ValueError("optimizer_or_shapes: no elements, expected at least one parameter")
    return sizes


def _per(number: int, count: int) -> str:
    """Bytes per parameter."""
    return f"{number / count:.4f}".rstrip("0").rstrip(".") if number else "0"


def _bytes(number: int) -> str:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.1f} {unit}"
    return f"{number} B"


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
