"""The main job, as a user starts it."""

from __future__ import annotations

import functools
import subprocess
import sys

import fastadam
import numpy as np
import pytest
from fastadam import _demo as demo
from fastadam.__main__ import main


def test_the_digits_are_whole():
    images, labels = demo.load_digits()
    assert images.shape == (1797, 64)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.slow
def test_the_demo_learns_and_ends_where_a_plain_adam_ends():
    report = demo.train(epochs=12)
    assert report.accuracy > 0.95
    assert report.losses[-1] < 0.1 < report.losses[0]
    assert report.largest_difference < 1e-4 * report.typical_weight
    assert abs(report.accuracy - report.plain_accuracy) < 0.005


def test_the_gradients_of_the_demo_are_right():
    rng = np.random.default_rng(0)
    network = demo.Network(rng)
    network.parameters = [p.astype(np.float64) for p in network.parameters]
    images, labels = rng.random((6, 64)), np.arange(6)
    _, gradients = network.gradients(images, labels)
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        place = tuple(rng.integers(0, n) for n in parameter.shape)
        values = []
        for sign in (1, -1):
            parameter[place] += sign * 1e-6
            values.append(network.gradients(images, labels)[0])
            parameter[place] -= sign * 1e-6
        np.testing.assert_allclose(gradient[place], (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_command_line_trains_and_reports(tmp_path):
    command = [sys.executable, "-m", "fastadam", "demo", "--curve", str(tmp_path / "curve.png")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    accuracy = next(line for line in result.stdout.splitlines() if line.startswith("test accuracy"))
    assert float(accuracy.split()[2].rstrip("%")) > 95
    assert "plain NumPy Adam" in result.stdout
    assert "loss curve in" in result.stdout
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "training: 100%" in result.stderr


def test_without_matplotlib_and_tqdm_the_demo_says_what_is_missing(tmp_path, monkeypatch, capsys):
    for module in ("matplotlib", "matplotlib.figure", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(demo, "train", functools.partial(demo.train, epochs=1))
    demo.main(tmp_path / "curve.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training 1 epochs (install tqdm for a progress bar)"
    assert lines[-1] == "no loss curve: matplotlib is not installed"
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_it_prints_what_a_bug_report_needs(capsys):
    main([])
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("isa in")
    )
    assert lines["fastadam"] == fastadam.__version__
    assert set(lines) == {"fastadam", "python", "numpy", "compiler", "isas", "threads", "cuda"}
    assert all(name in lines["isas"] for name in fastadam.isas())
