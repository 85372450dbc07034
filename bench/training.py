"""What do smaller weights and states cost in the loss? Whole trainings, several seeds, against float32.

    python bench/training.py [--only WORD ...] [--seeds N]

Runs of one seed start from the same float32 weights and see the same batches, so their losses are compared in pairs.
The loss is the loss of data that was not trained on, with the weights that the model computes with. Small moments are
used for every tensor, however small it is, and the run's seed is also the seed of the random rounding.
bench/results/training.json has the last figures, and training.png the differences from float32.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import fastadam.torch
import torch
from common import RESULTS, read_json, write_json
from training_tasks import TASKS, Task


@dataclass(frozen=True)
class Configuration:
    """How weights and state are kept."""

    weights: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)  # of fastadam.torch.AdamW


REFERENCE = "float32"


def _small(weights: torch.dtype, moments: str, **options: Any) -> Configuration:
    return Configuration(weights, {"moments": moments, "float32_for": 0, **options})


CONFIGURATIONS = {  # the first is the reference; gradients have the dtype of the weights
    REFERENCE: Configuration(torch.float32),
    "float32, bfloat16 moments": _small(torch.float32, "bfloat16"),
    "float32, 8-bit moments": _small(torch.float32, "8bit"),
    "bfloat16, float32 masters": Configuration(torch.bfloat16, {"master": "float32"}),
    "split masters, bfloat16 moments": _small(torch.bfloat16, "bfloat16", master="split"),
    "split masters, 8-bit moments": _small(torch.bfloat16, "8bit", master="split"),
    "random rounding, bfloat16 moments": _small(torch.bfloat16, "bfloat16", stochastic_rounding=True),
    "random rounding, 8-bit moments": _small(torch.bfloat16, "8bit", stochastic_rounding=True),
    "bfloat16, float32 moments": Configuration(torch.bfloat16, {"moments": "float32"}),
    "bfloat16 alone": Configuration(torch.bfloat16),
}


@dataclass
class Run:
    """What one training gave."""

    loss: float  # of data that was not trained on
    losses: list[float]  # of each step
    bytes_per_parameter: float  # of weights and state

    @property
    def end(self) -> float:
        """The training loss at the end: the mean of the last tenth of the steps."""
        return statistics.mean(self.losses[-len(self.losses) // 10 :])


def train(task: Task, configuration: Configuration, seed: int) -> Run:
    model = task.make(seed).to(configuration.weights)
    optimizer = fastadam.torch.AdamW(model.parameters(), seed=seed, **configuration.options)
    losses = []
    for step, batch in zip(range(task.steps), task.batches(seed), strict=False):
        optimizer.param_groups[0]["lr"] = task.rate * share_of_rate(step, task.steps)
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    held = [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values() if x.ndim)]
    size = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        loss = model(*task.held_out(seed)).item()
    return Run(loss, losses, sum(tensor.nbytes for tensor in held) / size)


def share_of_rate(step: int, steps: int) -> float:
    """A linear rise in the first twentieth, then half a cosine to zero."""
    rise = steps // 20
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))


def measure(name: str, task: Task, seeds: int) -> list[dict[str, Any]]:
    """A row for each configuration; `above` are the differences from float32 with the same seed."""
    rows: list[dict[str, Any]] = []
    reference: list[Run] = []
    for configuration, how in CONFIGURATIONS.items():
        start = time.perf_counter()
        runs = [train(task, how, seed) for seed in range(seeds)]
        reference = reference or runs
        spread = statistics.stdev(run.loss for run in reference)
        above = [run.loss - other.loss for run, other in zip(runs, reference, strict=True)]
        rows.append(
            {
                "task": name,
                "configuration": configuration,
                "steps": task.steps,
                "bytes per parameter": round(statistics.mean(run.bytes_per_parameter for run in runs), 2),
                "losses": [run.loss for run in runs],
                "loss": statistics.mean(run.loss for run in runs),
                "spread": statistics.stdev(run.loss for run in runs),
                "above": above,
                "error of above": statistics.stdev(above) / math.sqrt(seeds),  # of their mean
                "within spread": abs(statistics.mean(above)) <= spread,
                "training above": [run.end - other.end for run, other in zip(runs, reference, strict=True)],
            }
        )
        show(rows[-1], time.perf_counter() - start)
    return rows


def show(row: dict[str, Any], seconds: float) -> None:
    above = row["above"]
    print(
        f"{row['task']:<8}{row['configuration']:<34}{row['bytes per parameter']:>6.2f} bytes"
        f"{row['loss']:>9.4f} +- {row['spread']:.4f}   above float32 {statistics.mean(above):>8.4f}"
        f" +- {row['error of above']:.4f} ({min(above):.4f} to {max(above):.4f}),"
        f" {'within' if row['within spread'] else 'OUTSIDE'} its spread;"
        f" training {statistics.mean(row['training above']):.4f}{seconds:>7.0f} s",
        flush=True,
    )


def plot(rows: list[dict[str, Any]]) -> None:
    """The differences from float32 of every seed and their means, beside the spread of float32's seeds."""
    from matplotlib import pyplot as plt

    names = [name for name in CONFIGURATIONS if name != REFERENCE]
    figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 3.6), sharey=True, layout="constrained")
    for place, task in zip(axes, TASKS, strict=True):
        mine = {row["configuration"]: row for row in rows if row["task"] == task}
        if REFERENCE in mine:
            spread = mine[REFERENCE]["spread"]
            label = "standard deviation of float32's seeds"
            place.axvspan(-spread, spread, color="black", alpha=0.1, label=label)
        for height, name in enumerate(names):
            above = mine[name]["above"] if name in mine else []
            place.plot(above, [height] * len(above), "o", color="tab:blue", markersize=4, alpha=0.5)
            if above:
                place.plot(statistics.mean(above), height, "|", color="tab:red", markersize=14, markeredgewidth=2)
        place.axvline(0, color="black", linewidth=0.8)
        place.set(title=task, xlabel="loss above float32, same seed", yticks=range(len(names)), yticklabels=names)
        place.locator_params(axis="x", nbins=4)
        place.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", fontsize=8, frameon=False)
    figure.savefig(RESULTS / "training.png", dpi=90, pil_kwargs={"optimize": True}, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, help="of each task; other than its usual number, nothing is written")
    arguments = parser.parse_args()
    rows = {name: [row for row in read_json("training") if row["task"] == name] for name in TASKS}
    for name in arguments.only:
        task = TASKS[name]()
        rows[name] = measure(name, task, arguments.seeds or task.seeds)
    if arguments.seeds is None:
        flat = [row for name in TASKS for row in rows[name]]
        write_json("training", flat)
        plot(flat)


if __name__ == "__main__":
    main()
