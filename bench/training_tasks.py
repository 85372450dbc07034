"""What bench/training.py trains: models and their data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from fastadam._demo import embedding
from fastadam._demo.digits import BATCH, LAYERS, TEST, load_digits
from models import small_gpt
from torch import nn

CONTEXT, WIDTH, BLOCKS, TEXTS = 64, 64, 2, 16  # of the GPT; texts in a batch


@dataclass(frozen=True)
class Task:
    """A model and its data. The model's call on a batch returns the mean loss."""

    make: Callable[[int], nn.Module]  # from a seed
    batches: Callable[[int], Iterator[tuple[torch.Tensor, ...]]]  # without end, from a seed
    held_out: Callable[[int], tuple[torch.Tensor, ...]]
    steps: int
    rate: float  # the highest learning rate
    seeds: int


def split(count: int, test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of some examples are held out, and which are trained on."""
    order = np.random.default_rng(seed).permutation(count)
    return order[:test], order[test:]


def drawn_batches(examples: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches without end, in a new order in every epoch."""
    rng = np.random.default_rng([seed, 1])
    while True:
        epoch = rng.permutation(examples)
        for start in range(0, len(epoch), size):
            yield epoch[start : start + size]


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

    def batches(seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
        for batch in drawn_batches(split(len(labels), TEST, seed)[1], BATCH, seed):
            yield images[batch], labels[batch]

    def held_out(seed: int) -> tuple[torch.Tensor, ...]:
        test = split(len(labels), TEST, seed)[0]
        return images[test], labels[test]

    return Task(lambda seed: Perceptron(layers, seed), batches, held_out, steps, rate=1e-3, seeds=5)


# ---- a GPT of characters --------------------------------------------------------------------------------------------


def python_topics() -> str:
    """What Python's `help()` says of the language: 465 000 characters in every installation."""
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def characters(text: str, width: int = WIDTH, context: int = CONTEXT, steps: int = 500) -> Task:
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

    return Task(make, batches, held_out, steps, rate=3e-3, seeds=5)


# ---- a table of n-grams ---------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """The network of the demo of tables: the mean of the vectors of a text's n-grams, and a layer."""

    def __init__(self, rows: int, classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.EmbeddingBag(rows, embedding.WIDTH, mode="mean")  # with dense gradients
        nn.init.uniform_(self.table.weight, -0.5 / embedding.WIDTH, 0.5 / embedding.WIDTH)
        self.head = nn.Linear(embedding.WIDTH, classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, rows: torch.Tensor, starts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.table(rows, starts)).float(), labels)


def ngrams(bits: int = 16, steps: int = 500) -> Task:
    """The functions of Python's library, by module, as the demo; its table has 2**21 rows."""
    corpus = embedding.load_corpus(bits=bits)

    def of(texts: np.ndarray) -> tuple[torch.Tensor, ...]:
        features = corpus.features.of(texts)
        return tuple(map(torch.from_numpy, (features.rows, features.starts[:-1], corpus.labels[texts])))

    def batches(seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
        return map(of, drawn_batches(split(len(corpus.labels), embedding.TEST, seed)[1], embedding.BATCH, seed))

    def held_out(seed: int) -> tuple[torch.Tensor, ...]:
        return of(split(len(corpus.labels), embedding.TEST, seed)[0])

    def make(seed: int) -> nn.Module:
        return Classifier(2**bits, len(corpus.modules), seed)

    return Task(make, batches, held_out, steps, rate=0.05, seeds=5)


TASKS = {"digits": digits, "n-grams": ngrams, "GPT": lambda: characters(python_topics())}
