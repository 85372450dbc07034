"""Our adapters beside the optimizers of the frameworks that they are for: PyTorch, JAX, Keras 3.

    python bench/adapters.py [--turns N] [--only WORD ...]

The rules are those of bench/compare.py. bench/results/adapters.json has the last figures of every case.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import Worker, ratio, read_json, take_turns, write_json
from models import resnet50

TABLE = [1_000_000, 64, 4096]  # rows, width, ids of a step
LISTS = {"64": [64], "32768": [2**15], "33554432": [2**25], "1000 x 64": [64] * 1000, "ResNet-50": resnet50()}
# name: (contender, its options); the first is ours, the others are its peers.
DENSE: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "torch": {
        "fastadam.torch.Adam": ("adapter_contenders.torch", {}),
        "torch.optim.Adam(fused=True)": ("dense_contenders.torch", {}),
        "DeepSpeedCPUAdam": ("dense_contenders.deepspeed", {}),
        "torch.optim.Optimizer that does nothing": ("adapter_contenders.torch_nothing", {}),
    },
    "jax": {
        "fastadam.jax.fused_update": ("adapter_contenders.jax", {}),
        "optax.adam, jit, donated": ("dense_contenders.optax", {}),
    },
    **{
        f"keras on {backend}": {
            "fastadam.keras.Adam": ("adapter_contenders.keras", {"backend": backend, "ours": True}),
            "keras.optimizers.Adam": ("adapter_contenders.keras", {"backend": backend, "ours": False}),
        }
        for backend in ("torch", "jax", "numpy")
    },
}
HALF: dict[str, tuple[str, dict[str, Any]]] = {
    "fastadam.torch.Adam": ("adapter_contenders.torch", {"dtype": "bfloat16"}),
    "torch.optim.Adam(fused=True)": ("dense_contenders.torch", {"dtype": "bfloat16"}),
    "fastadam.torch.Adam, float32 moments": ("adapter_contenders.torch", {"dtype": "bfloat16", "moments": "float32"}),
    "DeepSpeedCPUAdam, float32 moments": ("dense_contenders.deepspeed", {"dtype": "bfloat16"}),
}
TABLES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "torch": {
        "fastadam.torch.Adam lazy": ("adapter_contenders.torch_table", {"mode": "lazy"}),
        "torch.optim.SparseAdam": ("table_contenders.torch", {}),
        "fastadam.torch.Adam deferred": ("adapter_contenders.torch_table", {"mode": "deferred"}),
        "fastadam.torch.Adam dense": ("adapter_contenders.torch_table", {"mode": "dense"}),
    },
    "jax": {
        "fastadam.jax.sparse_update lazy": ("adapter_contenders.jax_table", {"mode": "lazy"}),
        "optax.adam of a dense gradient": ("adapter_contenders.optax_table", {}),
        "fastadam.jax.sparse_update dense": ("adapter_contenders.jax_table", {"mode": "dense"}),
    },
}


def apart(function: str, **options: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Hundreds of optimizers, each of one parameter."""
    return {
        "fastadam.torch.Adam": (f"adapter_contenders.{function}", {"ours": True, **options}),
        "torch.optim.Adam(fused=True)": (f"adapter_contenders.{function}", {"ours": False, **options}),
    }


def cases() -> dict[str, tuple[list[int], dict[str, tuple[str, dict[str, Any]]]]]:
    """By name: the sizes, and the contenders."""
    dense = {f"{framework}: {name}": (sizes, of) for framework, of in DENSE.items() for name, sizes in LISTS.items()}
    halves = {f"torch: {size} bfloat16": ([size], HALF) for size in (2**15, 2**25)}
    many = {f"torch: 1000 optimizers of {size}": ([size] * 1000, apart("torch_apart")) for size in (64, 4096)}
    many |= {
        f"torch: 1000 optimizers of {size} bfloat16": ([size] * 1000, apart("torch_apart", dtype="bfloat16"))
        for size in (64, 4096)
    }
    many |= {
        f"torch: 1000 optimizers of 64, {what}": ([64] * 1000, apart("torch_made", steps=steps))
        for steps, what in enumerate(("made", "and a first step", "and a second step"))
    }
    tables = {f"{framework}: table": (TABLE, of) for framework, of in TABLES.items()}
    return {**dense, **halves, **many, **tables}


def measure(name: str, sizes: list[int], contenders: dict[str, tuple[str, dict[str, Any]]], turns: int) -> dict:
    """Seconds of a step of each, and the ratio of ours to it."""
    workers = []
    try:
        for label, (function, options) in contenders.items():
            try:
                worker = Worker(function, sizes, **options)
            except RuntimeError as error:
                print(f"{name}: {label}: {error}")
                continue
            worker.name = label
            workers.append(worker)
        seconds = take_turns(workers, turns)
        return {
            "case": name,
            "seconds": seconds,
            "of ours": {worker.name: ratio(workers[0], worker) for worker in workers},
        }
    finally:
        for worker in workers:
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--only", nargs="+", help="cases whose names have one of these words")
    chosen = parser.parse_args()
    rows = {row["case"]: row for row in read_json("adapters")}
    for name, (sizes, contenders) in cases().items():
        if chosen.only and not any(word in name for word in chosen.only):
            continue
        rows[name] = measure(name, sizes, contenders, chosen.turns)
        for label, seconds in rows[name]["seconds"].items():
            print(f"{name:<28}{label:<38}{seconds * 1e6:>12.1f} us{rows[name]['of ours'][label]:>8.2f}", flush=True)
        write_json("adapters", [rows[known] for known in cases() if known in rows])


if __name__ == "__main__":
    main()
