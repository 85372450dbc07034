"""Progress bars and pictures of the demos."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DEFAULT_PICTURE",
    "PictureError",
    "check_picture",
    "figure",
    "progress",
    "smooth",
    "tidy",
    "write_picture",
]

DEFAULT_PICTURE = Path("loss.png")
COLOURS = ("#0b6e99", "#d1495b", "#8d99a6")  # fastadam, the peer, the background


class PictureError(ValueError):
    """A path that no picture can be written to."""


def progress(numbers: range, show: bool, label: str, unit: str) -> Iterable[int]:
    """Iterate over ``numbers``, with a progress bar if tqdm is installed."""
    if not show:
        return numbers
    try:
        from tqdm.auto import tqdm
    except ImportError:
        print(f"{label}: {len(numbers)} {unit}s (pip install tqdm for a progress bar)")
        return numbers
    bar: Iterable[int] = tqdm(numbers, desc=label, unit=unit)
    return bar


def _has_matplotlib() -> bool:
    """Whether matplotlib is installed. Its log messages about caches are switched off."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def check_picture(path: Path | None) -> Path | None:
    """Check that the picture can be written, before any work is done, and return its absolute path.

    Args:
        path: The path that the user asked for. None means ``DEFAULT_PICTURE``, or no picture without matplotlib.

    Raises:
        PictureError: The picture cannot be written; the message is complete.
    """
    if not _has_matplotlib():
        if path is not None:
            raise PictureError(f"{path}: matplotlib is not installed (pip install matplotlib)")
        return None
    place = path if path is not None else _default_place()
    file_types = sorted(figure().canvas.get_supported_filetypes())
    if place.is_dir():
        raise PictureError(f"{place}: a directory, expected a file such as {place / DEFAULT_PICTURE}")
    if place.suffix.lower().removeprefix(".") not in file_types:
        expected = ", ".join(f".{name}" for name in file_types)
        raise PictureError(f"{place}: suffix {place.suffix!r}, expected one of {expected}")
    is_new = not place.exists()
    try:
        with place.open("ab"):
            pass
        if is_new:
            place.unlink()
    except OSError as error:
        raise PictureError(f"{place}: cannot be written ({error.strerror})") from None
    return place.resolve()


def _default_place() -> Path:
    """A path in the working directory, or in the directory of temporary files if that is not writable."""
    here = DEFAULT_PICTURE if os.access(os.curdir, os.W_OK) else Path(tempfile.gettempdir()) / DEFAULT_PICTURE
    return here if not here.is_dir() else Path(tempfile.mkdtemp()) / DEFAULT_PICTURE


def figure(width: float = 9.0, height: float = 3.6) -> Figure:
    """An empty figure that no window or notebook shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes, **texts: str) -> None:
    """Set labels, draw a light grid, remove the box."""
    axes.set(**texts)
    axes.grid(color="#e3e6e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """The mean of each value and up to ``window // 2`` values on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    means: npt.NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def write_picture(picture: Figure, path: Path) -> str:
    """Save the figure; return a line that says where, or why it was not saved."""
    try:
        picture.savefig(path, dpi=120)
    except OSError as error:  # a disk that filled up since the check
        return f"picture            not written: {path} ({error.strerror})"
    return f"picture            {path}"
