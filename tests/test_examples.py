"""The examples of README.md, of the user guide and of the docstrings run."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import fastadam
import pytest
from helpers import run_python

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "python" / "README.md").read_text()
EXAMPLES = [
    pytest.param(example, id=f"{name}-{i}")
    for name, text in (("front", (ROOT / "README.md").read_text()), ("guide", GUIDE))
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
FRAMEWORKS = ("torch", "jax", "keras")
ADAPTERS = {"fastadam.torch": ["torch"], "fastadam.jax": ["jax"]}
# Those of fastadam.keras are run by tests/test_keras_adam.py.
NATIVE = ("fastadam._cpu", "fastadam._cuda", "fastadam._jax", "fastadam._jax_cuda")
NO_EXAMPLES = (*NATIVE, "fastadam.__main__", "fastadam.keras")
MODULES = [
    "fastadam",
    *(m.name for m in pkgutil.walk_packages(fastadam.__path__, "fastadam.") if m.name not in NO_EXAMPLES),
]


def need(*frameworks):
    """Without importing them: Keras would choose its backend in this process."""
    for name in frameworks:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def test_the_documents_have_examples():
    assert len(EXAMPLES) >= 11


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_documents_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = [name for name in FRAMEWORKS if f"import fastadam.{name}" in example]
    needed += ["sklearn"] if "from sklearn" in example else []
    need(*needed, *(["torch"] if "keras" in needed else []))
    if not needed:
        exec(compile(example, "example", "exec"), {"__name__": "__main__"})
        return
    result = run_python(example)
    assert result.returncode == 0, result.stderr


def test_the_c_program_of_the_guide_prints_what_it_says(tmp_path):
    source = re.search(r"```c\n(.*?)```", GUIDE, re.DOTALL)[1]
    (tmp_path / "program.c").write_text(source)
    flags = []
    for option in ("--include", "--libs"):
        command = [sys.executable, "-m", "fastadam", option]
        flags += subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["cc", "program.c", *flags, "-o", "program"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() in source


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_run(module):
    need(*ADAPTERS.get(".".join(module.split(".")[:2]), []))
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("module", MODULES)
def test_no_example_of_a_docstring_is_passed_over(module):
    """A class is found in the module that its `__module__` names, which may be another than that of its source."""
    need(*ADAPTERS.get(".".join(module.split(".")[:2]), []))
    source = Path(importlib.import_module(module).__file__).read_text()
    written = [
        ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)
    ]
    assert {text for text in written if text and ">>>" in text} <= found_examples()


@functools.cache
def found_examples():
    modules = [m for m in MODULES if all(map(importlib.util.find_spec, ADAPTERS.get(".".join(m.split(".")[:2]), [])))]
    finder = doctest.DocTestFinder()
    return {test.docstring for name in modules for test in finder.find(importlib.import_module(name)) if test.examples}
