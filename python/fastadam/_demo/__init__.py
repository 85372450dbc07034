"""Train a small NumPy network on handwritten digits, with fastadam and a plain NumPy Adam side by side.

Both get the same gradients, so that their times can be compared and they must end in the same place.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.optimizer import Adam

__all__ = ["Report", "load_digits", "main", "train"]

Array = npt.NDArray[np.float32]
LAYERS = (64, 512, 512, 10)
BATCH = 128
TEST = 360


def load_digits() -> tuple[Array, npt.NDArray[np.int64]]:
    """1797 images of 64 pixels in [0, 1], and their labels; see ATTRIBUTION.md."""
    with as_file(files("fastadam._demo") / "digits.npz") as path, np.load(path) as archive:
        return (archive["images"] / np.float32(16)).astype(np.float32), archive["labels"].astype(np.int64)


class Network:
    """A perceptron with ReLU layers and a softmax, in NumPy."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.parameters: list[Array] = []
        for inputs, outputs in pairwise(LAYERS):
            self.parameters.append(rng.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(np.float32))
            self.parameters.append(np.zeros(outputs, np.float32))

    def forward(self, images: Array) -> list[Array]:
        """The input and the output of every layer."""
        outputs = [images]
        for i in range(0, len(self.parameters), 2):
            z = outputs[-1] @ self.parameters[i] + self.parameters[i + 1]
            outputs.append(z if i + 2 == len(self.parameters) else np.maximum(z, 0))
        return outputs

    def gradients(self, images: Array, labels: npt.NDArray[np.int64]) -> tuple[float, list[Array]]:
        """Mean cross entropy and its gradients."""
        outputs = self.forward(images)
        logits = outputs[-1] - outputs[-1].max(axis=1, keepdims=True)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        loss = -float(np.log(probabilities[rows, labels] + 1e-12).mean())
        delta = probabilities
        delta[rows, labels] -= 1
        delta /= np.float32(len(labels))
        gradients: list[Array] = []
        for i in range(len(self.parameters) - 2, -1, -2):
            gradients[:0] = [outputs[i // 2].T @ delta, delta.sum(axis=0)]
            delta = (delta @ self.parameters[i].T) * (outputs[i // 2] > 0)
        return loss, gradients

    def accuracy(self, images: Array, labels: npt.NDArray[np.int64]) -> float:
        """Share of the images that get their label."""
        return float((self.forward(images)[-1].argmax(axis=1) == labels).mean())


class PlainAdam:
    """What one writes with NumPy: the same equations, one array operation after the other."""

    def __init__(self, parameters: list[Array], learning_rate: float) -> None:
        self.learning_rate, self.t = learning_rate, 0
        self.parameters = [p.copy() for p in parameters]
        self.m = [np.zeros_like(p) for p in parameters]
        self.v = [np.zeros_like(p) for p in parameters]

    def step(self, gradients: list[Array]) -> None:
        """Update ``parameters`` in place."""
        self.t += 1
        alpha = self.learning_rate * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            m += (g - m) * 0.1
            v += (g * g - v) * 0.001
            p -= alpha * m / (np.sqrt(v) + 1e-7)


@dataclass
class Report:
    """What the demo measured; times are medians, in seconds."""

    accuracy: float
    plain_accuracy: float
    seconds_per_step: float
    plain_seconds_per_step: float
    largest_difference: float
    typical_weight: float
    losses: list[float] = field(repr=False)


def train(epochs: int = 30, seed: int = 0, learning_rate: float = 0.001, show_progress: bool = False) -> Report:
    """Train, and step a plain NumPy Adam with the same gradients beside it."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits()
    order = rng.permutation(len(labels))
    test, rest = order[:TEST], order[TEST:]
    network = Network(rng)
    plain = PlainAdam(network.parameters, learning_rate)
    optimizer = Adam(learning_rate)
    times, plain_times, losses = [], [], []
    for _ in progress(range(epochs), show_progress, "epochs"):
        for batch in _batches(rng.permutation(rest)):
            loss, gradients = network.gradients(images[batch], labels[batch])
            start = time.perf_counter()
            optimizer.apply_gradients(zip(gradients, network.parameters, strict=True))
            middle = time.perf_counter()
            plain.step(gradients)
            times.append(middle - start)
            plain_times.append(time.perf_counter() - middle)
            losses.append(loss)
    differences = [np.abs(p - q).max() for p, q in zip(network.parameters, plain.parameters, strict=True)]
    typical = float(np.sqrt(np.mean(np.concatenate([p.ravel() for p in network.parameters]) ** 2)))
    accuracy = network.accuracy(images[test], labels[test])
    network.parameters = plain.parameters
    plain_accuracy = network.accuracy(images[test], labels[test])
    medians = float(np.median(times)), float(np.median(plain_times))
    return Report(accuracy, plain_accuracy, *medians, float(max(differences)), typical, losses)


def _batches(order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def progress(numbers: range, show: bool, unit: str) -> Iterable[int]:
    """``numbers``, with a bar if there is tqdm."""
    if not show:
        return numbers
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"training {len(numbers)} {unit} (install tqdm for a progress bar)")
        return numbers
    bar: Iterable[int] = tqdm(numbers, desc="training", unit=unit.removesuffix("s"))
    return bar


def write_curve(losses: list[float], path: Path, title: str) -> str:
    """Plot the losses if there is matplotlib; a line that says what was done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss curve: matplotlib is not installed"
    axes: Any = Figure(figsize=(6, 4), layout="constrained").subplots()
    axes.semilogy(losses, linewidth=0.8)
    axes.set(xlabel="step", ylabel="cross entropy", title=f"{title}, fastadam.Adam")
    axes.figure.savefig(path, dpi=120)
    return f"loss curve in {path}"


def main(curve: Path = Path("loss.png")) -> None:
    """Train, print the report, write the loss curve."""
    report = train(show_progress=True)
    ratio = report.plain_seconds_per_step / report.seconds_per_step
    print(f"test accuracy      {report.accuracy:.1%} ({TEST} digits that were not trained on)")
    print(f"optimizer step     {report.seconds_per_step * 1e6:.0f} us, plain NumPy Adam {ratio:.1f} times as long")
    print(
        f"the same place     largest difference of a weight to the plain Adam's {report.largest_difference:.1e} "
        f"(weights of size {report.typical_weight:.2f}), whose accuracy is {report.plain_accuracy:.1%}"
    )
    print(write_curve(report.losses, curve, "Handwritten digits"))
