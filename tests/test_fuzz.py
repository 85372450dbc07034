"""A short run of each program of tests/fuzz, with a fixed seed: a new one belongs to a long run, by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from absent import need
from compiled import run, tool
from test_c_interface import option

FUZZ = Path(__file__).parent / "fuzz"
pytestmark = pytest.mark.slow


SEED = 1


def closing_line(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("library", "count", "frameworks"),
    [("core", 2000, []), ("torch", 400, ["torch"]), ("jax", 150, ["jax", "optax"]), ("keras", 200, ["keras", "jax"])],
)
def test_bad_calls_are_refused(library, count, frameworks, monkeypatch):
    need(*frameworks)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    line = closing_line(
        sys.executable, "-W", "ignore", FUZZ / "bad_calls.py", "--libraries", library, "--seed", SEED, "--count", count
    )
    assert line.startswith(f"bad_calls: seed {SEED}, cases 0 to {count - 1}: ")
    assert line.endswith(" 0 findings")


@pytest.mark.parametrize(("program", "count"), [("programs", 150), ("files", 400)])
def test_programs_and_files(program, count):
    line = closing_line(sys.executable, FUZZ / f"{program}.py", "--seed", SEED, "--count", count)
    assert line.startswith(f"{program}: seed {SEED}, cases 0 to {count - 1}: ")
    assert line.endswith(" 0 findings")


def test_calls_of_the_c_interface(tmp_path):
    flags = [*option("--include").split(), *option("--libs").split()]
    run(
        tool("c++", "g++"),
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        FUZZ / "c_calls.cpp",
        *flags,
        "-o",
        tmp_path / "c_calls",
    )
    line = closing_line(tmp_path / "c_calls", SEED, 200_000)
    assert line.startswith(f"c_calls: seed {SEED}, cases 0 to 199999: ")
    assert line.endswith(" 0 findings")


def test_a_case_can_be_repeated_alone():
    """It says what it calls, and gets the same random numbers."""
    said = [
        subprocess.run(
            [sys.executable, FUZZ / "bad_calls.py", "--libraries", "core", "--seed", "1", "--only", "1234"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1]
    assert said[0].startswith("fastadam.")


BROKEN = """
import children, os, sys

def start(folder):
    def case(rng, tell, number):
        tell(f"call {number}")
        if number == 2:
            os.kill(os.getpid(), 11)
        if number == 4:
            raise children.Finding("wrong")
        if number == 5:
            import time
            time.sleep(60)
        return "fine"
    return case

children.run("broken", start, children.arguments("x", 8))
"""


def test_a_crash_a_finding_and_a_hang_are_reported_and_the_run_goes_on(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    done = subprocess.run(
        [sys.executable, program, "--seed", "3", "--patience", "3"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(FUZZ)},
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "case 2 of seed 3: the process died: wait status 11",
        "  call 2",
        "case 4 of seed 3: wrong",
        "  call 4",
        "case 5 of seed 3: no answer within 3 s",
        "  call 5",
        "broken: seed 3, cases 0 to 7: 5 fine, 3 wrong, 3 findings of 3 kinds",
    ]
