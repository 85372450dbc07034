"""Train a small NumPy network on handwritten digits, with fastadam and a plain NumPy Adam side by side.

Both get the same gradients, so that their times can be compared and they must end in the same place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.adam import Adam
from fastadam._demo.show import COLOURS, figure, progress, smooth, tidy, write_picture

__all__ = ["Report", "load_digits", "main", "train"]

Array = npt.NDArray[np.float32]
LAYERS = (64, 512, 512, 10)
BATCH = 128
TEST = 360
EPOCHS = 15


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

    accuracies: list[float] = field(repr=False)  # after each epoch, on the digits that were not trained on
    plain_accuracy: float
    seconds_per_step: float
    plain_seconds_per_step: float
    largest_difference: float
    typical_weight: float
    losses: list[float] = field(repr=False)

    @property
    def accuracy(self) -> float:
        """At the end."""
        return self.accuracies[-1]

    @property
    def ratio(self) -> float:
        """How many times as long the plain optimizer takes."""
        return self.plain_seconds_per_step / self.seconds_per_step


def train(epochs: int = EPOCHS, seed: int = 0, learning_rate: float = 0.001, show_progress: bool = False) -> Report:
    """Train, and step a plain NumPy Adam with the same gradients beside it."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits()
    order = rng.permutation(len(labels))
    test, rest = order[:TEST], order[TEST:]
    network = Network(rng)
    plain = PlainAdam(network.parameters, learning_rate)
    optimizer = Adam(learning_rate)
    times, plain_times, losses, accuracies = [], [], [], []
    for _ in progress(range(epochs), show_progress, "training", "epoch"):
        for batch in _batches(rng.permutation(rest)):
            loss, gradients = network.gradients(images[batch], labels[batch])
            start = time.perf_counter()
            optimizer.apply_gradients(zip(gradients, network.parameters, strict=True))
            middle = time.perf_counter()
            plain.step(gradients)
            times.append(middle - start)
            plain_times.append(time.perf_counter() - middle)
            losses.append(loss)
        accuracies.append(network.accuracy(images[test], labels[test]))
    differences = [np.abs(p - q).max() for p, q in zip(network.parameters, plain.parameters, strict=True)]
    typical = float(np.sqrt(np.mean(np.concatenate([p.ravel() for p in network.parameters]) ** 2)))
    network.parameters = plain.parameters
    plain_accuracy = network.accuracy(images[test], labels[test])
    medians = float(np.median(times)), float(np.median(plain_times))
    return Report(accuracies, plain_accuracy, *medians, float(max(differences)), typical, losses)


def _batches(order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def draw(report: Report) -> Any:
    """The training loss of each step, and the test accuracy after each epoch."""
    drawn = figure()
    left, right = drawn.subplots(1, 2)
    steps = np.arange(1, len(report.losses) + 1)
    left.semilogy(steps, report.losses, color=COLOURS[2], linewidth=0.7, label="each step")
    left.semilogy(steps, smooth(report.losses, 13), color=COLOURS[0], linewidth=2, label="mean of 13 steps")
    left.legend(frameon=False)
    tidy(left, title="Training loss", xlabel="step", ylabel="cross entropy")
    epochs = np.arange(1, len(report.accuracies) + 1)
    right.plot(epochs, [100 * accuracy for accuracy in report.accuracies], "o-", color=COLOURS[1], markersize=4)
    right.annotate(
        f"{report.accuracy:.1%}",
        (epochs[-1], 100 * report.accuracy),
        xytext=(0, -18),
        textcoords="offset points",
        ha="right",
        fontweight="bold",
    )
    tidy(right, title=f"Accuracy on {TEST} held-out digits", xlabel="epoch", ylabel="percent")
    drawn.suptitle("Handwritten digits, a NumPy network trained by fastadam.Adam", fontsize="medium")
    return drawn


def main(picture: Path | None) -> None:
    """Train, print the report, draw the learning curve to ``picture``."""
    report = train(show_progress=True)
    print(f"test accuracy      {report.accuracy:.1%} of {TEST} digits that were not trained on")
    print(
        f"optimizer step     {report.seconds_per_step * 1e6:.0f} us; Adam in plain NumPy "
        f"{report.plain_seconds_per_step * 1e6:.0f} us, {report.ratio:.1f} times as long"
    )
    print(
        f"same result        weights differ from plain NumPy's by at most {report.largest_difference:.1e} "
        f"(their size is {report.typical_weight:.2f}); its accuracy is {report.plain_accuracy:.1%}"
    )
    if picture is None:
        print("picture            none: matplotlib is not installed (pip install matplotlib)")
    else:
        print(write_picture(draw(report), picture))
