"""Gradients of a loss over Variables by HIPS autograd, JAX or PyTorch. A library is imported when it is first named.

Each provider is a tape: while the loss runs, ``Variable.value`` is an array of the provider's library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from fastadam._core.autodiff.autograd import AutogradTape
from fastadam._core.autodiff.jax import JaxTape
from fastadam._core.autodiff.tape import Loss, Refresh, Resolve, Tape
from fastadam._core.autodiff.torch import TorchTape
from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.slices import IndexedSlices
from fastadam._core.native.variable import Variable

__all__ = ["PROVIDERS", "Loss", "check_provider", "installed", "run_and_differentiate"]

PROVIDERS: dict[str, type[Tape]] = {"autograd": AutogradTape, "jax": JaxTape, "torch": TorchTape}


def installed() -> str:
    """A phrase that names the installed providers."""
    names = [repr(name) for name in PROVIDERS if importlib.util.find_spec(name) is not None]
    return f"installed here: {', '.join(names)}" if names else f"none of {', '.join(PROVIDERS)} is installed here"


def check_provider(name: str, label: str) -> None:
    """Refuse an unknown provider, and one that is not installed."""
    if name not in PROVIDERS:
        raise ValueError(f"{label}: {name!r}, expected one of {', '.join(map(repr, PROVIDERS))}; {installed()}")
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"{label}: {name!r} is not installed, `pip install {name}` does it; {installed()}", name=name
        )


def run_and_differentiate(
    provider: str,
    loss: Loss,
    variables: Sequence[Variable] | None,
    resolve: Resolve,
    upstream: HostArray | None,
    refresh: Refresh,
) -> list[AnyArray]:
    """The gradients of a loss, each in the dtype of its variable; None for a variable that it does not depend on.

    Args:
        provider: A name of ``PROVIDERS``.
        loss: Function without arguments.
        variables: The variables, or None if they are known only after the loss has run.
        resolve: Returns the variables; called after the loss has run.
        upstream: The gradient with respect to the value of the loss; None means ones.
        refresh: Called with a variable, and the ids of rows or None, before its memory is read.

    Raises:
        TypeError: The loss did not return a float array.
        ValueError: ``upstream`` does not have the shape of the loss.
    """
    gradients = PROVIDERS[provider](variables, refresh).differentiate(loss, resolve, upstream)
    return [
        gradient if gradient is None or isinstance(gradient, IndexedSlices) else np.asarray(gradient, variable.dtype)
        for gradient, variable in zip(gradients, resolve(), strict=True)
    ]
