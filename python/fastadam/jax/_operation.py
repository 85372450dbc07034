"""The native step as an operation of JAX: how it is called, batched, sharded, and refused under ``grad``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from fastadam import _jax

if TYPE_CHECKING:
    from jax.sharding import Mesh

__all__ = ["DenseStep", "SparseStep", "has_cuda", "operation"]

Operation = Callable[..., tuple[jax.Array, ...]]
T = TypeVar("T")
Axes = tuple[Any, ...]  # of a PartitionSpec: None, an axis of the mesh, or a tuple of these


class Sharded(Protocol):
    """The shape and sharding of an operand or result, as JAX describes them to a partitioner."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def sharding(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class DenseStep:
    """A step of dense gradients.

    The operands are numbers and count, then all gradients, all parameters, all m, all v, and with ``amsgrad`` all vhat.
    The results are new parameters, m, v and vhat. With ``from_zero`` there are no parameters among the operands, and
    the result for them is the step itself, in the dtype of the gradients. Under ``vmap`` every array has ``batch_rank``
    leading axes.
    """

    target: ClassVar[str] = "fastadam_dense_step"
    ranks: tuple[int, ...]  # of the leaves, without the axes of vmap
    amsgrad: bool
    epsilon_corrected: bool
    decays: tuple[bool, ...]
    from_zero: bool = False
    batch_rank: int = 0

    @property
    def fresh(self) -> slice:
        """The operands whose shapes and dtypes the first results have, without replacing them."""
        return slice(2, self.first_result if self.from_zero else 2)

    @property
    def first_result(self) -> int:
        """The index of the first operand that a result replaces."""
        return 2 + len(self.ranks)

    @property
    def operand_axes(self) -> list[list[str]]:
        """Names of the axes of each operand. Axes of the same name are sharded alike if a result has the name."""
        leaves = [[f"leaf{i}axis{axis}" for axis in range(rank)] for i, rank in enumerate(self.ranks)]
        return [["number", "part"], [], *leaves * (4 + self.amsgrad - self.from_zero)]

    def attributes(self) -> dict[str, object]:
        """The attributes of the handler."""
        flags = {"amsgrad": self.amsgrad, "epsilon_corrected": self.epsilon_corrected, "from_zero": self.from_zero}
        return {**flags, "decays": np.asarray(self.decays, np.int64)}

    def row_axes(self, spec: Axes) -> Axes:
        """The axes of the mesh along which the handler must know its position."""
        return ()


@dataclasses.dataclass(frozen=True)
class SparseStep:
    """A step of the rows of a table.

    The operands are numbers, count, ids, values, the table, m, v, and with ``amsgrad`` vhat. The results are the table,
    m, v and vhat.
    """

    target: ClassVar[str] = "fastadam_sparse_step"
    rank: int  # of the table
    rows: int
    amsgrad: bool
    epsilon_corrected: bool
    lazy: bool
    batch_rank: int = 0
    fresh: ClassVar[slice] = slice(0)
    first_result: ClassVar[int] = 4

    @property
    def operand_axes(self) -> list[list[str]]:
        """Names as for DenseStep. Each shard of the rows gets all ids and uses those of its own rows."""
        columns = [f"column{axis}" for axis in range(self.rank - 1)]
        return [["number", "part"], [], ["id"], ["id", *columns], *[["row", *columns]] * (4 if self.amsgrad else 3)]

    def attributes(self) -> dict[str, object]:
        """The attributes of the handler."""
        flags = {"amsgrad": self.amsgrad, "epsilon_corrected": self.epsilon_corrected, "lazy": self.lazy}
        return {**flags, "row_count": np.int64(self.rows)}

    def row_axes(self, spec: Axes) -> Axes:
        """The axes of the mesh along which the rows are sharded. The handler gets an operand for each."""
        axes = spec[self.batch_rank]
        return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


Step = DenseStep | SparseStep


@functools.cache
def operation(step: Step) -> Operation:
    """The function that makes a step. Each call of it is one call of the handler on each device."""

    def refuse(primals: object, tangents: object) -> None:
        raise TypeError(
            "fastadam: a step cannot be differentiated; apply jax.lax.stop_gradient to its operands, or use "
            "optax.adam for gradients through the optimizer"
        )

    update = jax.custom_jvp(_batched(step))
    update.defjvp(refuse)

    def fastadam_step(*operands: jax.Array) -> tuple[jax.Array, ...]:
        results: tuple[jax.Array, ...] = update(*_varying_alike(operands))
        return results

    compiled: Operation = jax.jit(fastadam_step, inline=True)
    return compiled


def _varying_alike(operands: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """In ``shard_map``, tell JAX that all operands may vary along every axis of the mesh along which any does."""
    axes = frozenset[str]().union(*map(_varying_axes, operands))
    return [_vary(x, axes - _varying_axes(x)) if axes else x for x in operands]


def _varying_axes(array: jax.Array) -> frozenset[str]:
    """Axes of the mesh along which the values may differ. The attribute's name depends on the version of JAX."""
    kind = jax.typeof(array)
    axes: frozenset[str] = (
        kind.vma if hasattr(kind, "vma") else kind.mat.varying if hasattr(kind, "mat") else frozenset()
    )
    return axes


def _vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    if not axes:
        return array
    lax: Any = jax.lax  # whose names depend on the version
    return lax.pcast(array, tuple(axes), to="varying") if hasattr(lax, "pcast") else lax.pvary(array, tuple(axes))


def _batched(step: Step) -> Operation:
    """A step under ``vmap``: every operand gets another leading axis, and the handler makes a step for each index."""

    def batch(
        size: int, are_batched: Sequence[bool], *operands: jax.Array
    ) -> tuple[tuple[jax.Array, ...], tuple[bool, ...]]:
        spread = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(operands, are_batched, strict=True)
        ]
        results = _next_batched(step)(*spread)
        return results, (True,) * len(results)

    function = jax.custom_batching.custom_vmap(_partitioned(step))
    function.def_vmap(batch)
    return cast(Operation, function)


@functools.cache
def _next_batched(step: Step) -> Operation:
    return _batched(dataclasses.replace(step, batch_rank=step.batch_rank + 1))


def _partitioned(step: Step) -> Operation:
    """A step on several devices: each updates its own shards, without communication."""

    def on_one_device(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _call(step, operands, {})

    def partition(mesh: Mesh, operands: Sequence[Sharded], results: Sequence[Sharded]) -> tuple[object, ...]:
        if any(not isinstance(result.sharding, NamedSharding) for result in results):
            shardings, lengths = _whole_shardings(step, operands, results), {}
        else:
            specs = _specs(step, [_spec_of(result) for result in results])
            lengths = {axis: mesh.shape[axis] for axis in step.row_axes(specs[step.first_result])}
            shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]

        def on_each_device(*shards: jax.Array) -> tuple[jax.Array, ...]:
            return _call(step, shards, lengths)

        return mesh, on_each_device, tuple(_of_results(step, shardings)), tuple(shardings)

    def infer(mesh: Mesh, operands: Sequence[Sharded], results: Sequence[Sharded]) -> tuple[NamedSharding, ...]:
        unsharded = NamedSharding(mesh, PartitionSpec())
        return tuple(unsharded if x.sharding is None else x.sharding for x in _of_results(step, operands))

    function = custom_partitioning(on_one_device)
    function.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=_rule(step),
    )
    return cast(Operation, function)


def _all_axes(step: Step) -> list[list[str]]:
    return [[*(f"batch{i}" for i in range(step.batch_rank)), *axes] for axes in step.operand_axes]


def _rule(step: Step) -> str:
    axes = [" ".join(names) for names in _all_axes(step)]
    return f"{', '.join(axes)} -> {', '.join(_of_results(step, axes))}"


def _of_results(step: Step, of_operands: Sequence[T]) -> list[T]:
    """A property of each result, from the same property of each operand."""
    return [*of_operands[step.fresh], *of_operands[step.first_result :]]


def _spec_of(array: Sharded) -> Axes:
    spec = tuple(array.sharding.spec)
    return spec + (None,) * (len(array.shape) - len(spec))


def _specs(step: Step, results: Sequence[Axes]) -> list[Axes]:
    """The specs of all operands: each axis is sharded as in the last result with an axis of that name."""
    axes = _all_axes(step)
    by_name: dict[str, object] = {}
    for names, spec in zip(_of_results(step, axes), results, strict=True):
        by_name.update(zip(names, spec, strict=True))
    return [tuple(by_name.get(name) for name in names) for names in axes]


def _whole_shardings(step: Step, operands: Sequence[Sharded], results: Sequence[Sharded]) -> list[Any]:
    """The shardings of all operands if they have no named axes: ``shard_map`` is manual along only some axes."""
    if isinstance(step, SparseStep):
        raise NotImplementedError("sparse_update: in a shard_map along some axes of a mesh, expected all axes")
    of_leaves = [result.sharding for result in results[-len(step.ranks) :]]
    leaf_kinds = (len(operands) - 2) // len(step.ranks)
    return [operands[0].sharding, operands[1].sharding, *of_leaves * leaf_kinds]


def _call(step: Step, operands: Sequence[jax.Array], lengths: dict[str, int]) -> tuple[jax.Array, ...]:
    """Call the handler; `lengths` has the axes of the mesh along which the rows are sharded."""
    register()
    # Do not compute with these indices here: JAX would add annotations for a partitioner that has already run.
    places = [jax.lax.axis_index(axis) for axis in lengths]
    attributes = step.attributes()
    if isinstance(step, SparseStep):
        attributes["axis_sizes"] = np.asarray(list(lengths.values()), np.int64)
    before, replaced = [*operands[: step.first_result], *places], operands[step.first_result :]
    kinds = [jax.typeof(x) for x in _of_results(step, operands)]
    fresh = len(kinds) - len(replaced)
    aliases = {len(before) + i: fresh + i for i in range(len(replaced))}
    call = jax.ffi.ffi_call(step.target, kinds, input_output_aliases=aliases)
    return tuple(call(*before, *replaced, **attributes))


@functools.cache
def register() -> None:
    """Register the native handlers with JAX.

    A step does so when it is traced. Call this before you load a compiled step from a file. Further calls do nothing.

    Raises:
        ImportError: This version of JAX rejects the handlers.
    """
    jax.devices()  # first: a handler that JAX rejects would otherwise prevent it from initialising its backends
    handlers = [("cpu", _jax)]
    if has_cuda():
        handlers.append(("CUDA", importlib.import_module("fastadam._jax_cuda")))
    for platform, native in handlers:
        for target, handler in (
            (DenseStep.target, native.dense_handler()),
            (SparseStep.target, native.sparse_handler()),
        ):
            try:
                jax.ffi.register_ffi_target(target, handler, platform=platform)
            except Exception as error:
                raise ImportError(f"fastadam: JAX {jax.__version__} rejects its handlers ({error})") from error


def has_cuda() -> bool:
    """Whether JAX has CUDA devices and this build of fastadam has handlers for them."""
    if importlib.util.find_spec("fastadam._jax_cuda") is None:
        return False
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False
