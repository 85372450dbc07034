"""A save that fails or is killed leaves the file that was there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import fastadam
import numpy as np
import pytest
from helpers import Halving, run_campaign, saved, train, trained

F32 = np.float32


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(name, tmp_path, monkeypatch):
    optimizer, variables = saved(tmp_path / "opt")
    before = (tmp_path / "opt").read_bytes()
    train(optimizer, variables, range(3, 4))

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match="No space left"):
            optimizer.save(tmp_path / "opt")
    assert [p.name for p in tmp_path.iterdir()] == ["opt"]
    assert (tmp_path / "opt").read_bytes() == before
    assert optimizer.iterations == 4
    optimizer.save(tmp_path / "opt")
    assert fastadam.Adam.load(tmp_path / "opt", variables).iterations == 4


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    optimizer, variables = trained({"learning_rate": Halving(0.5)})
    Halving.get_config, original = (lambda self: {"x": object()}), Halving.get_config
    try:
        with pytest.raises(ValueError, match="get_config of Adam: not plain JSON"):
            optimizer.save(tmp_path / "opt")
    finally:
        Halving.get_config = original
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="none"):
        optimizer.save(tmp_path / "none" / "opt")
    del variables


def test_without_safetensors_the_error_names_the_extra(tmp_path, monkeypatch):
    _, variables = saved(tmp_path / "opt")
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=re.escape("loading a saved optimizer needs safetensors: pip install safetensors")
    ):
        fastadam.Adam.load(tmp_path / "opt", variables)


FULL_DISK = """
import resource, sys
import fastadam, numpy as np
path, w = sys.argv[1], np.ones(5000, np.float32)
optimizer = fastadam.Adam(0.1)
optimizer.apply_gradients([(w, np.zeros(5000, np.float32))])
optimizer.save(path)
optimizer.iterations = 2
for limit in (0, 1, 100, 4096, 20000, 40000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        optimizer.save(path)
    except OSError as error:
        assert path in str(error), error
    else:
        raise SystemExit(f"saved within {limit} bytes")
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "opt")], check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["opt"]
    assert fastadam.Adam.load(tmp_path / "opt", [np.zeros(5000, F32)]).iterations == 1


def test_a_process_killed_at_any_moment_leaves_a_whole_file():
    run_campaign("kills save", 20)
