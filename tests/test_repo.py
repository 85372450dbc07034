"""The promises of the repository itself: documents name what exists, one version, the public names."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from pathlib import Path

import fastadam
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "python" / "README.md").read_text()
DOCUMENTS = [
    "README.md",
    "python/README.md",
    "csrc/README.md",
    "bench/README.md",
    "tests/README.md",
    ".github/CONTRIBUTING.md",
    ".github/SECURITY.md",
]


def test_readme_has_two_set_up_commands():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert [("demo" in c, "pytest" in c) for c in commands] == [(True, False), (False, True)]
    assert "grep -E '^    python3 -m venv .*pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_guide_names_every_public_attribute_and_argument_of_the_optimizers():
    names = {name for name in dir(fastadam.Adam) if not name.startswith("_")}
    names |= set(inspect.signature(fastadam.AdamW).parameters)
    names |= {name for name in fastadam.schedules.__all__ if name != "plot"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", GUIDE)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_that_a_document_names_exist(document):
    text = (ROOT / document).read_text()
    tops = "csrc|python|tests|bench|core|cpu|cuda|capi|bind"
    paths = set(re.findall(rf"(?<![\w/.])((?:{tops})/[\w./-]*\w)", text))
    paths |= {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}
    roots = [ROOT, ROOT / "csrc", ROOT / "python" / "fastadam", (ROOT / document).parent]
    assert paths
    missing = [path for path in sorted(paths) if not any((root / path).exists() for root in roots)]
    assert missing == []


def test_the_guide_of_the_tests_names_every_marker_and_script():
    markers = re.findall(r'^  "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {"slow", "native", "fake_gpu", "gpu"} <= set(markers)
    guide = (ROOT / "tests" / "README.md").read_text()
    scripts = [f".ci/{path.name}" for path in (ROOT / ".ci").iterdir()]
    assert [name for name in [*markers, *scripts] if f"`{name}`" not in guide and f"-m {name}`" not in guide] == []


def test_there_is_one_version():
    versions = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert versions == [fastadam.__version__] == [importlib.metadata.version("fastadam")]
    written = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "python", "tests", "bench", ".ci", ".github")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {"", ".py", ".pyi", ".h", ".cpp", ".cu", ".cmake", ".in", ".toml", ".yml", ".md", ".sh"}
        and path.is_file()
        and not path.is_relative_to(ROOT / "python" / "fastadam" / "lib")  # built
        and re.search(rf"\b{re.escape(fastadam.__version__)}\b", path.read_text(errors="replace"))
    }
    assert written == {".github/CHANGELOG.md"}


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / ".github" / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    assert "keepachangelog.com/en/1.1.0" in text
    date = r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    sections = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    headings, bodies = sections[1::2], sections[2::2]
    wrong = [h for h in headings if not re.fullmatch(rf"\[Unreleased\]|\[\d+\.\d+\.\d+\] - (?:{date}|unreleased)", h)]
    assert wrong == []
    versions = [h[1:].partition("]")[0] for h in headings if h != "[Unreleased]"]
    assert versions == sorted(versions, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
    assert versions[0] == fastadam.__version__
    for body in bodies:
        found = re.findall(r"^### (.*)$", body, re.MULTILINE)
        assert found
        assert found == [kind for kind in kinds if kind in found]  # each once, in this order
        entries = [line for line in body.splitlines() if line[:1] == "-"]
        assert len(entries) == len(set(entries))


def test_the_stub_of_cuda_names_what_only_that_extension_has(fake_extension):
    from fastadam import _cpu

    stub = (ROOT / "csrc" / "bind" / "_cuda.pyi").read_text()
    declared = {a or b for a, b in re.findall(r"^(?:def|class) (\w+)|^(\w+):", stub, re.MULTILINE)}
    names = {name for name in dir(fake_extension.native) if not name.startswith("__")}
    shared = {"Buffer", "ClosedForms", "Plan", "Slices", "require_place"}
    assert declared == names - set(dir(_cpu)) | shared


def test_the_stub_names_what_the_extension_has():
    from fastadam import _cpu

    stub = (ROOT / "python" / "fastadam" / "_cpu.pyi").read_text()
    declared = set(re.findall(r"^(?:def|class) (\w+)|^(\w+):", stub, re.MULTILINE))
    names = {first or second for first, second in declared}
    assert names == {name for name in dir(_cpu) if not name.startswith("__") or name == "__version__"}
    for kind in ("Buffer", "Plan"):
        body = stub.split(f"class {kind}")[1].split("\nclass ")[0].split("\ndef ")[0]
        assert set(re.findall(r"    def (\w+)\(", body)) - {"__init__"} == {
            name for name in dir(getattr(_cpu, kind)) if not name.startswith("_")
        }


def test_the_update_rule_stands_once_in_cpp():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    assert [path.name for path in sources if "one_minus_beta_2;" in _arithmetic(path.read_text())] == ["adam_math.h"]


def _arithmetic(source):
    """The products: whoever multiplies by 1 - beta_2 updates v."""
    return "".join(re.findall(r"\* ?\w+\.one_minus_beta_2;", source))


def test_core_includes_nothing_but_core_and_the_structs_of_the_c_interface():
    own = {path.name for path in (ROOT / "csrc" / "core").iterdir()} | {"../include/fastadam.h"}
    allowed = {"<cmath>", "<cstdint>", "<cstring>"} | {f'"{name}"' for name in own}
    for path in (ROOT / "csrc" / "core").iterdir():
        assert set(re.findall(r"#include (\S+)", path.read_text())) <= allowed, path.name


def test_the_gil_is_released_in_one_way():
    """bind/gil.h says why: a daemon thread must not be ended in a destructor when the interpreter exits."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    assert [path.name for path in sources if "gil_scoped_release" in path.read_text()] == []
    assert [path.name for path in sources if "PyEval_SaveThread" in path.read_text()] == ["gil.h"]


def test_public_headers_include_only_c99():
    for path in (ROOT / "csrc" / "include").iterdir():
        included = set(re.findall(r"#include (\S+)", path.read_text()))
        assert included <= {"<math.h>", "<stdbool.h>", "<stddef.h>", "<stdint.h>", '"fastadam.h"'}, path.name


@pytest.mark.parametrize(
    ("folder", "others", "exceptions"),
    [
        ("cpu", {"core"}, {}),
        ("cuda", {"core"}, {}),
        ("capi", {"core"}, {"fastadam.cpp": "cpu", "run.cpp": "cpu", "norms.h": "cpu", "fastadam_cuda.cpp": "cuda"}),
        ("bind", {"core", "capi"}, dict.fromkeys(["cuda_module.cpp", "cuda_backend.h"], "cuda")),
    ],
)
def test_folders_include_the_folders_that_they_may(folder, others, exceptions):
    for path in (ROOT / "csrc" / folder).iterdir():
        of_devices = {"cuda"} if path.name.startswith("device_") or path.name == "jax_on_device.h" else set()
        included = set(re.findall(r'#include "\.\./(\w+)/', path.read_text()))
        assert included - {"include"} <= others | of_devices | {exceptions.get(path.name, "core")}, path.name
        assert folder == "bind" or "pybind11" not in path.read_text()
