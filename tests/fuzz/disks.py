"""Files that cannot be written: a disk that is full, a system call that fails, a power cut.

"full": a file system with little room: a tmpfs in a mount namespace of this process, or a limit on the size of a file
where the process may not mount. Each case is an amount of room and a kind of file. The call succeeds, or raises an
OSError that names the file and leaves what was there; with more room the next call succeeds.

"faults": each system call that writes a file fails once, or writes fewer bytes than it should. "power": the power fails
before each of these calls; what was not synced to the disk until then is lost or kept. These two are not random: there
is a case for each kind of file.

The last line says how many calls were attacked. In every case what was left on the disk loaded to the bits of as many
uninterrupted steps as it counts, and was that of the call before or, if it had returned, of the call itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import campaign
from fastadam._core.common import files as writing
from file_cases import KINDS, STEPS, Files, Truth

WRITING = ("open", "lseek", "write", "ftruncate", "fsync", "close", "replace", "fchown", "fchmod")


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def check_refused(error, files, before):
    """An error names a file; what was there still is, and at most a whole delta has come."""
    assert error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO), error
    assert isinstance(error.filename, str), f"{error!r} names no file"
    assert error.filename.startswith(str(files.folder)), f"{error!r} names another file"
    after = content(files.folder)
    if "saved, but" in str(error):  # the rename was made
        del before["base"]
    assert {name: after.get(name) for name in before} == before, "a call that failed has changed files"
    assert all(name.startswith("delta_") for name in after.keys() - before.keys() - {"base"}), after.keys()


# ---- a full disk ----------------------------------------------------------------------------------------------------


def may_mount():
    """Whether this process may mount from here on. Nobody else sees its mounts, and they end with it."""
    new_namespace, new_user = 0x00020000, 0x10000000
    libc = ctypes.CDLL(None, use_errno=True)
    flags = new_namespace if os.geteuid() == 0 else new_namespace | new_user
    if not hasattr(libc, "unshare") or libc.unshare(flags) != 0:
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0


@contextlib.contextmanager
def disk(folder, mounts):
    if mounts:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    try:
        yield Path(folder)
    finally:
        if mounts:
            subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def little_room(folder, free, mounts):
    """So many bytes are left on the disk; or, without a disk of its own, files may be so long."""
    if mounts:
        ballast, there = folder / "ballast", os.statvfs(folder)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, there.f_bavail * there.f_frsize - free))
        try:
            yield
        finally:
            ballast.unlink()
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_next_write(files, kind, truth):
    """With room and without faults the next file is written, and has all of the training."""
    files.write(kind)
    again = files.load().training
    assert again.time == files.training.time
    truth.check(again)


def full(arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    mounts, truth, found = may_mount(), Truth(), Counter()

    def case(index, rng):
        kind = KINDS[index % len(KINDS)]
        with tempfile.TemporaryDirectory() as folder, disk(folder, mounts) as place:
            (place / "files").mkdir()
            files = Files(place / "files")
            largest = files.base.stat().st_size
            for _ in range(3):
                before = content(files.folder)
                with little_room(place, rng.randrange(int(1.3 * largest)), mounts):
                    try:
                        files.write(kind)
                        found["made"] += 1
                    except OSError as error:
                        found["refused"] += 1
                        check_refused(error, files, before)
                truth.check(files.load().training)
            check_next_write(files, kind, truth)

    count = campaign.run_cases(arguments, case)
    how = "a tmpfs" if mounts else "a file system with a limit for files, as this process may not mount"
    print(
        f"disks full: on {how}, seed {arguments.seed}, {count} cases, {found['refused']} calls refused, {found['made']} made"
    )


# ---- system calls ---------------------------------------------------------------------------------------------------


class SystemCalls:
    """In the place of the module ``os`` in the code that writes files: every call goes through ``instead``."""

    def __init__(self, instead):
        self._instead = instead

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in WRITING:
            return real
        return lambda *arguments: self._instead(name, real, arguments)


def count_calls(kind):
    calls = []
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        with mock.patch.object(writing, "os", SystemCalls(lambda n, real, a: (calls.append(n), real(*a))[1])):
            files.write(kind)
    return calls


def fault_at(place, code):
    """The call at this place fails with this error; with 0, it writes half of what it should."""
    places = iter(range(10**9))

    def instead(name, real, arguments):
        if next(places) != place:
            return real(*arguments)
        if not code:
            return (
                real(arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
                if name == "write"
                else real(*arguments)
            )
        if name == "close":
            real(*arguments)
        raise OSError(code, os.strerror(code))

    return instead


def faults(arguments):
    truth, found = Truth(), Counter()

    def case(index, _rng):
        kind = KINDS[index]
        for place, name in enumerate(count_calls(kind)):
            for code in [errno.ENOSPC, errno.EIO, *([0] if name == "write" else [])]:
                with tempfile.TemporaryDirectory() as folder:
                    files = Files(Path(folder))
                    before = content(folder)
                    with mock.patch.object(writing, "os", SystemCalls(fault_at(place, code))):
                        try:
                            files.write(kind)
                            found["made"] += 1
                            assert code == 0 or name in ("fchown", "fchmod"), f"{name} failed in vain"
                        except OSError as error:
                            found["refused"] += 1
                            check_refused(error, files, before)
                    truth.check(files.load().training)
                    check_next_write(files, kind, truth)

    arguments.count = len(KINDS)
    campaign.run_cases(arguments, case)
    print(
        f"disks faults: {sum(found.values())} failing system calls, {found['refused']} calls refused, {found['made']} made"
    )


class Disk:
    """What is certain to be on the disk. Data that was not synced, and names in directories that were not, may be lost."""

    def __init__(self, folder):
        self.folder, self.paths = folder, {}  # of file descriptors
        self.unsynced = set()  # files whose data may be lost
        self.renamed = {}  # what was at a path whose new name may be lost
        self.moments = []  # (files, unsynced, renamed) before each call

    def instead(self, name, real, arguments):
        self.moments.append((content(self.folder), set(self.unsynced), dict(self.renamed)))
        before = content(self.folder)
        result = real(*arguments)
        if name == "open":
            self.paths[result] = Path(arguments[0])
        elif name in ("write", "ftruncate"):
            self.unsynced.add(self.paths[arguments[0]].name)
        elif name == "fsync":
            path = self.paths[arguments[0]]
            self.renamed = {} if path.is_dir() else self.renamed
            self.unsynced.discard(path.name)
        elif name == "replace":
            source, target = (Path(path).name for path in arguments)
            self.renamed.setdefault(target, before.get(target))
            if source in self.unsynced:
                self.unsynced.add(target)
        return result

    @property
    def may_have(self):
        """The contents of the folder after a power cut at each moment."""
        for files, unsynced, renamed in self.moments:
            for keeps_names in (True, False):
                for keeps_data in (True, False):
                    left = dict(files)
                    if not keeps_data:
                        left.update({name: b"\0" * len(files[name]) for name in unsynced if name in files})
                    if not keeps_names:
                        left.update(renamed)
                    yield {name: data for name, data in left.items() if data is not None}


def power(arguments):
    truth, found = Truth(), Counter()

    def case(index, _rng):
        kind = KINDS[index]
        with tempfile.TemporaryDirectory() as folder:
            files = Files(Path(folder))
            begun = files.training.time
            drive = Disk(files.folder)
            with mock.patch.object(writing, "os", SystemCalls(drive.instead)):
                files.write(kind)
            assert not drive.renamed, "a call that had returned is lost by a power cut"
        for left in drive.may_have:
            with tempfile.TemporaryDirectory() as folder:
                for name, data in left.items():
                    (Path(folder) / name).write_bytes(data)
                again = Files(Path(folder), files.training).load().training
                assert begun <= again.time <= begun + STEPS[kind]
                truth.check(again)
                found["disks"] += 1
        found["moments"] += len(drive.moments)

    arguments.count = len(KINDS)
    campaign.run_cases(arguments, case)
    print(f"disks power: at {found['moments']} moments, {found['disks']} states of the disk, all with a whole training")


def main():
    campaign.run_one(__doc__, {"full": full, "faults": faults, "power": power}, count=200)


if __name__ == "__main__":
    main()
