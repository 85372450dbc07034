"""Deltas when the disk is full or the process is killed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings

import pytest
from delta_cases import Training, fail_to_save
from fastadam._core.parts import parts_of
from helpers import run_campaign

pytestmark = pytest.mark.filterwarnings("ignore:.*a gradient for rows that wait:UserWarning")

FULL_DISK = """
import resource, sys
import fastadam, numpy as np
from pathlib import Path
path = Path(sys.argv[1])
w = np.ones((5000, 4), np.float32)
optimizer = fastadam.Adam(0.1, sparse_update="deferred")
optimizer.build([w])
optimizer.save(path / "base", values=True)
for i, limit in enumerate((0, 1, 100, 4096, 20000, 100_000)):
    ids = np.arange(i * 700, i * 700 + 700)
    optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((700, 4), np.float32), ids), w)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for save in (optimizer.save_delta, lambda p: optimizer.save(p, values=True)):
        try:
            save(path / "delta")
        except OSError as error:
            assert str(path / "delta") in str(error), error
        else:
            assert limit > 50_000 and save == optimizer.save_delta, limit
            break
    assert limit > 50_000 or [p.name for p in path.iterdir()] == ["base"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
optimizer.save_delta(path / "last")
deltas = [path / "delta"] if (path / "delta").exists() else []
fastadam.Adam.load(path / "base", [again := np.zeros_like(w)], deltas=[*deltas, path / "last"])
optimizer.sync()
assert np.array_equal(again, w)
"""


def test_after_a_full_disk_the_next_delta_has_everything(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FULL_DISK, str(tmp_path)], check=True)


def test_a_process_killed_at_any_moment_leaves_a_chain_that_loads():
    run_campaign("kills save_delta", 15)


def test_flags_are_cleared_only_after_the_rename(tmp_path, monkeypatch):
    training = Training(sparse_update="deferred")
    training.optimizer.save(tmp_path / "base", values=True)
    training.steps(3)
    for name in ("fsync", "replace"):
        fail_to_save(training.optimizer, tmp_path / "delta", monkeypatch, name)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    training.steps(3)
    training.optimizer.save_delta(tmp_path / "delta")
    training.assert_same(training.load(tmp_path / "base", [tmp_path / "delta"]))
    assert not parts_of(training.optimizer).state.entries[0].history.changed_rows().size


def test_the_next_delta_replaces_one_whose_call_has_failed_after_the_rename(tmp_path, monkeypatch):
    training = Training(sparse_update="deferred")
    training.optimizer.save(tmp_path / "base", values=True)
    sync = os.fsync

    def fail_for_directories(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(5, "Input/output error")
        sync(file)

    for earlier in ([], ["first"]):
        training.steps(3)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail_for_directories)
            with pytest.raises(OSError, match="saved, but its directory could not be synced"):
                training.optimizer.save_delta(failed := tmp_path / f"failed after {earlier}")
        training.steps(3)
        name = "second" if earlier else "first"
        training.optimizer.save_delta(tmp_path / name)
        kept = [tmp_path / each for each in (*earlier, name)]
        with pytest.raises(ValueError, match=f"{name}: delta .* like deltas.*failed after .*, expected one of the two"):
            training.load(tmp_path / "base", [*kept[:-1], failed, kept[-1]])
        training.assert_same(training.load(tmp_path / "base", kept))


def test_the_steps_of_an_optimizer_without_deltas_note_nothing(tmp_path):
    training = Training(sparse_update="lazy")
    training.steps(3)
    training.optimizer.save(tmp_path / "plain")
    assert parts_of(training.optimizer).runtime.chain is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.optimizer.save(tmp_path / "base", values=True)
