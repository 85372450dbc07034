"""The C interface of the installed package: found by programs, and of the bits of the Python package."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fastadam
import numpy as np
import pytest
from compiled import run, tool
from helpers import bits

HERE = Path(__file__).parent / "capi"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


@functools.cache
def option(name):
    return subprocess.run([sys.executable, "-m", "fastadam", name], capture_output=True, text=True, check=True).stdout


def output_of(folder, compiler, *source):
    program = folder / "program"
    run(compiler, *source, *WARNINGS, *option("--include").split(), "-o", program, *option("--libs").split(), "-lm")
    return run(program)


def numbers(output):
    """The printed arrays by name."""
    lines = [line.split() for line in output.splitlines()]
    return {name: np.array([float.fromhex(n) for n in rest], np.float32) for name, *rest in lines if "0x" in str(rest)}


def ramp(size, step, start):
    return np.float32(start) + np.float32(step) * np.arange(size, dtype=np.float32)


def expected_arrays():
    """What program.c computes, by the Python package."""
    dense = [ramp(18, 0.25, -1), ramp(18, 0.25, -1)]
    optimizer = fastadam.AdamW(0.01, weight_decay=0.1, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_list=[dense[1]])
    for _ in range(3):
        optimizer.apply_gradients(zip([ramp(18, 0.125, -0.5), ramp(18, 0.125, -1)], dense, strict=True))
    arrays = {"dense": dense[0], "second": dense[1]}
    for name, mode in (("every", "dense"), ("lazy", "lazy")):
        arrays[name] = ramp(18, 0.25, -1).reshape(6, 3)
        optimizer = fastadam.Adam(amsgrad=True, sparse_update=mode)
        for _ in range(3):
            gradient = fastadam.IndexedSlices(ramp(12, 0.125, -0.5).reshape(4, 3), np.array([4, 1, 4, 0], np.int32))
            optimizer.apply_gradients([(gradient, arrays[name])])
    return arrays


def assert_output_of_the_c_program(output):
    found = numbers(output)
    for name, array in expected_arrays().items():
        np.testing.assert_array_equal(bits(found[name]), bits(array.ravel()), err_msg=name)
    norm = float.fromhex(re.search(r"^norm (\S+)$", output, re.MULTILINE)[1])
    assert norm == pytest.approx((ramp(18, 0.125, -0.5).astype(np.float64) ** 2).sum(), rel=1e-15)
    assert f"version {fastadam.__version__}\n" in output


def test_a_c99_program_gets_the_bits_of_the_python_package(tmp_path):
    assert_output_of_the_c_program(output_of(tmp_path, tool("cc", "gcc"), "-std=c99", HERE / "program.c"))


@pytest.mark.slow
def test_a_cpp_program_steps_accumulates_and_is_refused_with_a_reason(tmp_path):
    output = output_of(tmp_path, tool("c++", "g++"), "-std=c++17", HERE / "program.cpp")
    assert_output_of_the_cpp_program(output)


def assert_output_of_the_cpp_program(output):
    w, average, accumulator = (
        float.fromhex(n) for n in re.search(r"^double (\S+) average (\S+) accum\S+ (\S+)", output).groups()
    )
    torch_step = 1 - 0.001 * 0.75 / (0.75 + 1e-7)  # g = 0.5 + 0.25 * 1, m = g / 10, v = g * g / 1000, both corrected
    assert w == pytest.approx(torch_step, rel=1e-14)
    assert average == pytest.approx((1 + torch_step) / 2, rel=1e-14)
    assert accumulator == 1
    assert re.findall(r"^status (\d) (.*)$", output, re.MULTILINE) == [
        ("1", "tensors[1].m: null"),
        (
            "1",
            "tensors[1].grad_dtype: 3 for dtype 2, expected the same, float32 for a half variable, or a half type for a dense gradient of float32",
        ),
        ("1", "tensors[1].var: misaligned, expected an address that is a multiple of the item size"),
        ("1", "tensors[0].vhat: null, expected in all tensors or in none"),
        ("1", "tensors[1].next: 0, expected -1 or, in a list with heads, a later tensor of the same variable"),
        ("1", "beta_2: 1.000000 is 1 in float32, expected less"),
        ("1", "step: 0, expected 1 or more"),
        ("3", "a gradient is not finite"),
        ("1", "list: ABI 4, expected 3, the ABI of this library"),
        ("1", "tensors[1].grad_factor: expected a finite number"),
        ("1", "tensors[1].grad_factor: infinite in float32, expected a finite number"),
        ("1", "tensors[1].var: 9223372036854775807 elements, expected 0 to 2^59"),
        ("1", "tensors[1].stale: not null, expected null"),
        ("1", "ema_momentum: 2.000000, expected 0 to 1"),
        ("1", "gradient_scale: inf, expected a finite number above 0"),
        ("1", "l2: -1.000000, expected 0 or more"),
        ("1", "tensors[1].grad: -1 elements, expected 0 to 2^59"),
        ("1", "tensors[0].rows: a null array, expected the arrays of fastadam_sort_rows"),
        ("1", "tensors[0].rows: expected unique rows in ascending order"),
        ("1", "tensors[0].rows: expected starts in ascending order"),
        ("1", "tensors[0].rows: expected starts[0] to be 0"),
        ("1", "tensors[0].rows: order out of range, expected positions of values"),
        ("1", "tensors[0].rows: a row out of range, expected rows of the variable"),
        ("1", "heads: expected each tensor to belong to exactly one variable"),
        ("1", "heads: expected each tensor to belong to exactly one variable"),
        ("1", "tensors[0].next: 1 for a tensor with rows, expected -1 in a lazy step"),
        ("1", "offsets: expected null without heads"),
        ("1", "indices[0]: 4 is not a row, expected 0 <= index < 4"),
    ]


@pytest.mark.slow
def test_cmake_finds_the_package(tmp_path):
    folder = option("--cmake-dir").strip()
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-S", HERE, "-B", tmp_path, *generator, f"-Dfastadam_DIR={folder}")
    run(tool("cmake"), "--build", tmp_path)
    assert_output_of_the_c_program(run(tmp_path / "c_program"))
    assert_output_of_the_cpp_program(run(tmp_path / "cpp_program"))
    if importlib.util.find_spec("fastadam._cuda"):
        count = "from fastadam import _cuda; print('devices', _cuda.device_count()[0])"
        expected = run(sys.executable, "-c", count)  # where it is not taken for the fake one of other tests
        assert run(tmp_path / "cuda_program") == expected + "status 1 list: null\n"


def test_pkg_config_tells_what_the_command_line_tells(tmp_path):
    """With the program where there is one, else by its rules: ``pcfiledir`` is the folder of the file."""
    folder = Path(option("--pkgconfig-dir").strip())
    text = (folder / "fastadam.pc").read_text()
    if shutil.which("pkg-config"):
        env = {**os.environ, "PKG_CONFIG_PATH": str(folder)}
        flags = run("pkg-config", "--cflags", "--libs", "fastadam", env=env).split()
    else:
        fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        prefix = re.search(r"^prefix=(.*)$", text, re.MULTILINE)[1].replace("${pcfiledir}", str(folder))
        flags = (fields["Cflags"] + " " + fields["Libs"]).replace("${prefix}", prefix).split()
    program = tmp_path / "program"
    run(tool("cc", "gcc"), "-std=c99", HERE / "program.c", *flags, "-o", program, "-lm")
    assert_output_of_the_c_program(run(program))


ABI = 3  # FASTADAM_ABI


class Hyper(ctypes.Structure):
    _fields_ = [
        ("step", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("learning_rate", "beta_1", "beta_2", "epsilon", "decay", "clip_value")),
        *((name, ctypes.c_double) for name in ("clip_norm", "global_clip_norm", "gradient_scale", "weight_decay")),
        ("ema_momentum", ctypes.c_double),
        *((name, ctypes.c_bool) for name in ("ema_overwrite", "require_finite", "clip_after_dedupe")),
        ("l2", ctypes.c_double),
        *((name, ctypes.c_bool) for name in ("epsilon_corrected", "zero_gradients")),
        ("seed", ctypes.c_uint64),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("var", "grad", "m", "v", "vhat")),
        *((name, ctypes.c_int64) for name in ("size", "next")),
        ("grad_factor", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "grad_dtype")),
        ("decays", ctypes.c_bool),
        ("moments", ctypes.c_int32),
        ("stochastic", ctypes.c_bool),
        ("parameter", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("m_scales", "v_scales", "low", "average", "copy")),
        ("copy_dtype", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("telemetry", "accumulator", "rows", "stale")),
        ("grad_size", ctypes.c_int64),
    ]


class List(ctypes.Structure):
    _fields_ = [
        ("abi", ctypes.c_int32),
        ("tensors", ctypes.POINTER(Tensor)),
        ("count", ctypes.c_int64),
        ("heads", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("variable_count", ctypes.c_int64),
    ]


def test_ctypes_steps_numpy_arrays():
    library = ctypes.CDLL(str(Path(option("--library").strip())))
    library.fastadam_error.restype = ctypes.c_char_p
    w, g = ramp(100_003, 1e-4, -1), ramp(100_003, -1e-4, 1)
    m, v = np.zeros_like(w), np.zeros_like(w)
    expected, optimizer = w.copy(), fastadam.Adam()
    tensor = Tensor(
        *(a.ctypes.data for a in (w, g, m, v)),
        None,
        w.size,
        -1,
        1.0,
        2,
        2,
        True,
        0,
        False,
        0,
        *[None] * 5,
        2,
        *[None] * 4,
        w.size,
    )
    for step in (1, 2):
        hyper = Hyper(step, 0.001, 0.9, 0.999, 1e-7, 0, *[np.inf] * 3, 1, 0, 0, *[False] * 3, 0, False, False, 0)
        listed = List(ABI, ctypes.pointer(tensor), 1, None, None, 0)
        assert library.fastadam_step(ctypes.byref(listed), ctypes.byref(hyper), ctypes.c_bool(False)) == 0
        optimizer.apply_gradients([(g, expected)])
    np.testing.assert_array_equal(bits(w), bits(expected))
    assert library.fastadam_step(None, ctypes.byref(hyper), ctypes.c_bool(False)) == 1
    assert library.fastadam_error() == b"list: null"
