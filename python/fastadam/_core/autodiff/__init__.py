"""Gradients of a loss over Variables by HIPS autograd, JAX or PyTorch, whichever is named; none is imported before.

Each provider is a tape: while the loss runs it answers ``Variable.value`` with an array of its library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastadam._core.autodiff.autograd import AutogradTape
from fastadam._core.autodiff.jax import JaxTape
from fastadam._core.autodiff.tape import Loss, Refresh, Resolve, Tape
from fastadam._core.autodiff.torch import TorchTape
from fastadam._core.slices import IndexedSlices
from fastadam._core.variable import Variable

__all__ = ["PROVIDERS", "Loss", "check_provider", "installed", "run_and_differentiate"]

PROVIDERS: dict[str, type[Tape]] = {"autograd": AutogradTape, "jax": JaxTape, "torch": TorchTape}


def installed() -> str:
    """The providers that are installed, in words."""
    names = [repr(name) for name in PROVIDERS if importlib.util.find_spec(name) is not None]
    return f"installed here: {', '.join(names)}" if names else f"none of {', '.join(PROVIDERS)} is installed here"


def check_provider(name: str, label: str) -> None:
    """Refuse a name that is no provider, and a provider that is not installed."""
    if name not in PROVIDERS:
        raise ValueError(f"{label}: {name!r}, expected one of {', '.join(map(repr, PROVIDERS))}; {installed()}")
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"{label}: {name!r} is not installed, `pip install {name}` does it; {installed()}", name=name
        )


def run_and_differentiate(
    provider: str, loss: Loss, variables: Sequence[Variable] | None, resolve: Resolve, upstream: Any, refresh: Refresh
) -> list[Any]:
    """The gradients of a loss, each in the dtype of its variable, None where the loss does not depend on it.

    Args:
        provider: A name of ``PROVIDERS``.
        loss: Function without arguments.
        variables: The variables, or None if they are known only after the loss has run.
        resolve: The variables, asked after the loss has run.
        upstream: The gradient with respect to the value of the loss; None means ones.
        refresh: Called with a variable, and ids or None, before its memory is read.

    Raises:
        TypeError: The loss returned no float array.
        ValueError: ``upstream`` has not the shape of the loss.
    """
    found = PROVIDERS[provider](variables, refresh).differentiate(loss, resolve, upstream)
    return [
        part if part is None or isinstance(part, IndexedSlices) else np.asarray(part, variable.dtype)
        for part, variable in zip(found, resolve(), strict=True)
    ]
