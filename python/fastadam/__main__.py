"""``python -m fastadam``: what a bug report needs. ``python -m fastadam demo``: train a network or word vectors."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastadam import __version__, demo, show_config
from fastadam.demo import embedding


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastadam", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command")
    demo_parser = commands.add_parser("demo", help="train a small NumPy network on handwritten digits")
    demo_parser.add_argument("--curve", type=Path, default=Path("loss.png"), help="where the loss curve is written")
    demo_parser.add_argument(
        "--embedding", action="store_true", help="train word vectors instead, with deferred and with dense tables"
    )
    demo_parser.add_argument("--steps", type=int, help=f"steps for the word vectors, default {embedding.STEPS}")
    chosen = parser.parse_args(arguments)
    if chosen.command == "demo":
        _demo(demo_parser, chosen)
    else:
        show_config()


def _demo(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    if chosen.steps is not None and not (chosen.embedding and chosen.steps > 0):
        parser.error(f"--steps {chosen.steps}: expected a positive number, with --embedding")
    if chosen.embedding:
        embedding.main(chosen.curve, chosen.steps or embedding.STEPS)
    else:
        demo.main(chosen.curve)


if __name__ == "__main__":
    main()
