"""Writing a safetensors file in one pass over its tensors: the header, which has their checksums, is written last."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping

from fastadam._core.common.files import NewFile, replace_whole
from fastadam._core.common.types import Config
from fastadam._core.native.chunks import Bytes, runs
from fastadam._core.saving.file_format import MAX_HEADER, Tensor

__all__ = ["TensorFile", "write_tensors"]

_WIDEST = 2**32 - 1  # no checksum has more digits
_LARGE = 2**20  # bytes from which tensors begin at a page of the file, so that pages of zeros can be holes


class TensorFile:
    """Takes the bytes of the tensors, each from its beginning to its end, one after the other or in turns."""

    def __init__(self, file: NewFile, begin: int, tensors: Mapping[str, Tensor]) -> None:
        self._file = file
        self._places: dict[str, int] = {}
        self.checksums = dict.fromkeys(tensors, 0)
        for key, tensor in tensors.items():
            self._places[key] = begin
            begin += tensor.nbytes

    def append(self, key: str, piece: Bytes) -> None:
        """Add bytes to a tensor; pages of zeros are left out of the file."""
        self.checksums[key] = zlib.crc32(piece.data, self.checksums[key])
        for begin, end in runs(piece, self._places[key]):
            self._file.write(self._places[key] + begin, piece[begin:end].data)
        self._places[key] += len(piece)


def write_tensors(
    path: str,
    tensors: Mapping[str, Tensor],
    text_of: Callable[[Mapping[str, int]], str],
    fill: Callable[[TensorFile], None],
) -> None:
    """Replace a file by one with these tensors; see ``replace_whole``.

    Args:
        path: The file.
        tensors: By their names, in their order.
        text_of: The description, from the checksums of all tensors.
        fill: Appends all bytes of all tensors.

    Raises:
        ValueError: They are too many for one file.
    """
    widest = dict.fromkeys(tensors, _WIDEST)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    room = len(_header(tensors, text_of(widest), _WIDEST))
    room += -(8 + room) % (4096 if nbytes >= _LARGE else 8)
    if room > MAX_HEADER:
        raise ValueError(
            f"variables: a header of {room} bytes for {len(tensors)} tensors, expected at most {MAX_HEADER} (save some "
            "of the variables in another file)"
        )

    def write(file: NewFile) -> None:
        content = TensorFile(file, 8 + room, tensors)
        fill(content)
        text = text_of(content.checksums)
        header = _header(tensors, text, zlib.crc32(text.encode()))
        file.write(0, room.to_bytes(8, "little") + header.ljust(room))

    replace_whole(path, 8 + room + nbytes, write)


def _header(tensors: Mapping[str, Tensor], text: str, checksum: int) -> bytes:
    header: Config = {"__metadata__": {"fastadam": text, "fastadam_crc32": str(checksum)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    return json.dumps(header).encode()
