"""Tests of the Python package, the adapters included, under ThreadSanitizer or AddressSanitizer.

Builds the extension modules and the fake CUDA ones with the sanitizer, puts them into a copy of the package, and runs
pytest on the given files with the sanitizer's runtime preloaded, because Python itself is not instrumented:

    python tests/fuzz/sanitized.py thread tests/test_threads.py tests/test_torch_cuda.py
    python tests/fuzz/sanitized.py address tests/test_fork.py -m "slow or not slow"

What follows the sanitizer's name is for pytest. A report ends the process that it is about, so that its test fails;
the last line says whether there was any. Suppressions are in `tsan.supp`, each with its reason. Needs GCC.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import campaign  # noqa: F401  (the path of the tests' helpers)
from compiled import ROOT, build, tool

HERE = Path(__file__).parent
OPTIONS = {
    # A thread that forks is what tests do; the runtime does not support it in all cases (see test_fork.py below).
    "thread": {"TSAN_OPTIONS": f"halt_on_error=1:die_after_fork=0:suppressions={HERE / 'tsan.supp'}"},
    # Leaks are what leaks.py looks for: Python keeps much until its end.
    "address": {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1", "PYTHONMALLOC": "malloc"},
}
LIBRARIES = {"thread": ["libtsan.so"], "address": ["libasan.so", "libstdc++.so.6"]}  # ASan asks for __cxa_throw


def package(sanitizer: str) -> Path:
    """A folder with the package whose extension modules have the sanitizer."""
    import pybind11

    options = {
        "FASTADAM_SANITIZE": sanitizer,
        "FASTADAM_ISAS": "baseline",
        "FASTADAM_CUDA": "OFF",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    built = build(f"sanitized-{sanitizer}", "_cpu", "_jax", **options)
    copied = built / "package" / "fastadam"
    ignored = shutil.ignore_patterns("*.so", "lib", "__pycache__")
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "fastadam", copied, ignore=ignored)
    (copied / "lib").mkdir()
    for module in (*built.glob("_cpu.*so"), *built.glob("_jax.*so")):
        shutil.copy(module, copied)
    shutil.copy(built / "libfastadam.so", copied / "lib")
    return copied.parent


def found_by(library: str) -> str:
    return subprocess.run(
        ["gcc", f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in OPTIONS:
        raise SystemExit(__doc__)
    if shutil.which("gcc") is None:
        print("skipped: no gcc")
        return
    sanitizer, arguments = sys.argv[1], sys.argv[2:]
    folder = package(sanitizer)
    os.environ["CMAKE_ARGS"] = f"-DFASTADAM_SANITIZE={sanitizer}"  # for the extension that the fixtures compile
    from gpu import build_fake

    for name in ("_cuda", "_jax_cuda"):
        build_fake(name)
    os.environ.update(OPTIONS[sanitizer])
    os.environ["PYTHONPATH"] = os.fspath(folder)
    os.environ["LD_PRELOAD"] = ":".join(map(found_by, LIBRARIES[sanitizer]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    if sanitizer == "thread":  # older runtimes do not stand so much address randomness
        command = [tool("setarch"), "--addr-no-randomize", *command]
    code = subprocess.run(command, cwd=ROOT).returncode
    print(f"sanitized {sanitizer}: {'no report' if code == 0 else f'pytest returned {code}'}; {' '.join(arguments)}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
