"""Build the API reference: ``python .ci/docs.py [FOLDER]`` writes HTML pages, by default to build/docs.

pdoc makes the pages from the docstrings of the public modules. Any warning is an error. Adapters whose framework is not
installed are left out, with a note.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
import inspect
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc
import pdoc.render

MODULES = [f"fastadam{name}" for name in ("", ".cuda", ".exchange", ".reference", ".schedules")]
ADAPTERS = ("torch", "jax", "keras")


class Source:
    """An annotation as it is written in the source: ``Gradient`` says more than the union that it stands for."""

    def __init__(self, annotation: object) -> None:
        self.text = str(getattr(annotation, "__forward_arg__", annotation))

    def __repr__(self) -> str:
        return self.text


def import_modules() -> list[types.ModuleType]:
    """The public modules. Classes and functions keep the name of the module that defines them, where pdoc looks."""
    sys.modules["fastadam._core.common.public"] = types.SimpleNamespace(publish=lambda namespace: None)
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    installed = [name for name in ADAPTERS if importlib.util.find_spec(name) is not None]
    for name in sorted({*ADAPTERS} - {*installed}):
        print(f"fastadam.{name}: left out, {name} is not installed")
    return [importlib.import_module(name) for name in [*MODULES, *(f"fastadam.{name}" for name in installed)]]


def show_source(owner: object) -> None:
    """Show the annotations of a class or function as they are written."""
    owner.__annotations__ = {name: Source(annotation) for name, annotation in inspect.get_annotations(owner).items()}


def functions_of(value: object) -> Iterator[types.FunctionType]:
    """The function behind a function, a class method or a property."""
    for function in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
        if inspect.isfunction(function):
            yield inspect.unwrap(function)


def prepare_class(cls: type, public: set[type]) -> None:
    """Show what a class inherits from private bases as its own."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != "fastadam":
            continue
        show_source(base)
        for name, member in list(vars(base).items()):
            for function in functions_of(member):
                show_source(function)
            if base not in public and not name.startswith("_") and name not in vars(cls):
                setattr(cls, name, member)


def shown_bases(cls: type, names: dict[type, str]) -> Iterator[tuple[str, str, str]]:
    """Module, name and text of the bases: private ones are replaced by theirs."""
    for base in cls.__bases__:
        if base in names:
            yield names[base], base.__qualname__, f"{names[base]}.{base.__qualname__}"
        elif base.__module__.partition(".")[0] == "fastadam":
            yield from shown_bases(base, names)
        elif base not in (object, abc.ABC):
            yield base.__module__, base.__qualname__, f"{base.__module__}.{base.__qualname__}"


def main() -> None:
    """Build the pages."""
    default = Path(__file__).parents[1] / "build" / "docs"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    modules = import_modules()
    values = [(getattr(module, name), module.__name__) for module in modules for name in module.__all__]
    names = {value: module for value, module in values if inspect.isclass(value)}
    for value, _ in values:
        for function in functions_of(value):
            show_source(function)
    for cls in names:
        prepare_class(cls, set(names))
    pdoc.doc.Function.decorators = pdoc.doc.Class.decorators = ()  # they do not concern the reader
    pdoc.doc.Class.bases = property(lambda self: list(shown_bases(self.obj, names)))
    pdoc.render.configure(
        docformat="google", math=True, show_source=False, footer_text=f"fastadam {modules[0].__version__}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("fastadam", *(module.__name__ for module in modules[len(MODULES) :]), output_directory=folder)
    print(f"{len(modules)} modules: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
