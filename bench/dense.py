"""One float32 array from 1e3 to 1e9 bytes of traffic: how near to the traffic floor, against torch fused and NumPy.

python bench/dense.py [--turns N]        needs torch (CPU) and a C++ compiler for the floor
"""

from __future__ import annotations

import argparse

from common import BYTES_PER_ELEMENT, compare, write_json

CONTENDERS = ["floor", "fastadam_kernel", "fastadam_apply", "torch_kernel", "torch_step", "numpy_plain"]
SIZES = [36, 357, 3571, 2**15, 357143, 3571429, 2**25, 35714286]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    arguments = parser.parse_args()
    rows = []
    print(f"{'elements':>10} {'':>8}" + "".join(f"{name:>17}" for name in CONTENDERS))
    for size in arguments.sizes:
        times = compare(CONTENDERS, [size], arguments.turns)
        rates = {name: size * BYTES_PER_ELEMENT / t / 1e9 for name, t in times.items()}
        over_floor = {name: t / times["floor"] for name, t in times.items()}
        rows.append({"elements": size, "seconds": times, "GB/s": rates, "times the floor": over_floor})
        print(f"{size:>10} {'us':>8}" + "".join(f"{times[name] * 1e6:>17.2f}" for name in CONTENDERS))
        print(f"{'':>10} {'GB/s':>8}" + "".join(f"{rates[name]:>17.2f}" for name in CONTENDERS))
        print(f"{'':>10} {'/floor':>8}" + "".join(f"{over_floor[name]:>17.2f}" for name in CONTENDERS), flush=True)
    if arguments.sizes == SIZES:
        write_json("dense", rows)


if __name__ == "__main__":
    main()
