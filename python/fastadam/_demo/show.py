"""What both demos show a person: progress bars and a picture."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
COLOURS = ("#0b6e99", "#d1495b", "#8d99a6")  # ours, the other, what lies behind


class PictureError(ValueError):
    """A path that no picture can be written to."""


def progress(numbers: range, show: bool, label: str, unit: str) -> Iterable[int]:
    """``numbers``, with a bar if there is tqdm."""
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
    """Whether a picture can be drawn; what matplotlib logs about its caches is not for users of the demo."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def check_picture(path: Path | None) -> Path | None:
    """Where the picture will be written, found to be writable before any work is done.

    Args:
        path: What the user asked for; None is ``DEFAULT_PICTURE``, and no picture if matplotlib is missing.

    Raises:
        PictureError: With the whole message.
    """
    if not _has_matplotlib():
        if path is not None:
            raise PictureError(f"{path}: matplotlib is not installed, which draws it (pip install matplotlib)")
        return None
    place = path if path is not None else _default_place()
    known = sorted(figure().canvas.get_supported_filetypes())
    if place.is_dir():
        raise PictureError(f"{place}: a directory, expected a file such as {place / DEFAULT_PICTURE}")
    if place.suffix.lower().removeprefix(".") not in known:
        expected = ", ".join(f".{name}" for name in known)
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
    """In the working directory, or with temporary files where that cannot be written to."""
    here = DEFAULT_PICTURE if os.access(os.curdir, os.W_OK) else Path(tempfile.gettempdir()) / DEFAULT_PICTURE
    return here if not here.is_dir() else Path(tempfile.mkdtemp()) / DEFAULT_PICTURE


def figure(width: float = 9.0, height: float = 3.6) -> Any:
    """An empty figure, which no window and no notebook knows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any, **texts: str) -> None:
    """Labels, a light grid, no box."""
    axes.set(**texts)
    axes.grid(color="#e3e6e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: Sequence[float], window: int) -> Any:
    """The mean of each value and up to ``window // 2`` on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def write_picture(drawn: Any, path: Path) -> str:
    """Save the figure; a line that says where, or why not."""
    try:
        drawn.savefig(path, dpi=120)
    except OSError as error:  # a disk that filled up since the check
        return f"picture            not written: {path} ({error.strerror})"
    return f"picture            {path}"
