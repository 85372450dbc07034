"""``python -m fastadam``, or ``fastadam``: print the facts for a bug report.

With ``demo``: train a small model. With ``memory``: the bytes that training needs, for each choice of formats.
For C and C++ programs: ``cc program.c $(python -m fastadam --include) $(python -m fastadam --libs)``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastadam import __version__, memory, show_config
from fastadam._core.memory import BANDWIDTH, BITS
from fastadam._core.native.backend import _cpu
from fastadam._demo import digits, embedding
from fastadam._demo.show import DEFAULT_PICTURE, PictureError, check_picture

_PACKAGE = Path(_cpu.__file__ or "").parent
_LIBRARY = _PACKAGE / "lib"
# Options that print a path, for the build of C and C++ programs.
_PATHS = {
    "--include": (f"-I{_PACKAGE / 'include'}", "compiler flags for fastadam.h"),
    "--libs": (f"-L{_LIBRARY} -lfastadam -Wl,-rpath,{_LIBRARY}", "linker flags"),
    "--library": (str(next(_LIBRARY.glob("libfastadam.*"), _LIBRARY)), "the shared library"),
    "--cmake-dir": (str(_LIBRARY / "cmake" / "fastadam"), "fastadam_DIR for find_package(fastadam CONFIG)"),
    "--pkgconfig-dir": (str(_LIBRARY / "pkgconfig"), "a folder for PKG_CONFIG_PATH"),
}


class _Parser(argparse.ArgumentParser):
    """The parser of the program and of each command: each refuses unknown arguments with its own usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    program = "fastadam" if Path(sys.argv[0]).stem == "fastadam" else "python -m fastadam"
    parser = _Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=__version__)
    for option, (text, what) in _PATHS.items():
        parser.add_argument(option, dest="paths", action="append_const", const=text, help=f"print {what}")
    commands = parser.add_subparsers(dest="command")
    what = "train a small NumPy network on handwritten digits, beside Adam in plain NumPy"
    demo = commands.add_parser("demo", help=what, description=what)
    demo.add_argument("--curve", type=Path, metavar="FILE", help=f"picture to write, default {DEFAULT_PICTURE}")
    demo.add_argument(
        "--embedding", action="store_true", help="train a text classifier instead, with a deferred and a dense table"
    )
    demo.add_argument("--steps", type=int, metavar="N", help=f"with --embedding: default {embedding.STEPS}")
    table = _add_memory(commands)
    options = parser.parse_args(arguments)
    if options.paths:
        if options.command is not None:
            parser.error("options that print a path cannot be used with a command")
        print(" ".join(options.paths))
        return
    if options.command is None:
        show_config()
        return
    if options.command == "memory":
        _print_memory(table, options)
        return
    try:
        _run_demo(demo, options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def _add_memory(commands: Any) -> argparse.ArgumentParser:
    what = "print the bytes that are held and moved per parameter, for each choice of formats"
    table: argparse.ArgumentParser = commands.add_parser("memory", help=what, description=what)
    table.add_argument("--parameters", type=float, required=True, metavar="N", help="such as 7e9")
    table.add_argument("--gradients", choices=BITS, help="default: as the parameters")
    table.add_argument("--amsgrad", action="store_true", help="with the maximum of the second moments")
    table.add_argument("--ema", action="store_true", help="with a moving average of the parameters")
    what = f"bytes per second to and from memory, for the time of a step; default {BANDWIDTH:g}, two channels of DDR4"
    table.add_argument("--bandwidth", type=float, default=BANDWIDTH, metavar="B", help=what)
    return table


def _print_memory(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not (1 <= options.parameters < 2**62 and options.parameters == int(options.parameters)):
        parser.error(f"--parameters {options.parameters:g}: expected a whole number of at least 1 and below 2**62")
    if not 0 < options.bandwidth < float("inf"):
        parser.error(f"--bandwidth {options.bandwidth:g}: expected a positive number")
    choices = {"gradients": options.gradients, "amsgrad": options.amsgrad, "use_ema": options.ema}
    print(memory(int(options.parameters), bandwidth=options.bandwidth, **choices))


def _run_demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.steps is not None and not (options.embedding and options.steps > 0):
        parser.error(f"--steps {options.steps}: expected a positive number, with --embedding")
    try:
        picture = check_picture(options.curve)
    except PictureError as error:
        parser.error(f"--curve {error}")
    if not options.embedding:
        digits.main(picture)
        return
    try:
        corpus = embedding.load_corpus()
    except FileNotFoundError as error:
        parser.error(f"--embedding {error}")
    embedding.main(corpus, picture, options.steps or embedding.STEPS)


if __name__ == "__main__":
    main()
