"""``python -m fastadam``: what a bug report needs. ``python -m fastadam demo``: train a small network."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastadam import __version__, demo, show_config


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastadam", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command")
    demo_parser = commands.add_parser("demo", help="train a small NumPy network on handwritten digits")
    demo_parser.add_argument("--curve", type=Path, default=Path("loss.png"), help="where the loss curve is written")
    chosen = parser.parse_args(arguments)
    if chosen.command == "demo":
        demo.main(chosen.curve)
    else:
        show_config()


if __name__ == "__main__":
    main()
