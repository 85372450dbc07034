"""The architecture of the Python package: which modules may import which, and who touches what."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "fastadam"

# From the bottom up. A module belongs to the longest name that it begins with, and imports only from its own layer and
# those below; `_core.common.types` names types of every layer, for type checkers only.
# `fastadam` itself imports an adapter when it is first used.
LAYERS = [
    ["_core.common", "reference"],
    ["_core.native.backend", "_core.native.gpu", "_core.native.arrays", "_core.native.chunks", "_core.native.worker"],
    ["_core.common.display"],
    ["_core.native.gradients", "_core.native.slices", "_core.native.variable", "_core.native.buffers"],
    ["_core.native.rows"],
    ["schedules", "_core.native.plan"],
    ["_core.deferred.rates"],
    ["_core.deferred.trail"],
    ["_core.options", "_core.deferred.history", "_core.native.buckets"],
    ["_core.state"],
    ["_core.deferred.chain"],
    ["_core.replaced", "_core.runtime"],
    ["_core.deferred.tables"],
    ["_core.parts"],
    ["_core.pairs", "_core.repeated"],
    ["_core.accumulation", "_core.hyperparameters", "_core.step", "_core.averages"],
    ["_core.resizing"],
    ["_core.autodiff", "_core.minimize", "_core.saving", "_core.bucketed"],
    ["_core.optimizer"],
    ["_core.adam", "_core.adamw", "_core.loss_scale"],
    ["_core.functional", "_core.norm", "_core.machine", "_core.memory", "cuda"],
    ["exchange"],
    ["", "_core"],
    ["torch", "jax"],
    ["keras"],
    ["_demo"],
    ["__main__"],
]
ADAPTERS = ("torch", "jax", "keras")
OF_ADAPTERS = (  # what these may import
    "_core.common",
    "_core.native",
    "_core.deferred.history",
    "_core.deferred.rates",
    "exchange._foreign",
    "schedules",
)
EXTENSIONS = {"_cpu", "_cuda", "_jax", "_jax_cuda"}


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports_of(module):
    """Modules of the package that this one imports, anywhere in it."""
    targets = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastadam":
            source = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{source}.{alias.name}".strip(".")
                targets.add(inner if inner in MODULES else source)
                if not source and alias.name in EXTENSIONS:
                    targets.discard("")
        elif isinstance(node, ast.Import):
            names = [alias.name.partition(".") for alias in node.names]
            targets.update(inner for package, _, inner in names if package == "fastadam")
    lazy = set(ADAPTERS) if module == "" else set()
    return targets - {module} - lazy


def is_within(module, name):
    return module == name or (name != "" and module.startswith(f"{name}."))


def layer_of(module):
    floors = [(len(name), floor) for floor, layer in enumerate(LAYERS) for name in layer if is_within(module, name)]
    return max(floors)[1]


def test_every_layer_exists():
    assert [name for layer in LAYERS for name in layer if name not in MODULES] == []


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"_core.common.types"}))
def test_a_module_imports_only_what_is_below_it(module):
    assert [other for other in imports_of(module) if layer_of(other) > layer_of(module)] == []


def test_no_module_imports_itself_by_way_of_others():
    left = {module: imports_of(module) for module in MODULES if module != "_core.common.types"}
    while leaves := {module for module, others in left.items() if not others & set(left)}:
        left = {module: others for module, others in left.items() if module not in leaves}
    assert sorted(left) == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.partition(".")[0] in ADAPTERS))
def test_an_adapter_imports_only_what_it_may(module):
    allowed = (*OF_ADAPTERS, module.partition(".")[0], *(["jax"] if module.startswith("keras") else []))
    assert [other for other in imports_of(module) if not any(is_within(other, name) for name in allowed)] == []


def test_the_core_imports_no_adapter():
    core = [module for module in MODULES if module.partition(".")[0] not in ("", *ADAPTERS, "_demo", "__main__")]
    assert [(m, other) for m in core for other in imports_of(m) if other.partition(".")[0] in ADAPTERS] == []


def test_one_module_makes_native_plans():
    sources = {path.name: path.read_text() for path in PACKAGE.rglob("*.py")}
    assert [name for name, source in sources.items() if re.search(r"\.Plan\(", source)] == ["plan.py"]


def test_optimizers_hold_their_parts():
    import fastadam

    assert [cls.__name__ for cls in fastadam.Adam.__mro__] == ["Adam", "Optimizer", "Minimizer", "object"]


OF_LIBRARIES = {"_replace", "_fields", "_values", "_indices", "_version"}  # of named tuples and PyTorch
EXCEPTIONS = {
    ("_core.parts", "_parts"),  # the function by which other files get at the parts
    ("_core.autodiff.autograd", "_node"),  # of autograd's boxes, like the next
    ("_core.autodiff.autograd", "_value"),
    ("keras._plans", "_value"),  # of Keras's variables
}


def private_accesses(tree):
    """Attributes ``x._name`` of objects, but for those of ``self`` and ``cls``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr):
            yield node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def defined_in(tree):
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    slots = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return names | {node.attr for node in assigned} | set(slots)


def test_private_attributes_are_touched_in_the_file_that_defines_them():
    """An attribute that no file of the package defines belongs to another library."""
    definitions = {module: defined_in(tree) for module, tree in MODULES.items()}
    ours = set().union(*definitions.values())
    found = {
        (module, name)
        for module, tree in MODULES.items()
        for name, is_own in private_accesses(tree)
        if not is_own and name in ours - OF_LIBRARIES and name not in definitions[module]
    }
    assert found == EXCEPTIONS
