"""The classifier of the demo: both modes to the bit, and better than a guess."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from cases import bits
from fastadam.__main__ import main
from fastadam._demo import embedding

MODES = ("deferred", "dense")
BITS = 18  # a small table


@pytest.fixture(scope="module")
def corpus():
    return embedding.load_corpus(bits=BITS)


@pytest.mark.slow
def test_the_corpus_is_functions_of_modules_that_have_many(corpus):
    counts = np.bincount(corpus.labels)
    assert len(corpus.modules) == len(counts) > 15
    assert counts.min() >= embedding.LEAST
    assert counts.max() <= embedding.MOST
    assert corpus.largest == counts.max() / counts.sum() < 0.2
    assert {"asyncio", "email", "argparse"} < set(corpus.modules)
    assert len(corpus.features) == len(corpus.labels)
    assert 0 <= corpus.features.rows.min() <= corpus.features.rows.max() < 2**BITS
    assert len(np.unique(corpus.features.rows)) > 50_000


def test_tests_and_installed_packages_are_not_read(tmp_path):
    source = "import x\n\ndef f():\n    pass\n\nclass A:\n    async def g(self):\n        pass\n"
    for path in ("a.py", "b/c.py", "b/tests/d.py", "test/e.py", "site-packages/f/g.py", "_h.py", "b/notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    found = embedding.read_functions(tmp_path)
    assert list(found) == ["a", "b"]
    assert [text.split("(")[0].strip() for text in found["b"]] == ["def f", "async def g"]


@pytest.mark.parametrize("name", ["", "missing"])
def test_without_the_sources_of_the_library_there_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedding.sysconfig, "get_path", lambda _: str(tmp_path / name))
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--embedding", "--curve", str(tmp_path / "x.png")])
    assert "expected the sources of Python's library" in capsys.readouterr().err.splitlines()[-1]


def test_features_are_the_runs_of_tokens_of_each_text_by_itself():
    a, b, ab, nothing, numbers = (embedding.hash_ngrams([text], BITS) for text in ("a", "b", "a b", "", "1 2"))
    assert [len(one.rows) for one in (a, b, ab, nothing, numbers)] == [1, 1, 3, 1, 1]
    assert set(ab.rows) > {a.rows[0], b.rows[0]}
    assert set(embedding.hash_ngrams(["b a"], BITS).rows) & set(ab.rows) == {a.rows[0], b.rows[0]}
    assert numbers.rows == nothing.rows
    together = embedding.hash_ngrams(["a", "", "a b"], BITS)
    assert together.starts.tolist() == [0, 1, 2, 5]
    for i, alone in enumerate((a, nothing, ab)):
        assert together.of(np.array([i])).rows.tolist() == alone.rows.tolist()
    assert together.of(np.array([2, 0])).starts.tolist() == [0, 3, 4]
    long = embedding.hash_ngrams(["a.b " * 1000], BITS)
    assert len(long.rows) == 2 * embedding.TOKENS - 1


def test_the_gradients_of_the_classifier_are_right():
    rng = np.random.default_rng(0)
    starts, labels = np.array([0, 3, 4, 6]), np.array([1, 0, 3])
    arrays = rng.standard_normal((6, 8)), rng.standard_normal((8, 4))

    def loss():
        return embedding.loss_and_gradients(arrays[0], starts, arrays[1], labels)

    for array, gradient in zip(arrays, loss()[1:], strict=True):
        for place in ((0,) * array.ndim, tuple(rng.integers(0, n) for n in array.shape)):
            values = []
            for sign in (1, -1):
                array[place] += sign * 1e-6
                values.append(loss()[0])
                array[place] -= sign * 1e-6
            np.testing.assert_allclose(gradient[place], (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_both_modes_end_in_the_same_bits_and_learn(corpus):
    deferred, dense = (embedding.train(corpus, mode, steps=150) for mode in MODES)
    assert deferred.same_bits(dense)
    np.testing.assert_array_equal(bits(deferred.model.table), bits(dense.model.table))
    assert deferred.losses == dense.losses
    assert deferred.accuracy == dense.accuracy > 0.5 > 3 * corpus.largest
    assert np.mean(dense.losses[-25:]) < 0.6 * dense.losses[0]
    deferred.model.table.view(np.uint32)[5, 5] ^= 1
    assert not deferred.same_bits(dense)


@pytest.mark.slow
def test_the_command_line_compares_both_modes(tmp_path):
    curve = tmp_path / "curve.png"
    command = [sys.executable, "-m", "fastadam", "demo", "--embedding", "--steps", "60", "--curve", str(curve)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = {line[:18].strip(): line[19:] for line in result.stdout.splitlines()}
    assert lines["same result"] == "yes, every bit"
    assert all(lines[mode].split()[1:4] == ["s", "in", "the"] for mode in MODES)
    assert lines["dense / deferred"].endswith(" times as long")
    assert float(lines["test accuracy"].split("%")[0]) > 10
    assert lines["picture"] == str(curve)
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert all(f"{mode:8}: 100%" in result.stderr for mode in MODES)
