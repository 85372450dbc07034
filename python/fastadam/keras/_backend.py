"""Checks of Keras's version and backend. A process has one backend, fixed when Keras is first imported."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

__all__ = ["check_choice", "check_version", "outside_of_graphs", "require_backend"]

_BACKENDS = ("torch", "jax", "numpy")
_ADVICE = f"""KERAS_BACKEND must be {" | ".join(_BACKENDS)}, set before keras is first imported: \
os.environ["KERAS_BACKEND"] = "torch\""""
_F = TypeVar("_F", bound=Callable[..., object])


def check_choice() -> None:
    """Raise ImportError for an unsupported backend before Keras is imported, while another can still be chosen."""
    if "keras" in sys.modules or importlib.util.find_spec("keras") is None:
        return
    variable = os.environ.get("KERAS_BACKEND")
    backend = variable or _backend_of_file() or "tensorflow"
    if backend not in _BACKENDS:
        setting = repr(variable) if variable else f"not set, which means {backend}"
        raise ImportError(f"fastadam.keras: KERAS_BACKEND is {setting}. {_ADVICE}", name="fastadam.keras")


def _backend_of_file() -> str | None:
    """The backend in Keras's configuration file."""
    folder = os.environ.get("KERAS_HOME") or Path.home() / ".keras"
    try:
        backend = json.loads((Path(folder) / "keras.json").read_text()).get("backend")
    except (OSError, ValueError, AttributeError):
        return None
    return backend if isinstance(backend, str) else None


def check_version(keras: ModuleType) -> None:
    """Raise ImportError unless this Keras updates all variables in one call."""
    version = str(getattr(keras, "__version__", "of an unknown version"))
    is_new = version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 3
    if not is_new or not hasattr(keras.optimizers.Adam, "_backend_update_step"):
        raise ImportError(f"fastadam.keras needs Keras 3, found {version}: pip install -U keras", name="keras")


def require_backend(name: str) -> None:
    """Raise RuntimeError if Keras runs on an unsupported backend or device."""
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
    """A function that ``torch.compile`` (``jit_compile=True``) calls without tracing: its pointers change."""
    import keras

    if keras.backend.backend() != "torch":
        return function
    import torch

    outside: _F = torch.compiler.disable(function)
    return outside
