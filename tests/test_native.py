"""The C++ core without Python: the programs of tests/native, plain and sanitized, and the symbols of the kernels."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import fastadam
import pytest
from compiled import build, run, tool
from helpers import weekly

DIGEST_PROGRAMS = ["kernel_test", "row_test", "sum_test"]
THREAD_PROGRAMS = [*DIGEST_PROGRAMS, "index_test", "undo_test", "small_test"]
pytestmark = pytest.mark.native


def path_of(program: str, sanitizers: str = "") -> Path:
    """A program, built with these sanitizers."""
    name = f"native-{sanitizers.split(',')[0] or 'plain'}"
    # AddressSanitizer watches memory, which the kernels of all instruction sets touch alike: two have the two ways of the
    # source, with and without intrinsics. ThreadSanitizer watches the threads, which know nothing of instruction sets.
    with_avx2 = "baseline;avx2" if "avx2" in fastadam.isas() else "all"
    isas = {"": "all", "address,undefined": with_avx2, "thread": "baseline"}[sanitizers]
    options = {"FASTADAM_PYTHON": "OFF", "FASTADAM_NATIVE_TESTS": "ON", "FASTADAM_SANITIZE": sanitizers}
    targets = THREAD_PROGRAMS if program in THREAD_PROGRAMS else [program]
    return build(name, *targets, **options, FASTADAM_ISAS=isas) / program


@pytest.mark.parametrize("program", DIGEST_PROGRAMS)
def test_kernels_give_the_bits_of_a_scalar_loop_and_one_digest(program):
    assert "digest " in run(path_of(program))


@pytest.mark.parametrize("program", [*DIGEST_PROGRAMS, "small_test"])
def test_what_an_emulated_cpu_leaves_out_is_in_no_digest(program):
    widest = fastadam.isas()[-1]
    assert f"ok   {widest} gives the digest of all machines" in run(path_of(program), "emulated")


def test_indices_are_sorted_as_by_a_stable_sort():
    assert "stable sort" in run(path_of("index_test"))


def test_steps_are_undone_to_the_bit():
    found = run(path_of("undo_test"))
    assert "undoes a step to the bit" in found
    assert "finds the one tile whose gradient has changed" in found


def test_small_states_have_the_same_bits_everywhere():
    found = run(path_of("small_test"))
    assert "gives the bits of the other instruction sets" in found
    assert "digest 816a54bd769e4fb9" in found


def test_closed_forms_are_the_sum_of_the_steps():
    assert "error of at most 2^-26" in run(path_of("form_test"))


def test_cuda_threads_give_the_bits_of_the_cpu_kernels():
    assert "dense kernel: has the bits of the CPU kernels" in run(path_of("cuda_test"))
    assert "row kernel, closed forms: has the bits of the CPU kernel" in run(path_of("cuda_row_test"))


@pytest.mark.parametrize("program", [*THREAD_PROGRAMS, "form_test", *weekly("cuda_test", "cuda_row_test")])
def test_kernels_have_no_address_or_undefined_behaviour_error(program):
    run(path_of(program, "address,undefined"))


@pytest.mark.parametrize("program", THREAD_PROGRAMS)
def test_threads_have_no_data_race(program):
    command = [path_of(program, "thread"), "threads"]
    probe = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if (
        "unexpected memory mapping" in probe.stdout
    ):  # an older ThreadSanitizer does not stand so much address randomness
        command = [tool("setarch"), "--addr-no-randomize", *command]
    assert "threads: 3 give the " in run(*command)


def test_isa_objects_share_no_symbol_with_the_rest():
    """A symbol compiled for a newer CPU could be the copy that the linker keeps for code an older one runs."""
    objects = {
        re.sub(r".*/kernels_(\w+)\.dir/.*", r"\1", path.as_posix()): path
        for path in path_of("kernel_test").parent.glob("**/kernels_*.dir/**/*.o")
    }
    assert set(fastadam.isas()) <= set(objects)
    for isa, path in objects.items():
        symbols = re.findall(r"^[0-9a-f ]+ (\S) (.+)$", run(tool("nm"), "-C", path), re.MULTILINE)
        weak = [name for kind, name in symbols if kind in "WwVvu"]
        shared = [name for kind, name in symbols if kind.isupper() and kind != "U"]
        assert weak == [], isa
        assert shared == [f"fastadam::cpu::{isa}::kernels"]
