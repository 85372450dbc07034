"""``python -m fastadam``: what a bug report needs. ``python -m fastadam demo``: train a network or word vectors.

For C and C++ programs: ``cc program.c $(python -m fastadam --include) $(python -m fastadam --libs)``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastadam import __version__, _demo, show_config
from fastadam._core.backend import _cpu
from fastadam._demo import embedding

_PACKAGE = Path(_cpu.__file__ or "").parent
_LIBRARY = _PACKAGE / "lib"
# What a build of a C or C++ program asks for.
_PATHS = {
    "--include": (f"-I{_PACKAGE / 'include'}", "compiler flags for fastadam.h"),
    "--libs": (f"-L{_LIBRARY} -lfastadam -Wl,-rpath,{_LIBRARY}", "linker flags"),
    "--library": (str(next(_LIBRARY.glob("libfastadam.*"), _LIBRARY)), "the shared library"),
    "--cmake-dir": (str(_LIBRARY / "cmake" / "fastadam"), "fastadam_DIR for find_package(fastadam CONFIG)"),
    "--pkgconfig-dir": (str(_LIBRARY / "pkgconfig"), "a folder for PKG_CONFIG_PATH"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastadam", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=__version__)
    for option, (text, what) in _PATHS.items():
        parser.add_argument(option, action="version", version=text, help=f"print {what}")
    commands = parser.add_subparsers(dest="command")
    demo_parser = commands.add_parser("demo", help="train a small NumPy network on handwritten digits")
    demo_parser.add_argument("--curve", type=Path, default=Path("loss.png"), help="where the loss curve is written")
    demo_parser.add_argument(
        "--embedding", action="store_true", help="train word vectors instead, with deferred and with dense tables"
    )
    demo_parser.add_argument("--steps", type=int, help=f"steps for the word vectors, default {embedding.STEPS}")
    chosen = parser.parse_args(arguments)
    if chosen.command == "demo":
        _run_demo(demo_parser, chosen)
    else:
        show_config()


def _run_demo(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    if chosen.steps is not None and not (chosen.embedding and chosen.steps > 0):
        parser.error(f"--steps {chosen.steps}: expected a positive number, with --embedding")
    if chosen.embedding:
        embedding.main(chosen.curve, chosen.steps or embedding.STEPS)
    else:
        _demo.main(chosen.curve)


if __name__ == "__main__":
    main()
