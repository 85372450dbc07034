"""The C++ core without Python: the programs of tests/native, plain and sanitized, and the symbols of the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fastadam
import pytest

ROOT = Path(__file__).parents[1]
DIGEST_PROGRAMS = ["kernel_test", "row_test", "sum_test"]
THREAD_PROGRAMS = [*DIGEST_PROGRAMS, "index_test"]
PROGRAMS = [*THREAD_PROGRAMS, "form_test", "cuda_test", "cuda_row_test"]


def tool(name: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.fail(f"needs {name}")
    return found


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))} returned {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function from a list of sanitizers to the folder of a build with them; each is built once."""
    folders: dict[str, Path] = {}

    def build_with(sanitizers: str) -> Path:
        if sanitizers not in folders:
            os.environ.get("CXX") or tool("c++")
            folder = tmp_path_factory.mktemp("native")
            options = ["-DSKBUILD_PROJECT_VERSION=0", "-DFASTADAM_PYTHON=OFF", "-DFASTADAM_NATIVE_TESTS=ON"]
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
            run(tool("cmake"), "-S", ROOT, "-B", folder, *generator, *options, f"-DFASTADAM_SANITIZE={sanitizers}")
            targets = THREAD_PROGRAMS if sanitizers == "thread" else PROGRAMS
            run(tool("cmake"), "--build", folder, "--target", *targets)
            folders[sanitizers] = folder
        return folders[sanitizers]

    return build_with


@pytest.mark.parametrize("program", DIGEST_PROGRAMS)
def test_kernels_give_the_bits_of_a_scalar_loop_and_one_digest(build, program):
    assert "digest " in run(build("") / program)


def test_indices_are_sorted_as_by_a_stable_sort(build):
    assert "stable sort" in run(build("") / "index_test")


def test_closed_forms_are_the_sum_of_the_steps(build):
    assert "right to 2^-26" in run(build("") / "form_test")


def test_cuda_threads_give_the_bits_of_the_cpu_kernels(build):
    assert "threads of dense steps" in run(build("") / "cuda_test")
    assert "warps of rows that jump" in run(build("") / "cuda_row_test")


@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels_have_no_address_or_undefined_behaviour_error(build, program):
    run(build("address,undefined") / program)


@pytest.mark.parametrize("program", THREAD_PROGRAMS)
def test_threads_have_no_data_race(build, program):
    command = [build("thread") / program, "threads"]
    probe = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if (
        "unexpected memory mapping" in probe.stdout
    ):  # an older ThreadSanitizer does not stand so much address randomness
        command = [tool("setarch"), "--addr-no-randomize", *command]
    assert "threads: 3 give the " in run(*command)


def test_isa_objects_share_no_symbol_with_the_rest(build):
    """A symbol compiled for a newer CPU could be the copy that the linker keeps for code an older one runs."""
    objects = {
        re.sub(r".*/kernels_(\w+)\.dir/.*", r"\1", path.as_posix()): path
        for path in build("").glob("**/kernels_*.dir/**/*.o")
    }
    assert set(fastadam.isas()) <= set(objects)
    for isa, path in objects.items():
        symbols = re.findall(r"^[0-9a-f ]+ (\S) (.+)$", run(tool("nm"), "-C", path), re.MULTILINE)
        weak = [name for kind, name in symbols if kind in "WwVvu"]
        shared = [name for kind, name in symbols if kind.isupper() and kind != "U"]
        assert weak == [], isa
        assert shared == [f"fastadam::cpu::{isa}::kernels"]
