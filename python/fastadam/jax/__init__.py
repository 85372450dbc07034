"""Adam for JAX with the native kernels: optax transformations, a step in donated memory, a step of sparse rows.

All functions work inside ``jit``, ``scan``, ``vmap`` and ``shard_map``, and together with ``grad``, but a step itself
cannot be differentiated. Sharded arrays stay on their devices if their gradients have the same sharding. A step works
in place in a jitted function whose arguments are donated; JAX copies arguments that are not.

The functions run on CPUs and CUDA devices; on other devices compilation fails with the name of the missing handler.
Numbers such as the learning rate and the count are operands, so new values do not cause compilation. Invalid values (a
count of 0, a NaN) raise an error when the computation runs: ``jax.errors.JaxRuntimeError``, or ``ValueError`` if the
function has run before. Donated arrays are then lost. On a GPU the host waits for these numbers before it launches a
step, and so for the gradients.

A process that loads a compiled step (``serialize_executable``) must call :func:`register` first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from fastadam._core.common.frameworks import missing
from fastadam._core.common.public import publish

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
