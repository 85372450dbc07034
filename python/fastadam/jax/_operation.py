"""The native step as an operation of JAX: how it is called, batched, partitioned, and refused to ``grad``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from fastadam import _jax

__all__ = ["DenseStep", "SparseStep", "has_cuda", "operation"]

Operation = Callable[..., tuple[jax.Array, ...]]
Axes = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class DenseStep:
    """Operands: numbers, count; gradients, parameters, m, v and with ``amsgrad`` vhat of every leaf, in this order.

    Results: the operands from the parameters on. ``from_zero``: there are no parameters among the operands; those of
    the results are the step itself, of the dtype of the gradients. Under ``vmap`` all have ``batch_rank`` leading axes.
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
        """The operands that the first results are like, without replacing them."""
        return slice(2, self.first_result if self.from_zero else 2)

    @property
    def first_result(self) -> int:
        """The first of the operands that results replace."""
        return 2 + len(self.ranks)

    @property
    def operand_axes(self) -> list[list[str]]:
        """Names of the axes of each operand: those of one name are sharded alike, where a result has it."""
        leaves = [[f"leaf{i}axis{axis}" for axis in range(rank)] for i, rank in enumerate(self.ranks)]
        return [["number", "part"], [], *leaves * (4 + self.amsgrad - self.from_zero)]

    def attributes(self) -> dict[str, Any]:
        """Of the handler."""
        flags = {"amsgrad": self.amsgrad, "epsilon_corrected": self.epsilon_corrected, "from_zero": self.from_zero}
        return {**flags, "decays": np.asarray(self.decays, np.int64)}

    def row_axes(self, spec: Axes) -> Axes:
        """The mesh axes that the handler has to know its place along."""
        return ()


@dataclasses.dataclass(frozen=True)
class SparseStep:
    """Operands: numbers, count, ids, values, and the table, m, v and with ``amsgrad`` vhat, which are the results."""

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
        """As of DenseStep. A shard of the rows is given all the ids, and takes its own of them."""
        columns = [f"column{axis}" for axis in range(self.rank - 1)]
        return [["number", "part"], [], ["id"], ["id", *columns], *[["row", *columns]] * (4 if self.amsgrad else 3)]

    def attributes(self) -> dict[str, Any]:
        """Of the handler."""
        flags = {"amsgrad": self.amsgrad, "epsilon_corrected": self.epsilon_corrected, "lazy": self.lazy}
        return {**flags, "row_count": np.int64(self.rows)}

    def row_axes(self, spec: Axes) -> Axes:
        """Those that the rows of the table are sharded by, for which the handler is given an operand each."""
        axes = spec[self.batch_rank]
        return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


Step = DenseStep | SparseStep


@functools.cache
def operation(step: Step) -> Operation:
    """The function of the operands; each call of it is one call of the handler, on each device."""

    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            "fastadam: a step cannot be differentiated; take its operands through jax.lax.stop_gradient, "
            "or for gradients through the optimizer use optax.adam"
        )

    update = jax.custom_jvp(_batched(step))
    update.defjvp(refuse)

    def of_any(*operands: Any) -> Any:
        return update(*_varying_alike(operands))

    compiled: Operation = jax.jit(of_any, inline=True)
    return compiled


def _varying_alike(operands: Sequence[Any]) -> Sequence[Any]:
    """In ``shard_map``: every result may differ on all devices on which any operand does, and JAX has to know it."""
    axes: frozenset[Any] = frozenset().union(*map(_varying_axes, operands))
    return [_vary(x, axes - _varying_axes(x)) if axes else x for x in operands]


def _varying_axes(array: Any) -> frozenset[Any]:
    """Axes of the mesh along which JAX takes the values to differ; where it is told depends on its version."""
    kind = jax.typeof(array)
    axes: frozenset[Any] = (
        kind.vma if hasattr(kind, "vma") else kind.mat.varying if hasattr(kind, "mat") else frozenset()
    )
    return axes


def _vary(array: Any, axes: frozenset[Any]) -> Any:
    if not axes:
        return array
    lax: Any = jax.lax
    return lax.pcast(array, tuple(axes), to="varying") if hasattr(lax, "pcast") else lax.pvary(array, tuple(axes))


def _batched(step: Step) -> Operation:
    """``vmap`` gives every operand one more leading axis; the handler makes a step for each place along these."""

    def batch(size: int, are_batched: Sequence[bool], *operands: Any) -> Any:
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
    """On several devices each updates its own shards, with nothing sent between them."""

    def on_one_device(*operands: Any) -> tuple[jax.Array, ...]:
        return _call(step, operands, {})

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        if any(not isinstance(result.sharding, NamedSharding) for result in results):
            shardings, lengths = _whole_shardings(step, operands, results), {}
        else:
            specs = _specs(step, [_spec_of(result) for result in results])
            lengths = {axis: mesh.shape[axis] for axis in step.row_axes(specs[step.first_result])}
            shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]

        def of_shards(*shards: Any) -> tuple[jax.Array, ...]:
            return _call(step, shards, lengths)

        return mesh, of_shards, tuple(_of_results(step, shardings)), tuple(shardings)

    def infer(mesh: Any, operands: Any, results: Any) -> Any:
        none = NamedSharding(mesh, PartitionSpec())
        return tuple(none if x.sharding is None else x.sharding for x in _of_results(step, operands))

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


def _of_results(step: Step, of_operands: Sequence[Any]) -> list[Any]:
    """What the results have in common with operands."""
    return [*of_operands[step.fresh], *of_operands[step.first_result :]]


def _spec_of(array: Any) -> Axes:
    spec = tuple(array.sharding.spec)
    return spec + (None,) * (len(array.shape) - len(spec))


def _specs(step: Step, results: Sequence[Axes]) -> list[Axes]:
    """Of every operand: an axis is sharded as in the last result that has it, among them the moments of each leaf."""
    axes = _all_axes(step)
    found: dict[str, Any] = {}
    for names, spec in zip(_of_results(step, axes), results, strict=True):
        found.update(zip(names, spec, strict=True))
    return [tuple(found.get(name) for name in names) for names in axes]


def _whole_shardings(step: Step, operands: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """Of every operand, where they have no axes to name: in a ``shard_map`` that is manual along some axes alone."""
    if isinstance(step, SparseStep):
        raise NotImplementedError("sparse_update in a shard_map that is not manual along all axes of its mesh")
    of_leaves = [result.sharding for result in results[-len(step.ranks) :]]
    leaf_kinds = (len(operands) - 2) // len(step.ranks)
    return [operands[0].sharding, operands[1].sharding, *of_leaves * leaf_kinds]


def _call(step: Step, operands: Sequence[Any], lengths: dict[str, int]) -> tuple[jax.Array, ...]:
    """`lengths`: of the mesh axes that the rows are sharded by."""
    register()
    # Nothing is computed of these indices here: JAX would annotate it for a partitioner that has come and gone.
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
    """Tell JAX of the handlers, once. A step does so when it is traced; what is loaded from a file needs it before.

    Not before JAX has its backends: a handler that it rejects would keep it from having any, now it is only an error.

    Raises:
        ImportError: This JAX rejects them.
    """
    jax.devices()
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
    """Whether JAX has CUDA devices, and this build of fastadam handlers for them."""
    if importlib.util.find_spec("fastadam._jax_cuda") is None:
        return False
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False
