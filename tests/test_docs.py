"""The API reference: it builds without a warning, and its pages show the public names and no others."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import fastadam
import pytest
from absent import WITHOUT, need
from test_public_surface import EVERY_MODULE
from test_type_checkers import names_in

SCRIPT = Path(__file__).parents[1] / ".ci" / "docs.py"
ADAPTERS = ("torch", "jax", "keras")
pytestmark = pytest.mark.slow


def build(folder, absent=()):
    """The pages by module."""
    pytest.importorskip("pdoc")  # of the dependency group "docs"
    code = WITHOUT.format(absent=tuple(absent)) + "import runpy\nsys.argv = sys.argv[1:]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    source = str(Path(fastadam.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "KERAS_BACKEND": "numpy"}
    command = [sys.executable, "-c", code, str(SCRIPT), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    paths = [folder / "fastadam.html", *(folder / "fastadam").iterdir()]
    return {".".join(path.relative_to(folder).with_suffix("").parts): path.read_text() for path in paths}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    need(*ADAPTERS)
    return build(tmp_path_factory.mktemp("docs"))


def sections(page):
    """The names that have a description of their own."""
    return re.findall(r'<(?:section|div) id="([A-Za-z_][\w.]*)"', page)


def text_of(page):
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?s)<(script|style).*?</\1>", "", page)))
    return re.sub(r"\s+", " ", text)


def test_there_is_a_page_for_every_public_module(pages):
    assert sorted(pages) == EVERY_MODULE


@pytest.mark.parametrize("module", EVERY_MODULE)
def test_a_page_shows_the_public_names_and_no_others(module, pages):
    names = sections(pages[module])
    assert {name for name in names if "." not in name} == set(names_in(module)) - {
        name.rpartition(".")[2] for name in EVERY_MODULE
    }
    assert [name for name in names if re.search(r"(^|\.)_(?!_(init|version)__)", name)] == []
    assert "fastadam._core" not in text_of(pages[module])


def test_methods_have_their_sections_also_where_a_private_base_defines_them(pages):
    names = set(sections(pages["fastadam"]))
    assert {f"Adam.{name}" for name in dir(fastadam.Adam) if not name.startswith("_")} <= names
    assert {"LossScaleOptimizer.minimize", "Variable.gather"} <= names


def test_signatures_are_those_of_the_source(pages):
    text = text_of(pages["fastadam"])
    assert "Adam( learning_rate: LearningRate = 0.001, beta_1: Hyperparameter = 0.9," in text
    assert "AdamW(fastadam.Adam)" in text
    assert "AdamW( learning_rate: LearningRate = 0.001, weight_decay: float = 0.004," in text
    assert "global_norm(grads: Iterable[Gradient | None]) -> float" in text


@pytest.mark.parametrize("module", ["fastadam", "fastadam.schedules", "fastadam.jax"])
def test_equations_reach_the_page_as_they_are_written(module, pages):
    assert "$$" in pages[module]
    assert "mathjax" in pages[module].lower()
    assert ".. math::" not in pages[module]
    assert r":math:" not in pages[module]


def test_it_builds_without_the_frameworks(tmp_path):
    assert sorted(build(tmp_path, ["torch", "jax", "keras", "optax"])) == sorted(
        {*EVERY_MODULE} - {f"fastadam.{name}" for name in ADAPTERS}
    )
