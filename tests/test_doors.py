"""Wrong doors: an adapter without its framework, or on a backend of Keras without the update. It says what to do."""

from __future__ import annotations

import json

import fastadam
import pytest
from absent import need, printed

ADAPTERS = {"torch": "PyTorch", "jax": "JAX", "keras": "Keras 3"}


# ---- the adapters are attributes -------------------------------------------------------------------------------------


def test_import_fastadam_imports_no_framework():
    frameworks = ("torch", "jax", "jaxlib", "optax", "keras", "tensorflow", "autograd")
    code = f"import fastadam; print([name for name in {frameworks} if name in sys.modules])"
    assert printed(code) == "[]\n"


@pytest.mark.parametrize("adapter", ["torch", "jax"])  # for Keras see below
def test_an_adapter_is_an_attribute(adapter):
    need(adapter)
    code = f"import fastadam; print(fastadam.{adapter}.__name__, 'fastadam.{adapter}' in sys.modules)"
    assert printed(code) == f"fastadam.{adapter} True\n"


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


def test_without_optax_its_transformations_say_so():
    need("jax")
    names = ["adam", "adamw", "scale_by_adam"]
    code = f"""
import fastadam.jax
for name in {names}:
    try:
        getattr(fastadam.jax, name)(0.1)
    except ModuleNotFoundError as error:
        print(error.name, "-", error)
"""
    expected = [f"optax - fastadam.jax.{name} needs optax: pip install optax" for name in names]
    assert printed(code, ["optax"]).splitlines() == expected


# ---- the backend of Keras --------------------------------------------------------------------------------------------

ADVICE = """KERAS_BACKEND must be torch | jax | numpy, set before keras is first imported: \
os.environ["KERAS_BACKEND"] = "torch\""""


CASES = [  # KERAS_BACKEND, keras.json, what is found
    (None, None, "not set, which means tensorflow"),
    ("", None, "not set, which means tensorflow"),
    (None, '{"backend": "tensorflow"}', "not set, which means tensorflow"),
    (None, "no JSON", "not set, which means tensorflow"),
    (None, '["numpy"]', "not set, which means tensorflow"),
    (None, '{"backend": "openvino"}', "not set, which means openvino"),
    ("tensorflow", '{"backend": "numpy"}', "'tensorflow'"),
    ("pytorch", None, "'pytorch'"),
]


def test_a_backend_without_the_update_is_refused_while_it_can_be_changed(tmp_path):
    need("keras")
    code = f"""
import os, pathlib
import fastadam

path = pathlib.Path(os.environ["KERAS_HOME"]) / "keras.json"
for chosen, text, _ in {CASES}:
    os.environ.pop("KERAS_BACKEND", None)
    path.unlink(missing_ok=True)
    if chosen is not None:
        os.environ["KERAS_BACKEND"] = chosen
    if text is not None:
        path.write_text(text)
    try:
        fastadam.keras
    except ImportError as error:
        print(error)
os.environ["KERAS_BACKEND"] = "numpy"
print(fastadam.keras.Adam(0.5).amsgrad, fastadam.keras.__name__, "fastadam.keras" in sys.modules)
"""
    refusals = (f"fastadam.keras: KERAS_BACKEND is {found}. {ADVICE}" for *_, found in CASES)
    expected = [*refusals, "False fastadam.keras True"]
    assert printed(code, KERAS_HOME=str(tmp_path)).splitlines() == expected


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
