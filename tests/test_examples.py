"""The examples of README.md, of the user guide and of the docstrings run."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import fastadam
import pytest
from absent import need
from helpers import run_python

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "python" / "README.md").read_text()
EXAMPLES = {
    f"{name}-{i}": example
    for name, text in (("front", (ROOT / "README.md").read_text()), ("guide", GUIDE))
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}
OF_TORCH = {name: example for name, example in EXAMPLES.items() if "import fastadam.torch" in example}
IN_FORKS = """
import gc, json, os, sys
import torch._dynamo, fastadam.torch  # once, because it takes long; optimizers of PyTorch import torch._dynamo

gc.freeze()  # or each process walks through PyTorch when it ends

for name, example in json.load(open(sys.argv[1])).items():
    child = os.fork()
    if child == 0:
        exec(compile(example, name, "exec"), {"__name__": "__main__"})
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} failed")
"""
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
FRAMEWORKS = ("jax", "keras")
ADAPTERS = {"fastadam.torch": ["torch"], "fastadam.jax": ["jax"]}
# Those of fastadam.keras are run by tests/test_keras_adam.py.
NATIVE = ("fastadam._cpu", "fastadam._cuda", "fastadam._jax", "fastadam._jax_cuda")
NO_EXAMPLES = (*NATIVE, "fastadam.__main__", "fastadam.keras")
MODULES = [
    "fastadam",
    *(m.name for m in pkgutil.walk_packages(fastadam.__path__, "fastadam.") if m.name not in NO_EXAMPLES),
]


def test_the_documents_have_examples():
    assert len(EXAMPLES) >= 11


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in OF_TORCH])
def test_an_example_of_the_documents_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = EXAMPLES[name]
    needed = [framework for framework in FRAMEWORKS if f"import fastadam.{framework}" in example]
    needed += ["sklearn"] if "from sklearn" in example else []
    need(*needed, *(["torch"] if "keras" in needed else []))
    if not needed:
        exec(compile(example, "example", "exec"), {"__name__": "__main__"})
        return
    result = run_python(example)
    assert result.returncode == 0, result.stderr


def test_the_examples_of_torch_run(tmp_path, monkeypatch):
    need("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples.json").write_text(json.dumps(OF_TORCH))
    result = run_python(f"import sys; sys.argv.append('examples.json')\n{IN_FORKS}")
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
