"""Which Keras runs, and on which backend: a process has one, which the first import of Keras fixes."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["check_choice", "check_version", "outside_of_graphs", "require_backend"]

_BACKENDS = ("torch", "jax", "numpy")
_ADVICE = f"""KERAS_BACKEND must be {" | ".join(_BACKENDS)}, set before keras is first imported: \
os.environ["KERAS_BACKEND"] = "torch\""""
_F = TypeVar("_F", bound=Callable[..., Any])


def check_choice() -> None:
    """Refuse a backend without this update while Keras is not imported yet, and another can still be chosen."""
    if "keras" in sys.modules or importlib.util.find_spec("keras") is None:
        return
    chosen = os.environ.get("KERAS_BACKEND")
    backend = chosen or _backend_of_file() or "tensorflow"
    if backend not in _BACKENDS:
        found = repr(chosen) if chosen else f"not set, which means {backend}"
        raise ImportError(f"fastadam.keras: KERAS_BACKEND is {found}. {_ADVICE}", name="fastadam.keras")


def _backend_of_file() -> str | None:
    """What Keras reads where the environment does not say."""
    folder = os.environ.get("KERAS_HOME") or Path.home() / ".keras"
    try:
        found = json.loads((Path(folder) / "keras.json").read_text()).get("backend")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def check_version(keras: Any) -> None:
    """Keras 3 that updates all variables in one call."""
    version = str(getattr(keras, "__version__", "of an unknown version"))
    is_new = version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 3
    if not is_new or not hasattr(keras.optimizers.Adam, "_backend_update_step"):
        raise ImportError(f"fastadam.keras needs Keras 3, found {version}: pip install -U keras", name="keras")


def require_backend(name: str) -> None:
    """Refuse the backend that Keras runs on, or its device, if it has not this update."""
    import keras

    backend = keras.backend.backend()
    if backend not in _BACKENDS:
        raise RuntimeError(
            f"fastadam.keras.{name}: Keras runs on {backend}. {_ADVICE}; or use keras.optimizers.{name}, which loads "
            f"the same states, or fastadam.{name} on NumPy arrays"
        )
    if backend == "jax":
        import jax

        from fastadam.jax._operation import has_cuda

        platform = jax.default_backend()
        if platform != "cpu" and not (platform == "gpu" and has_cuda()):
            raise RuntimeError(
                f"fastadam.keras.{name}: JAX on {platform} is not supported by this build, expected "
                f"{'cpu or gpu (CUDA)' if has_cuda() else 'cpu'} (environment variable JAX_PLATFORMS); use "
                f"keras.optimizers.{name}, which loads the same states"
            )


def outside_of_graphs(function: _F) -> _F:
    """``torch.compile`` (``jit_compile=True``) calls it as it is; its pointers are those of one call."""
    import keras

    if keras.backend.backend() != "torch":
        return function
    import torch

    compiler: Any = torch.compiler
    outside: _F = compiler.disable(function)
    return outside
