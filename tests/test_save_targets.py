"""What a save replaces: a regular file, with its mode and behind its links, and nothing else."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import fastadam
import numpy as np
import pytest
from helpers import saved, train

W = np.ones(3, np.float32)


def optimizer(steps=1):
    made = fastadam.Adam(0.1)
    made.build([W])
    made.iterations = steps
    return made


def make_fifo(path):
    os.mkfifo(path)


def make_device(path):
    """A link to one: only root can make another."""
    path.symlink_to("/dev/null")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


SPECIAL = {
    "a FIFO": make_fifo,
    "a device": make_device,
    "a socket": make_socket,
    "Is a directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_stays_and_is_not_waited_for(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    path = tmp_path / "opt"
    SPECIAL[kind](path.relative_to(tmp_path) if kind == "a socket" else path)
    before = os.lstat(path)
    with pytest.raises(OSError, match=re.escape(f"not saved: {kind}")) as error:
        optimizer().save(path)
    assert error.value.filename == str(path)
    with pytest.raises(OSError, match=re.escape(kind)):
        fastadam.Adam.load(path, [W])
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["opt"]
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("to", ["absolute", "relative", "chain", "dangling"])
def test_a_symbolic_link_stays_and_its_target_is_replaced(to, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    target, link = tmp_path / "there" / "real", tmp_path / "here" / "opt"
    if to != "dangling":
        optimizer(1).save(target)
    link.symlink_to(target if to == "absolute" else "../there/real")
    if to == "chain":
        (tmp_path / "chain").symlink_to("here/opt")
        link = tmp_path / "chain"
    optimizer(2).save(link)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert fastadam.Adam.load(target, [W]).iterations == fastadam.Adam.load(link, [W]).iterations == 2
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["real"]
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["opt"]


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="not saved: .*symbolic links"):
        optimizer().save(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o777])
def test_a_file_that_is_replaced_keeps_its_mode(mode, tmp_path):
    made, variables = saved(tmp_path / "opt")
    (tmp_path / "opt").chmod(mode)
    train(made, variables, range(3, 4))
    made.save(tmp_path / "opt")
    assert stat.S_IMODE((tmp_path / "opt").stat().st_mode) == mode
    assert fastadam.Adam.load(tmp_path / "opt", variables).iterations == 4


def test_the_temporary_file_of_a_private_one_is_private(tmp_path, monkeypatch):
    optimizer().save(tmp_path / "opt")
    (tmp_path / "opt").chmod(0o600)
    modes = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(stat.S_IMODE(os.fstat(file).st_mode)) or sync(file))
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    optimizer(2).save(tmp_path / "opt")
    assert modes[0] == 0o600


@pytest.mark.parametrize("below", ["file/opt", "file/deep/opt"])
def test_a_path_below_a_file_says_so_by_its_own_name(below, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="not saved: Not a directory") as error:
        optimizer().save(tmp_path / below)
    assert error.value.filename == str(tmp_path / below)
    assert ".fastadam-" not in str(error.value)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("end", ["", ".", ".."])
def test_a_path_that_ends_as_a_directory_names_no_file(end, tmp_path):
    with pytest.raises(OSError, match="not saved: Is a directory"):
        optimizer().save(f"{tmp_path}/opt/{end}")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_synced_is_told_apart_from_a_failed_save(tmp_path, monkeypatch):
    sync = os.fsync

    def fail_for_directories(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(5, "Input/output error")
        sync(file)

    monkeypatch.setattr(os, "fsync", fail_for_directories)
    with pytest.raises(OSError, match="] saved, but its directory could not be synced"):
        optimizer(7).save(tmp_path / "opt")
    assert fastadam.Adam.load(tmp_path / "opt", [W]).iterations == 7


AS_NOBODY = """
import os, sys
import fastadam, numpy as np
os.chdir(sys.argv[1])
w, opt = np.ones(3, np.float32), fastadam.Adam(0.1)
opt.build([w])
opt.save("opt")
os.mkdir("dir")
if os.geteuid() == 0:  # root may do everything
    for name in (".", "opt", "dir"):
        os.chown(name, 65534, 65534)
    os.setegid(65534)
    os.seteuid(65534)
opt.iterations = 2
os.chmod("dir", 0o300)  # it can be written to, and not be read
opt.save("dir/opt")
assert fastadam.Adam.load("dir/opt", [w]).iterations == 2

def refused(path, text):
    try:
        opt.save(path)
    except PermissionError as error:
        assert text in str(error) and error.filename == path, error
    else:
        raise SystemExit(f"{path} was saved")

os.chmod("opt", 0o444)
refused("opt", "not saved: Permission denied (the file is read-only)")
os.chmod("opt", 0o644)
os.chmod(".", 0o555)
refused("opt", "not saved: Permission denied (no new file can be made in its directory)")
refused("new", "not saved: Permission denied (no new file can be made in its directory)")
assert fastadam.Adam.load("opt", [w]).iterations == 0
os.chmod(".", 0o755)
opt.save("opt")
assert fastadam.Adam.load("opt", [w]).iterations == 2
assert sorted(os.listdir(".")) == ["dir", "opt"]
"""


def test_without_the_right_to_write_the_old_file_stays(tmp_path):
    subprocess.run([sys.executable, "-c", AS_NOBODY, str(tmp_path)], check=True)
