"""Instruction sets can be listed, named and forced; a wrong name is a clear error."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import fastadam
import pytest
from fastadam._core.native.backend import _cpu
from helpers import run_python

ROOT = Path(__file__).parents[1]
X86, ARM, _ = (
    names.split() for names in re.findall(r"known_isas ([\w ]+)\)", (ROOT / "csrc/cpu/isas.cmake").read_text())[:3]
)
# Of this kind of machine, from the plainest to the widest.
KNOWN = {"x86_64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine(), ["baseline"])


@pytest.mark.parametrize("name", X86[1:])
def test_an_instruction_set_is_named_wherever_it_has_to_be(name):
    """.github/CONTRIBUTING.md has the recipe."""
    for path, text in {
        "CMakeLists.txt": f"flags_{name} ",
        "csrc/cpu/kernels.h": f"namespace {name} ",
        "csrc/cpu/cpu_features.h": f"inline bool has_{name}() {{ return false; }}",
        "csrc/cpu/dispatch.cpp": f'{{"{name}", &{name}::kernels, has_{name}()}}',
        "csrc/cpu/widest_isa.cpp": f'has_{name}() ? "{name}"',
        "csrc/README.md": f"`{name}` kernels",
        "bench/common.py": f'"{name}": [',
    }.items():
        assert text in (ROOT / path).read_text(), path


def test_isas_of_this_machine():
    compiled = [name for name, _ in _cpu.compiled_isas()]
    assert compiled == [name for name in KNOWN if name in compiled]  # FASTADAM_ISAS may have left some out
    assert fastadam.isas()[0] == compiled[0] == KNOWN[0]
    assert set(fastadam.isas()) <= set(compiled)
    assert fastadam.current_isa() in fastadam.isas()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "built"),
    [("all", KNOWN), (KNOWN[0], KNOWN[:1]), (KNOWN[-1], sorted({KNOWN[0], KNOWN[-1]}, key=KNOWN.index))],
)
def test_a_build_has_the_isas_that_it_was_asked_for(wanted, built, tmp_path):
    assert configured_isas(tmp_path, wanted) == built


@pytest.mark.slow
def test_a_build_has_the_isas_of_this_cpu_unless_asked_for_others(tmp_path):
    isas = configured_isas(tmp_path, "AUTO")
    assert isas == KNOWN[: len(isas)]
    assert set(fastadam.isas()) <= set(isas)


@pytest.mark.slow
def test_a_build_refuses_an_unknown_isa(tmp_path):
    done = configure(tmp_path, "avx9000")
    assert done.returncode != 0
    assert "FASTADAM_ISAS: 'avx9000', expected AUTO, all" in done.stderr


def configured_isas(folder, wanted):
    done = configure(folder, wanted)
    assert done.returncode == 0, done.stderr
    return re.search(r"fastadam: kernels for (\S+) ", done.stdout)[1].split(";")


def configure(folder, isas):
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DFASTADAM_PYTHON=OFF", f"-DFASTADAM_ISAS={isas}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})


def test_the_widest_isa_is_the_default():
    result = run_python("import fastadam; print(fastadam.current_isa() == fastadam.isas()[-1])")
    assert result.stdout.split() == ["True"]


@pytest.mark.parametrize("name", fastadam.isas())
def test_an_isa_is_forced_by_name_and_by_the_environment(name):
    fastadam.set_isa(name)
    assert fastadam.current_isa() == name
    result = run_python("import fastadam; print(fastadam.current_isa())", FASTADAM_ISA=name)
    assert result.stdout.split() == [name]


@pytest.mark.parametrize("name", ["avx9000", "", "AVX2"])
def test_an_unknown_isa_is_refused_with_the_list_of_known_ones(name):
    before = fastadam.current_isa()
    with pytest.raises(
        ValueError, match=re.escape(f"isa '{name}': not in this build, expected one of '{fastadam.isas()[0]}'")
    ):
        fastadam.set_isa(name)
    assert fastadam.current_isa() == before


def test_an_isa_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="isa: int, expected one of"):
        fastadam.set_isa(3)


def test_every_isa_this_cpu_lacks_is_refused():
    for name, usable in _cpu.compiled_isas():
        if not usable:
            with pytest.raises(ValueError, match=f"isa '{name}': not supported by this CPU, expected one of"):
                fastadam.set_isa(name)


def test_an_unknown_isa_of_the_environment_is_a_clear_error():
    result = run_python("import fastadam", FASTADAM_ISA="avx9000")
    assert result.returncode != 0
    assert "environment variable FASTADAM_ISA: isa 'avx9000': not in this build, expected one of" in result.stderr


def test_a_missing_extension_is_a_helpful_import_error():
    result = run_python("import sys; sys.modules['fastadam._cpu'] = None; import fastadam")
    assert "ImportError: fastadam: its compiled extension fastadam._cpu is missing or does not load" in result.stderr
    assert "pip install ." in result.stderr


def test_a_broken_extension_is_a_helpful_import_error(tmp_path):
    copy = tmp_path / "fastadam"
    shutil.copytree(Path(fastadam.__file__).parent, copy)
    (copy / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    # The finder of an editable install, an object among classes, would find the extension that works.
    result = run_python(
        f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
sys.path.insert(0, {str(tmp_path)!r})
import fastadam
"""
    )
    assert "ImportError: fastadam: its compiled extension fastadam._cpu is missing or does not load" in result.stderr
    assert str(copy) in result.stderr


@pytest.mark.parametrize("name", ["\udcff", "\N{SNOWMAN}", "avx2\0"])
def test_a_name_of_odd_characters_is_refused_as_any_other(name):
    """A lone surrogate, which UTF-8 cannot encode, is what Python makes of other bytes in the environment."""
    with pytest.raises(ValueError, match="not in this build, expected one of 'baseline'"):
        fastadam.set_isa(name)
    if "\0" not in name:
        assert "not in this build, expected one of" in run_python("import fastadam", FASTADAM_ISA=name).stderr
