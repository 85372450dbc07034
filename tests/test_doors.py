"""Wrong doors: an adapter without its framework, an optimizer of another framework. What is meant is named."""

from __future__ import annotations

import importlib.util
import json
import re

import fastadam
import numpy as np
import pytest
from helpers import run_python

F32 = np.float32
ADAPTERS = {"torch": "PyTorch", "jax": "JAX", "keras": "Keras 3"}

# A process in which packages are not installed, whether they are or not.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def need(*packages):
    """Keras cannot be imported here to find out: it would choose the backend of this process."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def printed(code, absent=(), **environment):
    result = run_python(WITHOUT.format(absent=tuple(absent)) + code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- the adapters are attributes -------------------------------------------------------------------------------------


def test_import_fastadam_imports_no_framework():
    frameworks = ("torch", "jax", "jaxlib", "optax", "keras", "tensorflow", "autograd")
    code = f"import fastadam; print([name for name in {frameworks} if name in sys.modules])"
    assert printed(code) == "[]\n"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_is_an_attribute(adapter):
    need(adapter)
    code = f"import fastadam; print(fastadam.{adapter}.__name__, 'fastadam.{adapter}' in sys.modules)"
    assert printed(code, KERAS_BACKEND="numpy") == f"fastadam.{adapter} True\n"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_without_its_framework_every_way_in_says_what_to_install(adapter):
    code = f"""
import fastadam
for code in ("fastadam.{adapter}", "import fastadam.{adapter}", "from fastadam import {adapter}", "fastadam.{adapter}.Adam"):
    for attempt in range(2):
        try:
            exec(code)
        except ModuleNotFoundError as error:
            print(error.name, "-", error)
"""
    sentence = f"fastadam.{adapter} needs {ADAPTERS[adapter]}: pip install {adapter}"
    assert printed(code, [adapter]).splitlines() == [f"{adapter} - {sentence}"] * 8


def test_without_frameworks_the_package_can_be_listed():
    """As help() and notebooks do it, which take an AttributeError only."""
    assert "Adam" in printed("import inspect, fastadam; print(dict(inspect.getmembers(fastadam)).keys())", ADAPTERS)
    assert printed("from fastadam import *; print(Adam.__name__)", ADAPTERS) == "Adam\n"


def test_other_names_are_attribute_errors():
    assert not hasattr(fastadam, "tensorflow")
    with pytest.raises(AttributeError, match="module 'fastadam' has no attribute 'Adan'"):
        _ = fastadam.Adan


def test_what_is_missing_inside_of_a_framework_is_not_called_the_framework():
    code = """
import fastadam
try:
    fastadam.torch
except ModuleNotFoundError as error:
    print(error)
"""
    need("torch")
    assert printed(code, ["typing_extensions"]) == "No module named 'typing_extensions'\n"


@pytest.mark.parametrize("name", ["adam", "adamw", "scale_by_adam"])
def test_without_optax_its_transformations_say_so(name):
    need("jax")
    code = f"""
import fastadam.jax
try:
    fastadam.jax.{name}(0.1)
except ModuleNotFoundError as error:
    print(error.name, "-", error)
"""
    assert printed(code, ["optax"]) == f"optax - fastadam.jax.{name} needs optax: pip install optax\n"


# ---- the backend of Keras --------------------------------------------------------------------------------------------

ADVICE = """KERAS_BACKEND must be torch | jax | numpy, set before keras is first imported: \
os.environ["KERAS_BACKEND"] = "torch\""""


@pytest.mark.parametrize(
    ("chosen", "file", "found"),
    [
        (None, None, "not set, which means tensorflow"),
        ("", None, "not set, which means tensorflow"),
        (None, {"backend": "tensorflow"}, "not set, which means tensorflow"),
        (None, "no JSON", "not set, which means tensorflow"),
        (None, {"backend": "openvino"}, "not set, which means openvino"),
        ("tensorflow", {"backend": "numpy"}, "'tensorflow'"),
        ("pytorch", None, "'pytorch'"),
    ],
)
def test_a_backend_without_the_update_is_refused_while_it_can_be_changed(chosen, file, found, tmp_path):
    need("keras")
    if file is not None:
        (tmp_path / "keras.json").write_text(file if isinstance(file, str) else json.dumps(file))
    code = f"""
import os
import fastadam
os.environ.pop("KERAS_BACKEND", None)
if {chosen!r} is not None:
    os.environ["KERAS_BACKEND"] = {chosen!r}
try:
    fastadam.keras
except ImportError as error:
    print(error)
os.environ["KERAS_BACKEND"] = "numpy"
print(fastadam.keras.Adam(0.5).amsgrad)
"""
    expected = f"fastadam.keras: KERAS_BACKEND is {found}. {ADVICE}\nFalse\n"
    assert printed(code, KERAS_HOME=str(tmp_path)) == expected


def test_the_backend_may_stand_in_the_file_of_keras(tmp_path):
    need("keras")
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "numpy"}))
    code = "import os; os.environ.pop('KERAS_BACKEND', None); import fastadam; print(fastadam.keras.Adam(0.5).amsgrad)"
    assert printed(code, KERAS_HOME=str(tmp_path)) == "False\n"


def test_without_the_framework_of_the_backend_it_says_what_to_install():
    need("keras")
    code = """
import fastadam
try:
    fastadam.keras
except ModuleNotFoundError as error:
    print(error)
"""
    assert printed(code, ["torch"], KERAS_BACKEND="torch") == "fastadam.keras needs PyTorch: pip install torch\n"


# ---- another framework's optimizer -----------------------------------------------------------------------------------

TORCH = r"for parameters of PyTorch use fastadam\.torch\.Adam\(model\.parameters\(\), lr=\.\.\.\)"
JAX = r"for JAX arrays use fastadam\.jax"
KERAS = r"for Keras 3 models use model\.compile\(optimizer=fastadam\.keras\.Adam\(\.\.\.\)\)"
TENSORFLOW = r"TensorFlow's variables cannot be updated in place: use tf\.keras\.optimizers\.Adam"
ARRAYS = r"variables go to apply_gradients\(\[\(gradient, variable\), \.\.\.\]\)"


def stand_in(module, name, **attributes):
    """An object of a class of that name: what is not installed here is recognised by its module."""
    return type(name, (), {"__module__": module, **attributes})()


OF_KERAS = stand_in("keras.src.backend", "Variable", shape=(3,), assign=None)
OF_TENSORFLOW = stand_in("tensorflow.python.ops.resource_variable_ops", "ResourceVariable", shape=(3,), assign=None)


@pytest.mark.parametrize(
    "form", [list, tuple, lambda parameters: {"params": parameters}, lambda parameters: [{"params": parameters}]]
)
@pytest.mark.parametrize(
    ("variable", "hint"),
    [(OF_KERAS, KERAS), (OF_TENSORFLOW, TENSORFLOW), (np.ones(3), ARRAYS), (fastadam.Variable([1.0]), ARRAYS)],
)
def test_variables_in_the_place_of_the_rate_name_where_they_go(form, variable, hint):
    for options in ({}, {"lr": 0.1}):
        with pytest.raises(TypeError, match=f"^learning_rate: (list|tuple|dict), expected a number .*; {hint}"):
            fastadam.Adam(form([variable]), **options)


@pytest.mark.parametrize("kind", [fastadam.Adam, fastadam.AdamW])
def test_parameters_of_torch_in_the_place_of_the_rate(kind):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    given = [model.parameters(), model.named_parameters(), list(model.parameters()), (p for p in [1]), iter([1])]
    given += [[{"params": model.parameters(), "lr": 0.1}][0]["params"], {"w": model.weight}, model.weight, model]
    for parameters in given:
        for options in ({}, {"lr": 0.1}):
            with pytest.raises(TypeError, match=f"^learning_rate: .*{TORCH}"):
                kind(parameters, **options)
    optimizer = kind(0.5)
    with pytest.raises(TypeError, match=TORCH):
        optimizer.learning_rate = model.parameters()
    assert optimizer.learning_rate == 0.5
    optimizer.learning_rate = model.parameters  # a function without arguments, until it is asked
    with pytest.raises(TypeError, match=TORCH):
        optimizer.apply_gradients([(np.ones(3, F32), np.ones(3, F32))])


def test_single_numbers_of_any_framework_are_rates():
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    for rate in (torch.tensor(0.5), jnp.float32(0.5), np.array(0.5), F32(0.5)):
        assert fastadam.Adam(rate).learning_rate == 0.5


def test_variables_that_fastadam_cannot_update_name_what_does():
    jnp = pytest.importorskip("jax.numpy")
    g = np.ones(3, F32)
    for variable, hint in ((jnp.ones(3), JAX), (OF_KERAS, KERAS), (OF_TENSORFLOW, TENSORFLOW)):
        good, optimizer = np.ones(3, F32), fastadam.Adam(0.5)
        with pytest.raises((TypeError, ValueError), match=rf"^vars\[1\]: .*; {hint}"):
            optimizer.apply_gradients([(g, good), (g, variable)])
        assert (good == 1).all()
        assert optimizer.iterations == 0
        with pytest.raises((TypeError, ValueError), match=f"; {hint}"):
            fastadam.adam_step(variable, g, g.copy(), g.copy(), step=1)
        with pytest.raises(TypeError, match=rf"^value: \w+, expected a NumPy array; {hint}"):
            fastadam.Variable(variable)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_optimizer_of_torch_names_the_others(name):
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    kind = getattr(fastadam.torch, name)
    for rate in (1e-3, F32(1e-3), 1, None):
        with pytest.raises(TypeError, match=r"^params: .*, expected parameters of PyTorch, .* is fastadam\.Adam$"):
            kind(rate)
    numpy = r"for NumPy arrays use fastadam\.Adam"
    for variable, hint in (
        (np.ones(3), numpy), (fastadam.Variable([1.0]), numpy), (jnp.ones(3), JAX), (OF_KERAS, KERAS), (OF_TENSORFLOW, TENSORFLOW),
    ):  # fmt: skip
        for form in (list, iter, tuple, lambda items: {"w": items[0]}):
            with pytest.raises(TypeError, match=f"^params: {type(variable).__name__}, expected parameters .*; {hint}"):
                kind(form([variable]))
    model = torch.nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"^params: Linear, expected its parameters: model\.parameters\(\)"):
        kind(model)
    for parameters in (model.parameters(), iter(list(model.named_parameters())), [{"params": model.parameters()}]):
        assert sum(len(group["params"]) for group in kind(parameters).param_groups) == 2


def test_jax_has_functions_and_says_so():
    pytest.importorskip("optax")
    for name in ("Adam", "AdamW"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; it has the functions {name.lower()} .as in"):
            getattr(fastadam.jax, name)
    for function in (fastadam.jax.adam, fastadam.jax.adamw):
        with pytest.raises(TypeError, match=r"learning_rate: dict, expected .*; parameters go to init\(params\)"):
            function({"w": np.ones(3)})


def test_keras_is_told_which_optimizer_it_takes():
    need("keras", "torch")
    code = """
import keras, torch
import fastadam

model = keras.Sequential([keras.layers.Dense(2)])
linear = torch.nn.Linear(3, 2)
inner = fastadam.Adam(0.5)
for optimizer in (inner, fastadam.AdamW(), fastadam.LossScaleOptimizer(inner), fastadam.torch.Adam(linear.parameters())):
    try:
        model.compile(optimizer=optimizer)
    except ValueError as error:
        print(str(error).splitlines()[-1].split(". ")[-1], f"{optimizer}" == "{}".format(optimizer) == str(optimizer))
for given in (linear.parameters(), list(linear.parameters()), linear, model, [keras.Variable([1.0])]):
    try:
        fastadam.keras.Adam(given)
    except TypeError as error:
        print(error)
"""
    lines = printed(code, KERAS_BACKEND="numpy").splitlines()
    assert lines[:4] == ["For Keras 3 models use fastadam.keras.Adam or AdamW True"] * 4
    assert len(lines) == 9
    for line, hint in zip(lines[4:], [TORCH] * 3 + [KERAS] * 2, strict=True):
        assert re.match(f"learning_rate: .*, expected a number or a schedule; {hint}", line), line
