"""What clipping costs: a list of tensors with and without, as ratios of the plain step in the same run.

    python bench/clip.py [--turns N]

The norm needs one more read of the gradients: 32 bytes per element instead of 28.
"""

from __future__ import annotations

import argparse

from common import Worker, take_turns, write_json

OPTIONS = {
    "plain": {},
    "clipvalue": {"clipvalue": 1.0},
    "clipnorm": {"clipnorm": 1.0},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "weight_decay": {"weight_decay": 0.01},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--size", type=int, default=34_000_000)
    arguments = parser.parse_args()
    workers = []
    for name, options in OPTIONS.items():
        worker = Worker("fastadam_apply", [arguments.size], **options)
        worker.name = name
        workers.append(worker)
    try:
        times = take_turns(workers, arguments.turns)
    finally:
        for worker in workers:
            worker.close()
    ratios = {name: t / times["plain"] for name, t in times.items()}
    for name, t in times.items():
        print(f"{name:<18}{t * 1e3:8.2f} ms {ratios[name]:6.2f} times the plain step")
    write_json("clip", [{"elements": arguments.size, "seconds": times, "times the plain step": ratios}])


if __name__ == "__main__":
    main()
