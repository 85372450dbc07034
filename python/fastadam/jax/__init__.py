"""Adam for JAX by the native kernels: an optax transformation, a donated step in place, and a step of sparse rows.

Everything works inside ``jit``, ``scan``, ``vmap`` and ``shard_map``, and beside ``grad``; a step itself is not
differentiated. Sharded arrays stay where they are if their gradients are sharded alike. In place means: in a jitted
function whose arguments are donated; JAX copies what is not.

On the CPU and on CUDA devices; elsewhere compilation fails with the name of the missing handler. Rates and the count
are operands, so that other values do not compile again; what is refused of their values (a count of 0, a NaN) is an
error of the computation, ``jax.errors.JaxRuntimeError`` or, of a function that has run before, ``ValueError``, after
which donated arrays are gone. On a GPU the host reads them before it launches a step, which waits for the gradients.

A compiled step that another process loads (``serialize_executable``) needs :func:`register` there first.

JAX differentiates, batches and shards by rules; those of a step are in ``operation.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from fastadam._core.frameworks import missing
from fastadam._core.public import publish

try:
    from fastadam.jax._arguments import AmsgradState
    from fastadam.jax._operation import register
    from fastadam.jax._steps import fused_update, init, sparse_update, step_arrays
    from fastadam.jax._transformations import adam, adamw, scale_by_adam
except ModuleNotFoundError as _error:
    raise missing("fastadam.jax", _error) from None

__all__ = [
    "AmsgradState",
    "adam",
    "adamw",
    "fused_update",
    "init",
    "register",
    "scale_by_adam",
    "sparse_update",
    "step_arrays",
]

publish(globals())


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # or every name would have a type

    def __getattr__(name: str) -> NoReturn:
        hint = (
            f"; it has the functions {name.lower()} (as in optax) and fused_update" if name in ("Adam", "AdamW") else ""
        )
        raise AttributeError(f"module 'fastadam.jax' has no attribute {name!r}{hint}")
