"""Random bad calls to every public name: refused in plain words, nothing changed, no crash.

    python tests/fuzz/bad_calls.py --seed 1 --count 10000

Public classes, functions, methods and attributes are found by introspection. A call is made from a recipe (`recipes.py`,
`framework_recipes.py`) whose arguments are good, and one to three of them are replaced by hostile values (`hostile.py`).
The first cases are the good calls themselves, which have to succeed. A finding is

- a process that dies or hangs;
- an exception of a type that no function documents, or with a text of pybind11, of Python's internals or of a name that
  users do not know, or that does not say which argument is wrong;
- a warning of NumPy's about the library's own arithmetic;
- a refused call that has changed a variable, a gradient, a slot, a counter, an option or a setting of the process.

Exceptions that hostile objects raise themselves may come through, and so may those that PyTorch, JAX and Keras raise
in their own code. In the closing line "accepted" are calls that returned, "refused" those that raised as they should,
and "good" those without a bad argument.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import warnings
from typing import NamedTuple

import children
import hostile
import numpy as np

WORLDS = {
    "core": ("recipes", "World", ()),
    "torch": ("framework_recipes", "TorchWorld", ("torch",)),
    "jax": ("framework_recipes", "JaxWorld", ("jax", "optax")),
    "keras": ("framework_recipes", "KerasWorld", ("keras", "jax")),
}
ALLOWED = (
    TypeError,
    ValueError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    OSError,
    hostile.Mine,
)
NOT_ALLOWED = (RecursionError, UnicodeError, np.exceptions.AxisError, *ImportError.__subclasses__())
INTERNAL = re.compile(  # never in a message
    r"incompatible function arguments|Unable to cast|Invoked with|pybind11|fastadam\._|_core\b|\b_cpu\b|\b_cuda\b|"
    r"\bPlan\b|VariableSet|NoneType' object|internal error"
)
PYTHONS = re.compile(  # only in parentheses, after the argument's name
    r"has no attribute (?!.*expected)|object is not \w+able|unhashable|unsupported operand|ufunc|not supported between|truth value of|"
    r"values to unpack|must be real number, not|could not convert string to float|cannot be interpreted as an integer|"
    r"setting an array element|inhomogeneous|out of bounds|could not be broadcast|operands could not|[a-z_]\(\) takes (?!exactly)"
)
WORDS = r"grads?\[|vars?\[|variables?\b|gradients?\b|optimizer|weights?\[|tensor|slot|slices|deltas?\b|grads_and_vars|state|group|\b[mv](hat)?\[|[Kk]eyword argument|Invalid (learning rate|epsilon|beta)|"


ALIASES = {"lr": ["learning_rate"], "DeepSpeedCPUAdam": ["params"], "set_isa": ["isa"]}


class Entry(NamedTuple):
    """A public function, constructor, method or attribute that can be set."""

    module: str
    owner: str  # a class, or else the last part of the module's name
    name: str
    target: object
    kind: str  # function, constructor, method, setter

    @property
    def label(self):
        own = self.module if self.kind == "function" else f"{self.module}.{self.owner}"
        return own if self.kind == "constructor" else f"{own}.{self.name}"

    @property
    def part(self):
        return self.module.rpartition(".")[2]

    @property
    def cls(self):
        return getattr(importlib.import_module(self.module), self.owner)

    def instance(self, world):
        """An object of the class, such as a schedule, by a good call of its constructor."""
        made = self._replace(name=self.owner, target=self.cls, kind="constructor")
        required = [name for name, p in parameters_of(self.cls).items() if p.default is p.empty]
        return self.cls(**{name: world.argument(made, name) for name in required})


def entries_of(modules):
    found = []
    for module in map(importlib.import_module, modules):
        short = module.__name__.rpartition(".")[2]
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                found += entries_of_class(module.__name__, name, value)
            elif callable(value):
                found.append(Entry(module.__name__, short, name, value, "function"))
    return found


def entries_of_class(module, name, cls):
    if not hasattr(cls, "_fields"):  # a result
        yield Entry(module, name, name, cls, "constructor")
    for key in dir(cls):
        static = inspect.getattr_static(cls, key)
        value = getattr(cls, key, None)
        if key == "__call__" or (not key.startswith("_") and callable(getattr(static, "__func__", static))):
            if str(getattr(value, "__module__", "")).startswith("fastadam"):
                yield Entry(module, name, key, value, "method")
        elif not key.startswith("_") and (
            getattr(static, "fset", None) or type(static).__module__.startswith("fastadam.")
        ):
            yield Entry(module, name, key, static, "setter")


def load(name):
    file, cls, _ = WORLDS[name]
    return getattr(importlib.import_module(file), cls)


class Numbered:
    """The cases in order: first every good call, then spoiled ones."""

    def __init__(self, which):
        self.which = which

    def __call__(self, folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entries = [
                (world, entry)
                for world in map(load, self.which)
                for entry in entries_of(world.modules)
                if f"{entry.owner}.{entry.name}" not in world.skipped
            ]

        def one(rng, tell, number):
            if number < len(entries):
                world, entry = entries[number]
            else:
                world, entry = entries[rng.integers(len(entries))]
            return attack(rng, tell, world, entry, folder, spoil=number >= len(entries))

        return one


def call_of(entry, world):
    """What to call with the arguments."""
    if entry.kind == "setter":
        owner = world.instances[entry.owner]
        return lambda value: setattr(owner, entry.name, value)
    if entry.kind != "method" or isinstance(inspect.getattr_static(entry.cls, entry.name), classmethod):
        return entry.target
    owner = world.instances.get(entry.owner)
    return getattr(entry.instance(world) if owner is None else owner, entry.name)


def parameters_of(target):
    return {
        name: p
        for name, p in inspect.signature(target).parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def good_arguments(rng, entry, world, call):
    if entry.kind == "setter":
        with contextlib.suppress(KeyError):
            return {"value": world.argument(entry, entry.name)}
        return {"value": getattr(world.instances[entry.owner], entry.name)}
    given = {}
    for name, parameter in parameters_of(call).items():
        optional = parameter.default is not parameter.empty
        if optional and rng.random() < 0.5:
            continue
        try:
            given[name] = world.argument(entry, name)
        except KeyError:
            if not optional:
                raise
            given[name] = parameter.default
    return given


def attack(rng, tell, cls, entry, folder, spoil):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = cls(rng, folder, entry, plain=not spoil)
        try:
            world.prepare(entry)
            call = call_of(entry, world)
            given = good_arguments(rng, entry, world, call)
            good, told = dict(given), []
            if spoil:
                told = spoil_arguments(rng, given, call, entry, world.avoided)
            tell(f"{entry.label}({', '.join(told) or 'good arguments'})")
            before = world.state()
            error, warned = attempt(call, given)
            return judge(entry, world, error, warned, before, spoil and bool(told), good)
        finally:
            world.close()


def spoil_arguments(rng, given, call, entry, avoided):
    names = ["value"] if entry.kind == "setter" else list(parameters_of(call))
    told = []
    count = min(len(names), rng.choice([1, 1, 1, 2, 3]))
    for name in rng.choice(names, size=count, replace=False).tolist() if names else ():
        text, value = hostile.spoiled(rng, given.get(name))
        while any(word in text for word in avoided):
            text, value = hostile.spoiled(rng, given.get(name))
        given[name] = value
        told.append(f"{name}={text}")
    return sorted(told)


def attempt(call, given):
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            result = call(**given)
            if hasattr(result, "__enter__") and hasattr(result, "__exit__"):
                with result:
                    pass
        except Exception as error:
            return error, warned
    return None, warned


def judge(entry, world, error, warned, before, bad, good):
    for w in warned:
        if (
            not world.frameworks
            and not ({entry.part, entry.owner} & {"schedules", "reference", "Telemetry"})  # plain NumPy
            and entry.name not in ("add_slot", "add_weight", "Variable")  # of values that are too large
            and not issubclass(w.category, UserWarning)
            and re.search(r"encountered in|overflow|invalid value", str(w.message))
        ):
            raise children.Finding(f"{entry.label} warned: {w.category.__name__}: {w.message}")
    if error is None:
        return "accepted" if bad else "good"
    if isinstance(error, ModuleNotFoundError) and re.search(r" needs .*: pip install \w+$", str(error)):
        return "refused"  # a package that is not installed here
    expected = world.raises.get(f"{entry.owner}.{entry.name}")
    if not bad and not (expected and isinstance(error, expected)):
        raise children.Finding(f"{entry.label} refused a good call: {described(error)}")
    after = world.state()
    for key, value in before.items():
        if value != after[key]:
            raise children.Finding(f"{entry.label} changed {key} though it raised {described(error)}")
    if caused_by_caller(error) or is_of(world.frameworks, error):
        return "refused"
    is_fixed = isinstance(error, AttributeError) and entry.kind == "setter"
    if not (isinstance(error, ALLOWED) or is_fixed) or isinstance(error, NOT_ALLOWED):
        raise children.Finding(f"{entry.label} raised {described(error)}")
    try:
        text = str(error)
    except Exception as broken:
        raise children.Finding(f"{entry.label}: the text of its {type(error).__name__} cannot be read") from broken
    if INTERNAL.search(text) or PYTHONS.search(re.sub(r"\(.*\)", "", text, flags=re.DOTALL)):
        raise children.Finding(f"{entry.label} raised {described(error)}")
    parameters = parameters_of(entry.target) if entry.kind != "setter" else ()
    names = [entry.name, *parameters, *ALIASES.get(entry.name, ())]
    names += keys_of(good)
    if isinstance(error, MemoryError) and "Unable to allocate" in text:
        return "refused"
    if not re.search(WORDS + "|".join(map(re.escape, names)), text) and not isinstance(error, OSError):
        raise children.Finding(f"{entry.label} raised {described(error)}, which names no argument")
    return "refused"


def keys_of(values):
    """Of dicts, at any depth: a message may name an entry of a configuration."""
    if isinstance(values, dict):
        return [*map(str, values), *(key for value in values.values() for key in keys_of(value))]
    return []


def is_of(packages, error):
    """Whether an error was raised in the files of one of these packages, whose texts are its own."""
    name = frame_of(error).f_code.co_filename
    return any(f"/site-packages/{package}/" in name for package in packages)


def frame_of(error):
    """Where it was raised."""
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    return at.tb_frame


def caused_by_caller(error):
    while error is not None:
        if isinstance(error, hostile.Mine) or re.match(r"(<lambda>|_NoRepr)\(\) takes", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def described(error):
    frame = frame_of(error)
    try:
        text = str(error)[:200]
    except Exception:
        text = "(no text)"
    return f"{type(error).__name__}: {text} [{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}]"


if __name__ == "__main__":
    given = children.arguments(
        __doc__, 2000, libraries={"nargs": "*", "choices": list(WORLDS), "help": "default: those that are installed"}
    )
    installed = [name for name, (*_, needs) in WORLDS.items() if all(map(importlib.util.find_spec, needs))]
    if missing := sorted({*(given.libraries or ())} - {*installed}):
        raise SystemExit(f"skipped: {' and '.join(missing)} not installed (.ci/install installs all)")
    children.run("bad_calls", Numbered(given.libraries or installed), given)
