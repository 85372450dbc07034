"""Other frameworks: recognise their objects without importing anything; say what to use for them or to install."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sized, ValuesView
from types import ModuleType
from typing import Any, TypeVar

from fastadam._core.common.types import Tree

__all__ = [
    "can_load",
    "first_of",
    "framework_of",
    "hint_for_variable",
    "is_array",
    "missing",
    "named_in_keras",
    "refuse_parameters",
    "require",
]

Cls = TypeVar("Cls")

_NAMES = {
    "autograd": "HIPS autograd",
    "h5py": "h5py",
    "jax": "JAX",
    "keras": "Keras 3",
    "ml_dtypes": "ml_dtypes",
    "optax": "optax",
    "safetensors": "safetensors",
    "torch": "PyTorch",
}
# By top-level module. Keras comes first: with its torch backend, a layer is also a torch.nn.Module.
_MODULES = {"keras": "keras", "tf_keras": "keras", "tensorflow": "tensorflow", "torch": "torch"}
_MODULES |= {"jax": "jax", "jaxlib": "jax"}
_CONTAINERS = (list, tuple, Mapping, ValuesView)  # the last two are slow to ask for
_HINTS = {
    "jax": "for JAX arrays use fastadam.jax (adam with optax, or fused_update)",
    "keras": "for Keras 3 models use model.compile(optimizer=fastadam.keras.Adam(...))",
    "tensorflow": "TensorFlow's variables cannot be updated in place: use tf.keras.optimizers.Adam, whose state "
    "fastadam.exchange converts, or NumPy arrays (variable.numpy())",
    "torch": "for parameters of PyTorch use fastadam.torch.Adam(model.parameters(), lr=...)",
    "arrays": "variables go to apply_gradients([(gradient, variable), ...])",
}


def missing(what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """An error that says what to install; the error itself if another module is missing."""
    if error.name not in _NAMES:
        return error
    return ModuleNotFoundError(f"{what} needs {_NAMES[error.name]}: pip install {error.name}", name=error.name)


def can_load(adapter: str) -> bool:
    """Whether ``fastadam.<adapter>`` is loaded or its framework installed; for Keras also whether a backend is set."""
    if f"fastadam.{adapter}" in sys.modules:
        return True
    backend = os.environ.get("KERAS_BACKEND", "")
    return importlib.util.find_spec(adapter) is not None and (
        adapter != "keras" or backend in ("torch", "jax", "numpy")
    )


def require(package: str, what: str) -> ModuleType:
    """Import a package; the ModuleNotFoundError says what needs it and how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise missing(what, error) from None


def framework_of(value: object) -> str | None:
    """The framework that defines an object's class or a base of it: "keras", "tensorflow", "torch" or "jax"."""
    cls: Any = type(value)
    return _framework_of_class(cls)


@functools.lru_cache(maxsize=64)
def _framework_of_class(cls: type[object]) -> str | None:
    tops = {base.__module__.partition(".")[0] for base in cls.__mro__}
    return next((name for module, name in _MODULES.items() if module in tops), None)


def hint_for_variable(value: object) -> str | None:
    """What to use for a variable of a framework whose arrays fastadam.Adam cannot update."""
    framework = framework_of(value)
    return None if framework in (None, "torch") else _HINTS[framework]


def refuse_parameters(name: str, value: object) -> None:
    """Refuse a model or its parameters as a learning rate: PyTorch's optimizers take parameters first."""
    kind = _kind_of_parameters(value)
    if kind is not None:
        raise TypeError(f"{name}: {type(value).__name__}, expected a number or a schedule; {_HINTS[kind]}")


def _kind_of_parameters(value: object) -> str | None:
    if isinstance(value, Iterator):  # looking at its items would use them up
        frame = getattr(value, "gi_frame", None)
        module = str(frame.f_globals.get("__name__")) if frame is not None else ""
        return _MODULES.get(module.partition(".")[0], "torch" if "torch" in sys.modules else None)
    inside = isinstance(value, _CONTAINERS)
    value = first_of(value)
    shape = getattr(value, "shape", None)
    is_vector = isinstance(shape, Sized) and (inside or len(shape) > 0)  # a single number can be a rate
    is_model = any(hasattr(type(value), name) for name in ("trainable_variables", "named_parameters"))
    framework = framework_of(value)
    if framework is not None:
        return framework if inside or is_vector or is_model else None
    return "arrays" if is_vector and is_array(value) else None


def first_of(value: Tree) -> Tree:
    """The first variable in nested lists, dicts and parameter groups; any other value itself."""
    for _ in range(100):  # a list may hold itself
        if not isinstance(value, _CONTAINERS) or len(value) == 0:
            break
        if isinstance(value, Mapping):
            value = value["params"] if "params" in value else value.values()
        else:
            value = next(iter(value))
    return value


def is_array(value: object) -> bool:
    """Whether a value is a NumPy array or a fastadam.Variable."""
    return hasattr(value, "shape") and type(value).__module__.partition(".")[0] in ("fastadam", "numpy")


def named_in_keras(cls: type[Cls]) -> type[Cls]:
    """For optimizers that are not Keras's: the error of ``model.compile``, which formats them, gains a hint."""

    def __format__(self: Cls, spec: str) -> str:  # noqa: N807
        text = object.__format__(self, spec)
        asked_by = str(sys._getframe(1).f_globals.get("__name__"))
        if asked_by.partition(".")[0] not in ("keras", "tf_keras"):
            return text
        return f"{text}. For Keras 3 models use fastadam.keras.Adam or AdamW"

    cls.__format__ = __format__  # type: ignore[method-assign, assignment]
    return cls
