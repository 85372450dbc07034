"""Train a text classifier on the sources of Python's library, with its table of n-grams deferred and dense.

The classifier is fastText's (Joulin et al. 2016, https://arxiv.org/abs/1607.01759), in NumPy. It predicts which module
of the library a function comes from.

- A text is the start of a function: its first ``TOKENS`` tokens (names and punctuation).
- Its features are its n-grams of one to ``GRAMS`` tokens, hashed to the rows of one table. The table has 2^21 rows,
  about as many as fastText's default (``-bucket 2000000``).
- The mean of these rows is the input of a linear layer with a softmax.

A batch touches about one row in a thousand. Dense Adam moves every row in every step. Deferred Adam moves the touched
rows, lets the others wait, and must end with the same bits. The sources, and therefore all results, depend on the
version of Python.
"""

from __future__ import annotations

import re
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastadam._core.adam import Adam
from fastadam._core.common.types import SparseUpdate
from fastadam._core.native.slices import IndexedSlices
from fastadam._demo.show import COLOURS, figure, progress, smooth, tidy, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Classifier",
    "Corpus",
    "Features",
    "Report",
    "hash_ngrams",
    "load_corpus",
    "loss_and_gradients",
    "main",
    "train",
]

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
TOKENS = 50
GRAMS = 2
BUCKET_BITS = 21
WIDTH = 16
LEAST, MOST = 100, 800  # functions of a module: modules with fewer are left out; of each, at most so many are used
TEST = 1000
BATCH = 32
STEPS = 500
EXAMPLES = (
    "task = loop.create_task(coro)",
    "msg.add_header('Content-Type', 'text/plain')",
    "request = urllib.request.Request(url)",
    "suite.addTest(case)",
    "lock.acquire(timeout=1)",
)


@dataclass
class Features:
    """The rows of the n-grams of some texts. Text i has ``rows[starts[i] : starts[i + 1]]``, at least one."""

    rows: Ids
    starts: Ids

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, texts: Ids) -> Features:
        """The features of some of the texts."""
        parts = [self.rows[self.starts[i] : self.starts[i + 1]] for i in texts]
        return Features(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


def hash_ngrams(texts: Sequence[str], bits: int) -> Features:
    """Rows below ``2**bits`` for all n-grams of 1 to ``GRAMS`` tokens. An empty text counts as one empty token."""
    cache: dict[str, int] = {}
    hashes: list[int] = []
    lengths = []
    for text in texts:
        tokens = re.findall(r"[^\W\d]\w*|[^\w\s]", text)[:TOKENS] or [""]
        lengths.append(len(tokens))
        hashes += [cache.get(token) or cache.setdefault(token, zlib.crc32(token.encode())) for token in tokens]
    token, owner = np.array(hashes, np.uint64), np.repeat(np.arange(len(texts)), lengths)
    rows, owners = [], []
    ngram = np.zeros_like(token)
    for size in range(1, GRAMS + 1):
        last = token[size - 1 :]  # of each n-gram; the multiplier is 2^64 over the golden ratio
        ngram = (ngram[: len(last)] ^ last) * np.uint64(0x9E3779B97F4A7C15)
        ngram ^= ngram >> np.uint64(32)
        within = owner[size - 1 :] == owner[: len(last)]
        rows.append(ngram[within] >> np.uint64(64 - bits))
        owners.append(owner[: len(last)][within])
    order = np.argsort(np.concatenate(owners), kind="stable")
    counts = np.bincount(np.concatenate(owners), minlength=len(texts))
    return Features(np.concatenate(rows)[order].astype(np.int64), np.concatenate([[0], np.cumsum(counts)]))


@dataclass
class Corpus:
    """The features of functions, and the index of the module that each comes from."""

    modules: list[str]
    features: Features
    labels: Ids
    bits: int  # the table has 2**bits rows

    @property
    def largest(self) -> float:
        """The fraction of functions in the largest module: the accuracy of a constant guess."""
        return float(np.bincount(self.labels).max() / len(self.labels))


def read_functions(library: Path) -> dict[str, list[str]]:
    """The sources of the functions in each public module and package of Python's library, without tests."""
    functions: dict[str, list[str]] = {}
    for top in sorted(library.iterdir()):
        if top.name.startswith(("_", "test")) or top.name in ("site-packages", "dist-packages"):
            continue
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top] * (top.suffix == ".py"):
            if not {"test", "tests", "idle_test"} & set(path.parts[len(library.parts) :]):
                source = path.read_text(encoding="utf-8", errors="replace")
                functions.setdefault(top.stem, []).extend(re.split(r"\n(?=[ ]*(?:async )?def )", source)[1:])
    return functions


def load_corpus(library: Path | None = None, bits: int = BUCKET_BITS) -> Corpus:
    """The functions of this Python's library.

    Raises:
        FileNotFoundError: The library's source files are not installed.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    functions = read_functions(library) if library.is_dir() else {}
    modules = {module: sources[:MOST] for module, sources in functions.items() if len(sources) >= LEAST}
    labels = np.repeat(np.arange(len(modules)), [len(sources) for sources in modules.values()])
    if len(labels) <= TEST:
        raise FileNotFoundError(f"{library}: expected the sources of Python's library, which the demo trains on")
    texts = [text for sources in modules.values() for text in sources]
    return Corpus(list(modules), hash_ngrams(texts, bits), labels, bits)


class Classifier:
    """A table of vectors, whose rows ``optimizer`` may let wait, and a linear layer."""

    def __init__(self, corpus: Corpus, optimizer: Adam, rng: np.random.Generator) -> None:
        self.optimizer = optimizer
        self.table = (rng.random((2**corpus.bits, WIDTH), dtype=np.float32) - np.float32(0.5)) / np.float32(WIDTH)
        self.head = np.zeros((WIDTH, len(corpus.modules)), np.float32)
        self.optimizer_seconds = 0.0

    def step(self, features: Features, labels: Ids) -> float:
        """Update the table and the layer; return the loss before the update."""
        start = time.perf_counter()
        vectors = self.optimizer.gather(self.table, features.rows)  # rows of the array itself may be behind
        gathered = time.perf_counter()
        loss, gradient, head_gradient = loss_and_gradients(vectors, features.starts, self.head, labels)
        table_gradient = IndexedSlices(gradient, features.rows)
        middle = time.perf_counter()
        self.optimizer.apply_gradients([(table_gradient, self.table), (head_gradient, self.head)])
        self.optimizer_seconds += gathered - start + time.perf_counter() - middle
        return loss

    def probabilities(self, features: Features) -> Array:
        """The probability of every class, for every text."""
        means = _means(self.optimizer.gather(self.table, features.rows), features.starts)
        return _softmax(means @ self.head)


def _means(vectors: Array, starts: Ids) -> Array:
    sums = np.add.reduceat(vectors, starts[:-1], axis=0)
    return np.asarray(sums / np.diff(starts)[:, None].astype(vectors.dtype))


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def loss_and_gradients(vectors: Array, starts: Ids, head: Array, labels: Ids) -> tuple[float, Array, Array]:
    """Mean cross entropy, and its gradients with respect to the vectors of the n-grams and to the layer."""
    means = _means(vectors, starts)
    probabilities = _softmax(means @ head)
    texts = np.arange(len(labels))
    loss = -float(np.log(probabilities[texts, labels] + 1e-12).mean())
    delta = probabilities
    delta[texts, labels] -= 1
    delta /= delta.dtype.type(len(labels))
    counts = np.diff(starts)
    return loss, np.repeat(delta @ head.T / counts[:, None].astype(delta.dtype), counts, axis=0), means.T @ delta


@dataclass
class Report:
    """The results of one mode: ``seconds[i]`` is the time at which step i ended."""

    model: Classifier = field(repr=False)
    losses: list[float] = field(repr=False)
    seconds: list[float] = field(repr=False)
    optimizer_seconds: float  # of the total time, spent in the optimizer
    accuracy: float

    def same_bits(self, other: Report) -> bool:
        """Whether the tables and layers of both have the same bits."""
        ours, theirs = ((report.model.table, report.model.head) for report in (self, other))
        return all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(ours, theirs, strict=True))


def _batches(texts: Ids, rng: np.random.Generator) -> Iterator[Ids]:
    """Endless batches of texts, in a new order in every epoch."""
    while True:
        order = rng.permutation(texts)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def train(corpus: Corpus, mode: SparseUpdate, steps: int = STEPS, show_progress: bool = False) -> Report:
    """Train with one mode of ``sparse_update``; everything else is the same for all modes."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(corpus.labels))
    test, rest = order[:TEST], order[TEST:]
    optimizer = Adam(0.05, sparse_update=mode)
    model = Classifier(corpus, optimizer, rng)
    batches = _batches(rest, rng)
    losses, seconds = [], []
    begin = time.perf_counter()
    for _ in progress(range(steps), show_progress, f"{mode:8}", "step"):
        batch = next(batches)
        losses.append(model.step(corpus.features.of(batch), corpus.labels[batch]))
        seconds.append(time.perf_counter() - begin)
    last = time.perf_counter()
    optimizer.sync()
    seconds[-1] = time.perf_counter() - begin
    guesses = model.probabilities(corpus.features.of(test)).argmax(axis=1)
    accuracy = float((guesses == corpus.labels[test]).mean())
    optimizer_seconds = model.optimizer_seconds + begin + seconds[-1] - last
    model.optimizer = Adam()  # frees the moments, which take as much memory as two tables
    return Report(model, losses, seconds, optimizer_seconds, accuracy)


def draw(deferred: Report, dense: Report) -> Figure:
    """Plot the training loss against time, and the time that each optimizer took."""
    picture = figure()
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    reports = {"dense": dense, "deferred": deferred}
    colours = dict(zip(reports, COLOURS[1::-1], strict=True))
    for mode, report in reports.items():
        left.plot(report.seconds, smooth(report.losses, 25), color=colours[mode], linewidth=2, label=mode)
    left.legend(frameon=False)
    tidy(left, title="Training loss by the clock", xlabel="seconds", ylabel="cross entropy")
    spent = [report.optimizer_seconds for report in reports.values()]
    bars = right.barh(list(reports), spent, color=list(colours.values()), height=0.5)
    right.bar_label(bars, [f"{seconds:.1f} s" for seconds in spent], padding=4)
    right.margins(x=0.2)
    tidy(right, title=f"Optimizer, {len(dense.losses)} steps", xlabel="seconds")
    rows = len(dense.model.table)
    title = f"{rows:,} rows for hashed n-grams: the same bits from sparse_update='deferred' and 'dense'"
    picture.suptitle(title, fontsize="medium")
    return picture


def main(corpus: Corpus, picture: Path | None, steps: int = STEPS) -> None:
    """Train in both modes, compare them, try the classifier, and draw the loss to ``picture``."""
    features = corpus.features
    print(f"texts              {len(features)} functions of {len(corpus.modules)} modules of Python's library")
    print(
        f"table              {2**corpus.bits:,} rows of {WIDTH} for hashed n-grams; "
        f"a step touches about {len(features.rows) / len(features) * BATCH:,.0f} of them"
    )
    deferred, dense = (train(corpus, mode, steps, show_progress=True) for mode in ("deferred", "dense"))
    for mode, report in (("deferred", deferred), ("dense", dense)):
        print(f"{mode:18} {report.optimizer_seconds:.2f} s in the optimizer, {report.seconds[-1]:.2f} s of training")
    print(f"dense / deferred   {dense.optimizer_seconds / deferred.optimizer_seconds:.1f} times as long")
    print(f"same result        {'yes, every bit' if deferred.same_bits(dense) else 'NO, THE WEIGHTS DIFFER'}")
    print(
        f"test accuracy      {deferred.accuracy:.1%} of {TEST} functions that were not trained on "
        f"(always the largest module: {corpus.largest:.1%})"
    )
    guesses = deferred.model.probabilities(hash_ngrams(EXAMPLES, corpus.bits))
    for text, likely in zip(EXAMPLES, guesses, strict=True):
        print(f"{corpus.modules[likely.argmax()]:>18} {likely.max():4.0%}  {text}")
    if picture is None:
        print("picture            none: matplotlib is not installed (pip install matplotlib)")
    else:
        print(write_picture(draw(deferred, dense), picture))
