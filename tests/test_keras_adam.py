"""fastadam.keras on every backend of Keras. A process has one backend, so each has a pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absent import need
from helpers import run_python

HERE = Path(__file__).parent
FILES = ["steps memory messages", "models callbacks schedules"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "names"),
    [
        *(pytest.param(backend, " ".join(FILES), id=backend) for backend in ("numpy", "torch")),
        # JAX compiles for long; test_readme_lines.py fits a model with it.
        pytest.param("jax", FILES[0], id="jax"),
        pytest.param("jax", FILES[1], id="jax, models", marks=pytest.mark.weekly),
    ],
)
def test_on_backend(backend, names):
    need("keras", backend)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"{HERE}/on_keras_{name}.py" for name in names.split()),
    ]
    # Keras's arrays do not take the `copy` of NumPy 2's `__array__`.
    command += ["-W", "ignore:__array__ implementation doesn't accept:DeprecationWarning"]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=HERE.parent)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    assert re.search(r"\d+ passed", result.stdout)


def test_the_package_does_not_import_keras():
    code = "import sys, fastadam; assert 'keras' not in sys.modules and 'fastadam.keras' not in sys.modules"
    assert run_python(code).returncode == 0


def test_without_keras_the_message_says_so():
    result = run_python("import sys; sys.modules['keras'] = None; import fastadam.keras")
    assert result.stderr.endswith("ModuleNotFoundError: fastadam.keras needs Keras 3: pip install keras\n")
