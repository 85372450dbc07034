"""A base and its deltas written as one file."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastadam._core.native.chunks import bytes_of
from fastadam._core.saving.description import text_of
from fastadam._core.saving.file_format import check_paths, path_of
from fastadam._core.saving.saved_chain import SavedChain
from fastadam._core.saving.tensor_file import TensorFile, write_tensors
from fastadam._core.saving.writer import check_target

__all__ = ["merge_deltas"]


def merge_deltas(
    base: str | os.PathLike[str], deltas: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]
) -> None:
    """Write a base and its deltas as one base, which the next delta of the same training can follow.

    The file holds what :meth:`Adam.load` would make of them, every row up to date. Neither the variables nor the
    optimizer are needed, and no more than some pieces of the files are in memory at a time.

    Args:
        base: A file of ``save(values=True)``, or one that this function wrote.
        deltas: The files of ``save_delta`` that follow it, in their order.
        path: The file to write, replaced if it exists: completely or not at all. It may be ``base``.

    Raises:
        OSError: A file cannot be read, or the new one not be written.
        ValueError: A file is damaged, or is not the one that follows the one before it; nothing is written.

    >>> import tempfile, numpy as np, fastadam
    >>> folder = tempfile.mkdtemp()
    >>> table = np.ones((1000, 2), np.float32)
    >>> opt = fastadam.Adam(0.1, sparse_update="deferred")
    >>> opt.build([table])
    >>> opt.save(f"{folder}/base", values=True)
    >>> step = opt.apply_gradients([(fastadam.IndexedSlices([[0.5, 0.5]], [7]), table)])
    >>> opt.save_delta(f"{folder}/delta")
    >>> fastadam.merge_deltas(f"{folder}/base", [f"{folder}/delta"], f"{folder}/new")
    >>> again = np.zeros((1000, 2), np.float32)
    >>> loaded = fastadam.Adam.load(f"{folder}/new", [again])
    >>> again[[6, 7]].round(3).tolist()
    [[1.0, 1.0], [0.8999999761581421, 0.8999999761581421]]
    """
    name, target = path_of(base, "base"), check_target(path)
    with SavedChain(name, check_paths("deltas", deltas)) as saved:
        link = saved.link
        if link is None:
            saved.fail("a file without the values of the variables", "one of save(values=True)")
        saved.check_checksums()
        description = {
            **{key: value for key, value in saved.header.items() if key not in ("weights", "tables")},
            "chain": {**link._asdict(), "previous": None},
        }
        tensors = {key: saved.tensor_of(key) for key in saved.checksums}
        of_tables = {key for table in saved.tables.values() for key in table.keys}

        def fill(file: TensorFile) -> None:
            for key in tensors:
                for piece in saved.pieces(key) if key not in of_tables else ():
                    file.append(key, piece)
            for table in saved.tables.values():
                for _, arrays in table.blocks():
                    for key, rows in arrays.items():
                        file.append(key, bytes_of(rows)(rows.nbytes))

        write_tensors(target, tensors, lambda checksums: text_of(description, checksums, name), fill)
