"""What bench/training.py measures, on small networks: with float32 masters bfloat16 weights learn as float32 does."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from compiled import ROOT

# How far the loss may be from that of float32 with masters, and is at least above it without.
BOUNDS = {"digits": (0.003, 0.1), "GPT": (0.003, 0.02)}
MODULES = ("common", "models", "training")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("training")
    for name in MODULES:
        sys.modules.pop(name, None)


def task_of(bench, name):
    if name == "digits":
        return bench.digits((64, 48, 10), steps=200)
    text = (ROOT / "LICENSE").read_text()
    return replace(bench.characters(text, width=16, context=24, steps=100), rate=1e-3)


@pytest.mark.parametrize("name", BOUNDS)
def test_masters_reach_the_loss_of_float32_and_weights_without_them_do_not(bench, name):
    """The training loss at the end, the mean of a tenth of the steps."""
    task = task_of(bench, name)
    full, masters, alone = (
        np.mean(bench.train(task, bench.CONFIGURATIONS[how], seed=0).losses[-task.steps // 10 :])
        for how in (bench.REFERENCE, "bfloat16, float32 masters", "bfloat16 alone")
    )
    within, lost = BOUNDS[name]
    assert abs(masters - full) < within
    assert alone - full > lost


def test_bytes_are_those_of_weights_and_state(bench):
    task = bench.digits((64, 8, 10), steps=1)
    held = {name: bench.train(task, how, seed=0).bytes_per_parameter for name, how in bench.CONFIGURATIONS.items()}
    assert list(held.values()) == [12, 2 + 4 + 8, 2 + 8, 6]
