"""A base and the deltas after it, read as one file: what the last of them says, and for each tensor who has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from fastadam._core.common.types import Config, HostArray
from fastadam._core.deferred.chain import Link
from fastadam._core.native.chunks import Bytes
from fastadam._core.saving.changed_rows import ChangedRows
from fastadam._core.saving.file_checks import check_file, specs_of
from fastadam._core.saving.file_format import ALPHAS, HAD, KEEPS, ROWS, VALUE, Tensor
from fastadam._core.saving.saved_file import SavedFile
from fastadam._core.state.entry import Spec

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SavedChain"]

_OF_ROWS = (ROWS, HAD, ALPHAS, KEEPS)


class SavedChain:
    """Like a :class:`SavedFile`. Tables of which a delta has some rows are in ``tables``, by their indices.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is damaged, or not the one that follows the one before it. The message names it.
    """

    def __init__(self, path: str, deltas: Sequence[str] = ()) -> None:
        self.path = path
        base = SavedFile(path)
        self._opened = [base]
        self._files = [base]
        self._last = base
        try:
            base.require(base.previous is None, "a delta", "a file of save(values=True), and this one in deltas=")
            for k, delta in enumerate(deltas):
                file = SavedFile(delta, f"deltas[{k}]: {delta}")
                self._opened.append(file)
                self._require_next(file)
                self._files.append(file)
            for file in self._files:
                if file.link is not None:
                    check_file(file)
            self._last = self._files[-1]
            self.header: Config = self._last.header
            self.checksums = {
                key: checksum for key, checksum in self._last.checksums.items() if not key.startswith(_OF_ROWS)
            }
            self.tables = self._read_tables()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._opened:
            file.close()

    # ---- the chain -------------------------------------------------------------------------------------------------

    @property
    def link(self) -> Link | None:
        """The last file."""
        return self._last.link

    @property
    def specs(self) -> list[Spec]:
        """The variables."""
        return specs_of(self._last)

    @property
    def positions(self) -> list[int]:
        """For each variable the steps from the base to the last file."""
        positions: list[int] = self.header["positions"]
        return positions

    def _require_next(self, file: SavedFile) -> None:
        """Raise unless this is the delta that follows the files so far."""
        before, there = self._files[-1].link, file.link
        if before is None:
            self._files[0].fail("a file without the values of the variables", "one of save(values=True), or no deltas")
        if there is None or file.previous is None:
            file.fail("not a delta", "a file of save_delta")
        what, due = f"delta {there.number}", f"delta {before.number + 1}"
        file.require(there.base == before.base, "a delta of another base", f"one that follows {self.path}")
        file.require(all(there != earlier.link for earlier in self._files), f"{what} once more", due)
        is_twin = there.number == before.number and file.previous == self._files[-1].previous
        file.require(
            not is_twin,
            f"{what} like {self._files[-1].label}",
            "one of the two: the later one, if the call of save_delta that wrote the earlier one has failed",
        )
        is_old = there.number <= before.number
        file.require(not is_old, f"{what}, which is older than what comes before it", due)
        last = f"delta {before.number}" if before.number else "the base"
        file.require(there.number == before.number + 1, f"{what} right after {last}", due)
        file.require(
            file.previous == before.id,
            f"{what}, which follows another file than {self._files[-1].label}",
            "the one that follows it",
        )

    def _read_tables(self) -> dict[int, ChangedRows]:
        count = len(self.header["variables"])
        for file in self._files if len(self._files) > 1 else []:
            shapes = [[spec[:3] for spec in specs_of(each)] for each in (self._files[0], file)]
            file.require(shapes[0] == shapes[1], "other variables", f"those of {self.path}")
        found = {}
        for i in range(count):
            whole = max((k for k, file in enumerate(self._files) if not file.has_rows_of(i)), default=0)
            if whole < len(self._files) - 1:
                found[i] = ChangedRows(i, self._files[whole], self._files[whole + 1 :])
        return found

    # ---- as a file -------------------------------------------------------------------------------------------------

    def check_tensor(self, key: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise unless a tensor has this shape, and this dtype in the words of safetensors."""
        table = self._table_of(key)
        if table is None:
            self._last.check_tensor(key, shape, dtype)
        else:
            table.check_tensor(key, shape, dtype)

    def check_checksums(self) -> None:
        """Raise if a tensor of any file is not as it was written, or rows of a table make no sense."""
        for file in self._files:
            for key in file.checksums:
                file.check_checksum(key)
        for table in self.tables.values():
            table.check()

    def check_checksum(self, key: str) -> None:
        """Raise if a tensor of the last file is not as it was written."""
        self._last.check_checksum(key)

    def tensor(self, key: str) -> HostArray:
        """All of a tensor that the last file has."""
        return self._last.tensor(key)

    def reader_of(self, key: str) -> Callable[[int], Bytes]:
        """A function that returns the next bytes of a tensor that the last file has."""
        return self._last.reader_of(key)

    def pieces(self, key: str) -> Iterator[Bytes]:
        """The bytes of a tensor that the last file has."""
        return self._last.pieces(key)

    def tensor_of(self, key: str) -> Tensor:
        """What a tensor consists of."""
        tensor, table = self._last.tensor_of(key), self._table_of(key)
        return tensor if table is None else table.tensor_of(key)

    def _table_of(self, key: str) -> ChangedRows | None:
        index = key.removeprefix(VALUE) if key.startswith(VALUE) else key.partition("/")[0]
        return self.tables.get(int(index)) if index.isdigit() and len(index) < 10 else None

    def require(self, condition: bool, actual: str, expected: str) -> None:
        """Raise unless the condition holds."""
        self._last.require(condition, actual, expected)

    def fail(self, actual: str, expected: str) -> NoReturn:
        """Raise what is wrong with the last file."""
        self._last.fail(actual, expected)
