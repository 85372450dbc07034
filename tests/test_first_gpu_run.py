"""What whoever gets a GPU runs first: it must fail, not skip, where there is none, and name tests that exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fastadam
import pytest
from compiled import ROOT
from gpu import asks_for_gpu, real_or_skip

SCRIPT = ROOT / "tests" / "first_gpu_run.sh"


@pytest.mark.parametrize(
    ("markers", "asked"),
    [
        *[("gpu", True), ("slow or gpu", True), ("gpu and not slow", True)],
        *[("", False), ("not slow", False), ("fake_gpu", False), ("slow and not gpu", False)],
    ],
)
def test_a_missing_gpu_is_a_failure_where_it_was_asked_for(monkeypatch, markers, asked):
    monkeypatch.setattr(fastadam.cuda, "is_available", lambda: False)
    config = SimpleNamespace(option=SimpleNamespace(markexpr=markers))
    assert asks_for_gpu(config) == asked
    with pytest.raises(pytest.fail.Exception if asked else pytest.skip.Exception, match="needs a GPU: "):
        real_or_skip(config)


def test_the_script_names_files_that_exist_and_parts_of_names_of_their_tests():
    text = SCRIPT.read_text()
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert not shutil.which("shellcheck") or subprocess.run(["shellcheck", SCRIPT], check=False).returncode == 0
    for path in re.findall(r"\b(?:tests|bench)/\w+\.\w+", text):
        assert (ROOT / path).is_file(), path
    choices = re.findall(r'(tests/\w+\.py) -k "?([\w ]+)"?', text)
    assert len(choices) >= 3
    for path, choice in choices:
        names = re.findall(r"def (test_\w+)", (ROOT / path).read_text())
        values = (ROOT / path).read_text()
        for word in re.split(r" (?:or|and) ", choice):
            assert any(word in name for name in names) or f'"{word}"' in values, (path, word)


def test_the_script_says_what_is_missing_and_runs_nothing():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    package = str(Path(fastadam.__file__).parents[1])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": package, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", SCRIPT, "--no-build"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "not run: fastadam sees no GPU; see above", done
    assert "passed" not in done.stdout
