"""What do smaller weights and states cost in the loss? Whole trainings, several seeds, against float32.

    python bench/training.py [--only WORD ...] [--seeds N]

Runs of one seed start from the same float32 weights and see the same batches, so their losses are compared in pairs.
The loss is that of data that was not trained on, with the weights that the model computes with.
bench/results/training.json has the last figures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import fastadam.torch
import numpy as np
import torch
from common import RESULTS, read_json, write_json
from fastadam._demo.digits import BATCH, LAYERS, TEST, load_digits
from fastadam._demo.show import smooth
from models import small_gpt
from torch import nn

CURVE = 60  # points of a curve in the results
CONTEXT, WIDTH, BLOCKS, TEXTS = 64, 64, 2, 16  # of the GPT; texts in a batch


@dataclass(frozen=True)
class Configuration:
    """How weights and state are kept."""

    weights: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)  # of fastadam.torch.AdamW


REFERENCE = "float32"
CONFIGURATIONS = {  # the first is the reference
    REFERENCE: Configuration(torch.float32),
    "bfloat16, float32 masters": Configuration(torch.bfloat16, {"master_weights": True}),
    "bfloat16, float32 moments": Configuration(torch.bfloat16, {"moments": "float32"}),
    "bfloat16 alone": Configuration(torch.bfloat16),
}


@dataclass(frozen=True)
class Task:
    """A model and its data. The model's call on a batch returns the mean loss."""

    make: Callable[[int], nn.Module]  # from a seed
    batches: Callable[[int], Iterator[tuple[torch.Tensor, ...]]]  # without end, from a seed
    held_out: Callable[[int], tuple[torch.Tensor, ...]]
    steps: int
    rate: float  # the highest learning rate
    seeds: int


# ---- handwritten digits ---------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """The network of `python -m fastadam`."""

    def __init__(self, layers: tuple[int, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise(layers))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = images.to(self.layers[0].weight.dtype)
        for layer in self.layers[:-1]:
            hidden = layer(hidden).relu()
        return nn.functional.cross_entropy(self.layers[-1](hidden).float(), labels)


def digits(layers: tuple[int, ...] = LAYERS, steps: int = 180) -> Task:
    """The demo's data and sizes; 180 steps are its 15 epochs."""
    images, labels = map(torch.from_numpy, load_digits())

    def order(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(len(labels))

    def batches(seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
        rng = np.random.default_rng([seed, 1])
        while True:
            epoch = torch.from_numpy(rng.permutation(order(seed)[TEST:]))
            for batch in epoch.split(BATCH):
                yield images[batch], labels[batch]

    def held_out(seed: int) -> tuple[torch.Tensor, ...]:
        test = torch.from_numpy(order(seed)[:TEST])
        return images[test], labels[test]

    return Task(lambda seed: Perceptron(layers, seed), batches, held_out, steps, rate=1e-3, seeds=5)


# ---- a GPT of characters --------------------------------------------------------------------------------------------


def python_topics() -> str:
    """What Python's `help()` says of the language: 465 000 characters in every installation."""
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def characters(text: str, width: int = WIDTH, context: int = CONTEXT, steps: int = 800) -> Task:
    """A GPT of the characters of a text, whose last tenth is not trained on."""
    known = sorted(set(text))
    ids = torch.tensor([known.index(character) for character in text])
    train, test = ids[: -len(ids) // 10], ids[-len(ids) // 10 :]

    def drawn(source: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(len(source) - context, (count, 1), generator=generator)
        return source[starts + torch.arange(context)]

    def batches(seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield (drawn(train, TEXTS, generator),)

    def held_out(_seed: int) -> tuple[torch.Tensor, ...]:
        return (drawn(test, 16 * TEXTS, torch.Generator().manual_seed(0)),)

    def make(seed: int) -> nn.Module:
        return small_gpt(width, BLOCKS, len(known), context, seed)

    return Task(make, batches, held_out, steps, rate=3e-3, seeds=4)


TASKS = {"digits": digits, "GPT": lambda: characters(python_topics())}


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one training gave."""

    loss: float  # of data that was not trained on
    losses: list[float]  # of each step
    bytes_per_parameter: float  # of weights and state


def train(task: Task, configuration: Configuration, seed: int) -> Run:
    model = task.make(seed).to(configuration.weights)
    optimizer = fastadam.torch.AdamW(model.parameters(), **configuration.options)
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
    rows, reference = [], []
    for configuration, how in CONFIGURATIONS.items():
        start = time.perf_counter()
        runs = [train(task, how, seed) for seed in range(seeds)]
        found = [run.loss for run in runs]
        reference = reference or found
        curve = smooth(np.mean([run.losses for run in runs], axis=0), task.steps // 20)
        rows.append(
            {
                "task": name,
                "configuration": configuration,
                "steps": task.steps,
                "bytes per parameter": round(statistics.mean(run.bytes_per_parameter for run in runs), 2),
                "losses": found,
                "loss": statistics.mean(found),
                "spread": statistics.stdev(found),
                "above": [a - b for a, b in zip(found, reference, strict=True)],
                "curve": [round(float(curve[step]), 5) for step in steps_of_curve(task.steps)],
            }
        )
        show(rows[-1], time.perf_counter() - start)
    return rows


def steps_of_curve(steps: int) -> np.ndarray:
    return np.linspace(0, steps - 1, CURVE).astype(int)


def show(row: dict[str, Any], seconds: float) -> None:
    above = row["above"]
    print(
        f"{row['task']:<8}{row['configuration']:<28}{row['bytes per parameter']:>6.2f} bytes"
        f"{row['loss']:>9.4f} +- {row['spread']:.4f}   above float32 {statistics.mean(above):>8.4f}"
        f" ({min(above):.4f} to {max(above):.4f}){seconds:>7.0f} s",
        flush=True,
    )


def plot(rows: list[dict[str, Any]]) -> None:
    """The training loss of each step, the mean of all seeds, smoothed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(9, 3.6), layout="constrained")
    for place, task in zip(axes, TASKS, strict=True):
        mine = [row for row in rows if row["task"] == task]
        for count, row in enumerate(mine):
            style = {"linewidth": 1.2, "linestyle": ("-", "--", ":", "-.")[count % 4]}  # some curves agree
            if row["configuration"] == REFERENCE:
                style = {"color": "black", "linewidth": 4, "alpha": 0.3}
            place.plot(steps_of_curve(row["steps"]) + 1, row["curve"], label=row["configuration"], **style)
        losses = [loss for row in mine for loss in row["curve"]]
        scale = "log" if losses and max(losses) > 10 * min(losses) else "linear"
        place.set(title=task, xlabel="step", ylabel="training loss", yscale=scale)
        place.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8, frameon=False)
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
