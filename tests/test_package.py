"""What package indexes and installers show: metadata, links, extras."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path

import fastadam
from compiled import tool
from helpers import run_python

METADATA = importlib.metadata.metadata("fastadam")
PACKAGE = Path(fastadam.__file__).parent
ROOT = Path(__file__).parents[1]


def test_the_metadata_says_who_where_and_for_what():
    urls = dict(url.split(", ", 1) for url in METADATA.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog", "Issues", "Security", "Source"} <= set(urls)
    assert all(url.startswith("https://") for url in urls.values())
    assert METADATA["Author"]
    assert METADATA["License-Expression"] == "Apache-2.0"
    classifiers = METADATA.get_all("Classifier")
    for needed in ("Programming Language :: Python :: 3.10", "Programming Language :: C++", "Typing :: Typed"):
        assert needed in classifiers
    assert [c for c in classifiers if c.startswith("Programming Language :: Python :: Free Threading")]
    assert not [c for c in classifiers if "Windows" in c or c == "Operating System :: OS Independent"]
    assert not any(classifier.startswith("License ::") for classifier in classifiers)  # the expression says it


def test_links_of_the_description_work_outside_of_the_repository():
    text = METADATA.get_payload() or METADATA["Description"]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 5
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_extras_are_complete_and_all_has_what_needs_no_gpu():
    extras = set(METADATA.get_all("Provides-Extra"))
    assert {"all", "autograd", "cuda12", "cuda13", "demo", "jax", "keras", "save", "test", "torch"} <= extras
    (everything,) = (r for r in METADATA.get_all("Requires-Dist") if re.search(r"""extra == ['"]all['"]""", r))
    named = set(re.search(r"fastadam\[([^\]]+)\]", everything)[1].split(","))
    assert named == {"demo", "save", "autograd", "jax", "torch", "keras"}


def test_a_build_without_cuda_has_nothing_of_it():
    has_cuda = importlib.util.find_spec("fastadam._cuda") is not None
    assert (PACKAGE / "_cuda.pyi").exists() == has_cuda


def test_the_command_is_installed():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="fastadam")
    assert command.load().__module__ == "fastadam.__main__"


def test_an_import_in_a_subinterpreter_is_refused_in_one_sentence():
    """Where it would hang, or share state that belongs to the process."""
    code = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
made = interpreters.create()
script = "try: import fastadam\\nexcept ImportError as error: print(error)"
run = getattr(interpreters, "run_string", None) or interpreters.exec
run(made, script)
interpreters.destroy(made)
import fastadam, numpy  # the main interpreter may
fastadam.Adam().apply_gradients([(numpy.ones(3), numpy.ones(3))])
"""
    result = run_python(code, exits=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "fastadam: imported in a subinterpreter, expected the main interpreter, or a process of its own "
        "(multiprocessing): its compiled extension does not support subinterpreters.\n"
    )
    assert result.stderr == ""


def test_a_build_on_windows_stops_at_one_sentence(tmp_path):
    """Before it looks for a compiler, which would fail at headers that Windows does not have."""
    command = [tool("cmake"), "-S", ROOT, "-B", tmp_path, "-DCMAKE_SYSTEM_NAME=Windows"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "fastadam does not support Windows" in result.stderr
    assert "Use Linux (WSL 2 on Windows) or macOS" in " ".join(result.stderr.split())
    assert "compiler" not in result.stdout + result.stderr
