"""The word vectors of the demo: both modes to the bit, and better than chance."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from cases import bits
from fastadam import Adam
from fastadam.__main__ import main
from fastadam._demo import embedding

MODES = ("deferred", "dense")


@pytest.fixture(scope="module")
def corpus():
    return embedding.load_corpus()


def untrained(corpus):
    return embedding.SkipGram(len(corpus.words), Adam(), np.random.default_rng(0)).vectors


def test_the_corpus_is_numbered_by_falling_count(corpus):
    assert len(set(corpus.words)) == len(corpus.words) > 500
    assert all(len(word) > 1 and word == word.lower() for word in corpus.words)
    np.testing.assert_array_equal(np.bincount(corpus.text), corpus.counts)
    assert corpus.counts.min() >= embedding.MINIMUM
    assert (np.diff(corpus.counts) <= 0).all()
    assert {"class", "string", "function"} < set(corpus.words)


def test_frequent_words_are_thinned_out_and_negatives_cover_all_words(corpus):
    assert corpus.keep[0] < 0.3
    assert corpus.keep[-1] == 1
    assert corpus.noise[-1] == 1
    assert (np.diff(corpus.noise) > 0).all()


def test_batches_pair_words_within_the_window(corpus):
    words = [f"w{i}" for i in range(2000)]
    plain = embedding.Corpus(words, np.ones(2000, np.int64), np.arange(2000))
    centres, targets = next(embedding._batches(plain, np.random.default_rng(0)))
    assert targets.shape == (embedding.BATCH, 1 + embedding.NEGATIVES)
    distances = np.abs(targets[:, 0] - centres)
    assert set(distances) == set(range(1, embedding.WINDOW + 1))
    assert 0 <= targets.min() <= targets.max() < 2000


def test_the_gradients_of_the_word_vectors_are_right():
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((4, 8)), rng.standard_normal((4, 3, 8))
    _, *gradients = embedding.loss_and_gradients(*arrays)
    for array, gradient in zip(arrays, gradients, strict=True):
        for place in ((0,) * array.ndim, tuple(rng.integers(0, n) for n in array.shape)):
            values = []
            for sign in (1, -1):
                array[place] += sign * 1e-6
                values.append(embedding.loss_and_gradients(*arrays)[0])
                array[place] -= sign * 1e-6
            np.testing.assert_allclose(gradient[place], (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-8)


def test_both_modes_end_in_the_same_bits_and_learn(corpus):
    deferred, dense = (embedding.train(corpus, mode, steps=800, learning_rate=0.01) for mode in MODES)
    assert deferred.same_bits(dense)
    for name in ("vectors", "contexts"):
        np.testing.assert_array_equal(bits(getattr(deferred, name)), bits(getattr(dense, name)))
    assert deferred.losses == dense.losses
    assert np.mean(dense.losses[-50:]) < 0.8 * dense.losses[0]
    together, chance = embedding.coherence(corpus, dense.vectors)
    start, start_chance = embedding.coherence(corpus, untrained(corpus))
    assert abs(start - start_chance) < 0.02 < 0.08 < together - chance


def test_one_bit_is_a_difference(corpus):
    reports = [embedding.train(corpus, mode, steps=3) for mode in MODES]
    assert reports[0].same_bits(reports[1])
    reports[1].contexts.view(np.uint32)[5, 5] ^= 1
    assert not reports[0].same_bits(reports[1])


def test_neighbours_are_the_frequent_words_with_the_largest_cosine():
    corpus = embedding.Corpus(["aa", "bb", "cc", "dd", "ee"], np.array([50, 40, 30, 20, 6]), np.arange(5))
    vectors = np.array([[1, 0], [0, 1], [2, 1], [-1, 0], [1, 0]], np.float32)
    assert embedding.neighbours(corpus, vectors, "aa") == ["cc", "bb", "dd"]
    assert embedding.neighbours(corpus, vectors, "aa", 1) == ["cc"]
    assert corpus.frequent(["zz", "ee", "dd", "aa"]) == ["dd", "aa"]


def test_the_command_line_trains_word_vectors(tmp_path):
    curve = tmp_path / "curve.png"
    command = [sys.executable, "-m", "fastadam", "demo", "--embedding", "--steps", "60", "--curve", str(curve)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = {line[:18].strip(): line[19:] for line in result.stdout.splitlines()}
    assert lines["the same vectors"] == "yes, every bit of both tables"
    assert all("steps/s" in lines[mode] for mode in MODES)
    assert lines["near class"].count(", ") == 5
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert "training: 100%" in result.stderr


@pytest.mark.parametrize("arguments", [["--steps", "5"], ["--embedding", "--steps", "0"]])
def test_steps_are_positive_and_of_the_word_vectors(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert f"--steps {arguments[-1]}: expected a positive number, with --embedding" in capsys.readouterr().err
