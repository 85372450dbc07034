"""Tests of the Python package, the adapters included, under ThreadSanitizer or AddressSanitizer.

Builds the extension modules and the fake CUDA ones with the sanitizer, puts them into a copy of the package, and runs
pytest on the given files with the sanitizer's runtime preloaded, because Python itself is not instrumented:

    python tests/fuzz/sanitized.py thread tests/test_threads.py tests/test_torch_cuda.py
    python tests/fuzz/sanitized.py address tests/test_fork.py -m "slow or not slow"

What follows the sanitizer's name is for pytest. The reports of all processes, those that tests start included, are
printed at the end; the last line says how many there were. Tests of JAX have suppressions, `tsan_jax.supp`; no other test
has any. Needs GCC.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import campaign  # noqa: F401  (the path of the tests' helpers)
from compiled import ROOT, build, tool

HERE = Path(__file__).parent
OPTIONS = {
    # die_after_fork: tests start threads in forked children. Beside running threads that hangs in the runtime itself.
    "thread": {"TSAN_OPTIONS": "die_after_fork=0:ignore_noninstrumented_modules=1"},
    # detect_leaks: that is what leaks.py looks for, and Python keeps much until its end. allocator_may_return_null: tests
    # ask for more memory than there is.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1",
        "PYTHONMALLOC": "malloc",
    },
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
    reports = folder.parent / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    os.environ.update(OPTIONS[sanitizer])
    os.environ[f"{sanitizer[0].upper()}SAN_OPTIONS"] += f":log_path={reports / 'report'}"
    if sanitizer == "thread" and any("jax" in argument for argument in arguments):
        os.environ["TSAN_OPTIONS"] += f":suppressions={HERE / 'tsan_jax.supp'}"
    os.environ["PYTHONPATH"] = os.fspath(folder)
    os.environ["LD_PRELOAD"] = ":".join(map(found_by, LIBRARIES[sanitizer]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    if sanitizer == "thread":  # older runtimes do not stand so much address randomness
        command = [tool("setarch"), "--addr-no-randomize", *command]
    code = subprocess.run(command, cwd=ROOT).returncode
    written = [path.read_text() for path in sorted(reports.iterdir())]
    found = [
        text
        for text in written
        if re.search("ERROR: |FATAL: |CHECK failed|WARNING: ThreadSanitizer|runtime error", text)
    ]  # not advice
    print(*found, sep="\n")
    print(f"sanitized {sanitizer}: {len(found)} reports, pytest returned {code}; {' '.join(arguments)}")
    raise SystemExit(code or len(found) > 0)


if __name__ == "__main__":
    main()
