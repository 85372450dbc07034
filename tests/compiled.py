"""What tests compile: each configuration once, in a folder under build/ that processes and later runs share."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool(*names: str) -> str:
    """The first of these programs that is found, beside this Python or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = next((found for name in names if (found := shutil.which(name, path=path))), None)
    return found or pytest.fail(f"needs {' or '.join(names)}")


def run(*command: object, env: dict[str, str] | None = None) -> str:
    # What is preloaded for the tests (a sanitizer) is not for other programs.
    kept = {name: value for name, value in (env or os.environ).items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=kept
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} returned {done.returncode}:\n{done.stdout}"
    return done.stdout


@functools.cache
def build(name: str, *targets: str, **options: object) -> Path:
    """The folder in which CMake has built these targets of this repository with these options.

    Ninja compiles again what has changed since the last run. Other options, another Python or other flags of the
    environment get a folder of their own. The lock makes other processes wait for the one that builds.
    """
    settings = [f"-D{option}={value}" for option, value in options.items()]
    settings += ["-DSKBUILD_PROJECT_VERSION=0", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    flags = [os.environ.get(flag) for flag in ("CC", "CXX", "CXXFLAGS", "LDFLAGS")]
    key = hashlib.sha256(repr((settings, flags, sys.executable, sys.version)).encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"tests-{name}-{key}"  # as deep as where pip builds: a compiler cache sees the same paths
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        run(tool("cmake"), "-S", ROOT, "-B", folder, *generator, *settings)
        run(tool("cmake"), "--build", folder, "--target", *targets)
    return folder
