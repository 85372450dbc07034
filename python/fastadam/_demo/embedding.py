"""Train word vectors on the texts of ``help()``, with the tables of an optimizer deferred and dense.

Skip-gram with negative sampling (Mikolov et al. 2013, https://arxiv.org/abs/1310.4546) in NumPy:

- Words are runs of two or more letters, lower-cased; those that occur less than ``MINIMUM`` times are left out.
- A word of frequency f stays with probability sqrt(``SUBSAMPLE`` / f), drawn anew in every pass over the text.
- The context of a word are its neighbours on both sides, at distance d <= ``WINDOW`` with probability
  ``1 - (d - 1) / WINDOW``, as if each word drew the width of its window.
- Each pair comes with ``NEGATIVES`` words drawn from the counts to the power 0.75.

Both modes get the same batches, and must end in the same bits. These tables are small, and a step touches much of them:
a hard case for deferred rows, which save the work on rows that rest. The texts, and so all numbers, depend on the
version of Python.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastadam._core.optimizer import Adam
from fastadam._core.slices import IndexedSlices
from fastadam._core.types import SparseUpdate
from fastadam._demo import progress, write_curve

__all__ = [
    "Corpus",
    "Report",
    "SkipGram",
    "coherence",
    "load_corpus",
    "loss_and_gradients",
    "main",
    "neighbours",
    "train",
]

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
MINIMUM = 5
SUBSAMPLE = 1e-3
FREQUENT = 20
WINDOW = 5
NEGATIVES = 5
WIDTH = 64
BATCH = 128
STEPS = 4000
QUERIES = ("class", "string", "function", "import", "integer", "exception", "list", "loop")


@dataclass
class Corpus:
    """A text as numbers of words; the words by falling count."""

    words: list[str]
    counts: Ids
    text: Ids

    @property
    def keep(self) -> npt.NDArray[np.float64]:
        """The probability with which an occurrence of each word stays in a pass."""
        return np.asarray(np.minimum(1, np.sqrt(SUBSAMPLE * self.counts.sum() / self.counts)))

    @property
    def noise(self) -> npt.NDArray[np.float64]:
        """The cumulative distribution of the negatives."""
        cumulative = np.cumsum(self.counts**0.75)
        return np.asarray(cumulative / cumulative[-1])  # ends in exactly 1, which no random number reaches

    def frequent(self, words: Iterable[str]) -> list[str]:
        """Those of the words that occur at least ``FREQUENT`` times."""
        known = {word for word, count in zip(self.words, self.counts, strict=True) if count >= FREQUENT}
        return [word for word in words if word in known]


def load_corpus() -> Corpus:
    """The topics of ``help()`` that this Python carries, one after the other."""
    from pydoc_data.topics import topics  # some distributions leave it out

    found = re.findall(r"[a-z]{2,}", "\n".join(topics[name] for name in sorted(topics)).lower())
    counts = [(word, count) for word, count in Counter(found).most_common() if count >= MINIMUM]
    number = {word: i for i, (word, _) in enumerate(counts)}
    text = [number[word] for word in found if word in number]
    return Corpus(list(number), np.array([count for _, count in counts]), np.array(text))


def _pairs_apart(text: Ids, distance: int) -> Ids:
    """Every word with the one ``distance`` further on, and the other way round: two columns."""
    ahead = np.stack([text[:-distance], text[distance:]], axis=1)
    return np.concatenate([ahead, ahead[:, ::-1]])


def _pass(corpus: Corpus, rng: np.random.Generator) -> Ids:
    """The pairs of one pass over the text, shuffled."""
    text = corpus.text[rng.random(len(corpus.text)) < corpus.keep[corpus.text]]
    chosen = []
    for distance in range(1, WINDOW + 1):
        pairs = _pairs_apart(text, distance)
        chosen.append(pairs[rng.random(len(pairs)) < 1 - (distance - 1) / WINDOW])
    return rng.permutation(np.concatenate(chosen))


def _batches(corpus: Corpus, rng: np.random.Generator) -> Iterator[tuple[Ids, Ids]]:
    """Words, and for each the word of its context followed by the negatives; without end."""
    noise = corpus.noise
    while True:
        pairs = _pass(corpus, rng)
        for start in range(0, len(pairs) - BATCH + 1, BATCH):
            batch = pairs[start : start + BATCH]
            negatives = np.searchsorted(noise, rng.random((BATCH, NEGATIVES)), side="right")
            yield batch[:, 0], np.concatenate([batch[:, 1:], negatives], axis=1)


class SkipGram:
    """A vector of each word as centre and another as context, in two tables that ``optimizer`` may let lag."""

    def __init__(self, words: int, optimizer: Adam, rng: np.random.Generator) -> None:
        self.optimizer = optimizer
        self.vectors = ((rng.random((words, WIDTH)) - 0.5) / WIDTH).astype(np.float32)
        self.contexts = np.zeros((words, WIDTH), np.float32)
        self.optimizer_seconds = 0.0

    def gather(self, centres: Ids, targets: Ids) -> tuple[Array, Array]:
        """Rows of both tables; the buffers themselves are behind in a deferred mode."""
        return self.optimizer.gather(self.vectors, centres), self.optimizer.gather(self.contexts, targets)

    def step(self, centres: Ids, targets: Ids) -> float:
        """Update both tables; the loss before it."""
        start = time.perf_counter()
        rows, contexts = self.gather(centres, targets)
        gathered = time.perf_counter()
        loss, gradient, context_gradient = loss_and_gradients(rows, contexts)
        slices = [IndexedSlices(gradient, centres), IndexedSlices(context_gradient.reshape(-1, WIDTH), targets.ravel())]
        middle = time.perf_counter()
        self.optimizer.apply_gradients(zip(slices, (self.vectors, self.contexts), strict=True))
        self.optimizer_seconds += gathered - start + time.perf_counter() - middle
        return loss


def loss_and_gradients(rows: Array, contexts: Array) -> tuple[float, Array, Array]:
    """Mean cross entropy per score, the first context being the true one, and the gradients for both arguments."""
    scores = np.einsum("bd,bkd->bk", rows, contexts)
    scores[:, 0] *= -1
    loss = float(np.logaddexp(0, scores).mean())
    errors = 1 / (1 + np.exp(-scores))
    errors[:, 0] *= -1
    errors /= errors.dtype.type(errors.size)
    return loss, np.einsum("bk,bkd->bd", errors, contexts), errors[:, :, None] * rows[:, None, :]


@dataclass
class Report:
    """What one mode gave; ``seconds`` for the training, of which ``optimizer_seconds`` in the optimizer."""

    vectors: Array = field(repr=False)
    contexts: Array = field(repr=False)
    losses: list[float] = field(repr=False)
    seconds: float
    optimizer_seconds: float

    def same_bits(self, other: Report) -> bool:
        """Whether both tables ended in the same bits."""
        return all(
            np.array_equal(a.view(np.uint32), b.view(np.uint32))
            for a, b in ((self.vectors, other.vectors), (self.contexts, other.contexts))
        )


def train(
    corpus: Corpus,
    sparse_update: SparseUpdate,
    steps: int = STEPS,
    seed: int = 0,
    learning_rate: float = 0.003,
    show_progress: bool = False,
) -> Report:
    """Train with one kind of ``sparse_update``; everything else depends on the seed alone."""
    rng = np.random.default_rng(seed)
    optimizer = Adam(learning_rate, sparse_update=sparse_update)
    model = SkipGram(len(corpus.words), optimizer, rng)
    batches = _batches(corpus, rng)
    start = time.perf_counter()
    losses = [model.step(*next(batches)) for _ in progress(range(steps), show_progress, "steps")]
    last = time.perf_counter()
    optimizer.sync()
    end = time.perf_counter()
    return Report(model.vectors, model.contexts, losses, end - start, model.optimizer_seconds + end - last)


def _cosines(vectors: Array, pairs: Ids) -> Array:
    """The cosine of each pair of words."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray((unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(axis=1))


def neighbours(corpus: Corpus, vectors: Array, word: str, count: int = 6) -> list[str]:
    """The frequent words whose vectors have the largest cosine with that of ``word``."""
    this = corpus.words.index(word)
    everyone = np.flatnonzero(corpus.counts >= FREQUENT)
    similar = _cosines(vectors, np.stack([np.full_like(everyone, this), everyone], axis=1))
    return [corpus.words[i] for i in everyone[np.argsort(-similar)] if i != this][:count]


def coherence(corpus: Corpus, vectors: Array, seed: int = 0) -> tuple[float, float]:
    """Mean cosine of words side by side in the text, and of the same words paired at random.

    Without those that subsampling thins out to less than half.
    """
    pairs = _pairs_apart(corpus.text[corpus.keep[corpus.text] > 0.5], 1)
    shuffled = np.stack([pairs[:, 0], np.random.default_rng(seed).permutation(pairs[:, 1])], axis=1)
    together, chance = (float(_cosines(vectors, p[p[:, 0] != p[:, 1]]).mean()) for p in (pairs, shuffled))
    return together, chance


def main(curve: Path = Path("loss.png"), steps: int = STEPS) -> None:
    """Train in both modes, compare, print neighbours, write the loss curve."""
    corpus = load_corpus()
    deferred, dense = (train(corpus, mode, steps, show_progress=True) for mode in ("deferred", "dense"))
    print(f"text               {len(corpus.text)} words of the topics of help(), {len(corpus.words)} different ones")
    for name, report in (("deferred", deferred), ("dense", dense)):
        print(
            f"{name:18} {steps / report.seconds:.0f} steps/s, optimizer with its gathers "
            f"{report.optimizer_seconds / steps * 1e6:.0f} us of a step"
        )
    same = "yes, every bit of both tables" if deferred.same_bits(dense) else "NO, THE TABLES DIFFER"
    print(f"the same vectors   {same}")
    tail = dense.losses[-100:]
    print(f"loss               {dense.losses[0]:.3f} in the first step, {np.mean(tail):.3f} in the last {len(tail)}")
    together, chance = coherence(corpus, dense.vectors)
    print(f"mean cosine        {together:.2f} of words side by side in the text, {chance:.2f} of random pairs")
    for word in corpus.frequent(QUERIES):
        print(f"{'near ' + word:18} {', '.join(neighbours(corpus, dense.vectors, word))}")
    print(write_curve(dense.losses, curve, "Word vectors"))
