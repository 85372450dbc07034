"""Files that are replaced completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

__all__ = ["NewFile", "replace_whole", "require_regular"]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NewFile:
    """A file that is being written, in any order; what is left out is zero, and takes no room on most file systems."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset."""
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        rest = memoryview(data)
        while rest:  # a write may be short: the disk is full, or more than 2 GiB are left
            rest = rest[os.write(self._descriptor, rest) :]


def replace_whole(path: str, size: int, write: Callable[[NewFile], None]) -> None:
    """Let ``write`` fill a temporary file, sync it to the disk and rename it: ``path`` is the old file or the new one.

    The file has ``size`` bytes. Bytes that are not written are zero.

    A symbolic link stays, and the file that it points to is replaced. The new file has the mode of the old one and,
    where the process may set them, its owner and group. Other hard links to the old file keep the old file.

    Raises:
        OSError: The file was not written, and the old one is there; it is not a regular file, or cannot be written to.
            Or the file is in place, but its directory could not be synced, which the message says.
    """
    try:
        old = _existing(path)
        target = _without_links(path)
        temporary = target.parent / f".fastadam-{secrets.token_hex(8)}.tmp"
        try:
            _write(temporary, size, write, old)
            os.replace(temporary, target)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise OSError(error.errno, f"not saved: {error.strerror}", path) from error
    try:
        _sync_directory(target.parent)
    except OSError as error:
        message = f"saved, but its directory could not be synced to the disk: {error.strerror}"
        raise OSError(error.errno, message, path) from error


def require_regular(path: str) -> None:
    """Raise the OSError of a path without a file to read: opening a FIFO would wait, a device never ends."""
    kind = stat.S_IFMT(os.stat(path).st_mode)  # noqa: PTH116
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'a special file')}, expected a regular file", path)


def _existing(path: str) -> os.stat_result | None:
    """The file that is to be replaced, if there is one."""
    try:
        require_regular(path)
    except FileNotFoundError:
        if path.endswith((os.sep, f"{os.sep}.", f"{os.sep}..")):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
        return None
    if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)} (the file is read-only)")
    return os.stat(path)  # noqa: PTH116


def _without_links(path: str) -> Path:
    """The file that a path means, once it is known that its symbolic links end somewhere."""
    target = Path(path)
    while target.is_symlink():
        target = target.parent / target.readlink()
    return target


def _write(path: Path, size: int, write: Callable[[NewFile], None], old: os.stat_result | None) -> None:
    """Write a new file that takes the place of ``old``, and is never readable to more people."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(path, flags, 0o666 if old is None else 0o600)
    except PermissionError as error:
        raise PermissionError(error.errno, f"{error.strerror} (no new file can be made in its directory)") from error
    try:
        if old is not None and hasattr(os, "fchown"):
            _adopt_mode(file, old)
        write(NewFile(file))
        os.ftruncate(file, size)  # it may end in zeros
        os.fsync(file)
    finally:
        os.close(file)


def _adopt_mode(file: int, old: os.stat_result) -> None:
    """Give a file the owner, group and mode of another, as far as the process may."""
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
        with contextlib.suppress(OSError):
            os.fchown(file, owner, group)
    same_group = os.fstat(file).st_gid == old.st_gid
    with contextlib.suppress(OSError):  # some file systems have no modes
        os.fchmod(file, stat.S_IMODE(old.st_mode) & (0o777 if same_group else 0o707))


def _sync_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return  # it may be written to, but not read: after a power cut the old file may be there
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no directories
            raise
    finally:
        os.close(descriptor)
