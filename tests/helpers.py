"""What several test files need of fastadam itself: trained optimizers, comparisons, what is stored."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from fastadam._core.parts import parts_of

F32 = np.float32
SHAPES = ((3,), (2, 2), (), (4, 3))
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "schedule": {"learning_rate": fastadam.schedules.CosineDecay(0.1, 7, warmup_target=0.2, warmup_steps=2)},
    "clipped": {"clipvalue": 0.2, "clipnorm": 0.3, "decay": 0.01},
}
DTYPES = ["float16", "float32", "float64"]


def slow(*values):
    """Values of a parameter with which tests are left out of the default run: they cost much or add little to the others."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def weekly(*values):
    """The same, and left out of ``.ci/run``, where other values make the same check in less time."""
    return [pytest.param(value, marks=pytest.mark.weekly) for value in values]


def run_python(code, *, exits=False, **environment):
    """Run a program.

    It skips the last collection of garbage, which takes a second with PyTorch; ``exits=True`` keeps it, for tests of the
    exit itself.
    """
    code += "" if exits else "\nimport gc; gc.freeze()"
    kept = {k: v for k, v in os.environ.items() if k not in ("FASTADAM_NUM_THREADS", "FASTADAM_ISA", "OMP_NUM_THREADS")}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120)


def run_campaign(campaign, count):
    """Run a program of tests/fuzz, as ``"kills save"``; its last line says what it has checked."""
    program, *what = campaign.split()
    path = Path(__file__).parent / "fuzz" / f"{program}.py"
    command = [sys.executable, path, *what, "--seed=0", f"--count={count}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.startswith(f"{campaign}: ")


# For programs given to `run_python`.
COUNT_THREADS = """
import os, pathlib, subprocess

def native_threads():
    tasks = pathlib.Path("/proc/self/task")
    if tasks.exists():
        return len(list(tasks.iterdir()))
    listed = subprocess.run(["ps", "-M", str(os.getpid())], capture_output=True, text=True, check=True)  # macOS
    return len(listed.stdout.splitlines()) - 1
"""

FORK_CHILD = """
import os, signal

def child(work):
    process = os.fork()
    if process == 0:
        signal.alarm(20)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(process, 0)[1]
"""


def assert_moved(after, before):
    """Most elements: the gradient of the others may be zero, or too small to be seen."""
    assert np.isfinite(after).all()
    assert (after != before).mean() > 0.75


def first_step_gradients(gradients, **options):
    """What the step sees: with beta_1 = 0 the first moment is the clipped gradient."""
    variables = [np.zeros(np.shape(g), np.asarray(g).dtype) for g in gradients]
    optimizer = fastadam.Adam(beta_1=0.0, **options)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return [optimizer.get_slot(w, "m") for w in variables]


def listed(golden, name, part):
    """The arrays of one part of a case, by their places."""
    keys = [f"{name}/{part}/{i}" for i in range(len(golden))]
    return [golden[key].copy() for key in keys if key in golden]


def pairs_of(*shapes, dtype=F32):
    rng = np.random.RandomState(0)
    return [(random_array(rng, shape, dtype=dtype), random_array(rng, shape, dtype=dtype)) for shape in shapes]


def assert_close(actual, expected):
    """For float64 arrays: a few ulps of the step that was made."""
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-14, atol=1e-15)


def trained_on_pairs(shapes=((3,), (2, 2)), steps=3, **options):
    pairs = pairs_of(*shapes)
    optimizer = fastadam.Adam(0.1, **options)
    for _ in range(steps):
        optimizer.apply_gradients(pairs)
    return optimizer, pairs


def make_variables(order="C", dtype=F32, shapes=SHAPES):
    rng = np.random.RandomState(0)
    return [np.asarray(random_array(rng, shape, dtype=dtype), order=order) for shape in shapes]


def gradients_of(step, variables):
    rng = np.random.RandomState(step)
    return [random_array(rng, w.shape, dtype=w.dtype) for w in variables]


def train(optimizer, variables, steps):
    for step in steps:
        optimizer.apply_gradients(zip(gradients_of(step, variables), variables, strict=True))


def trained(options=None, order="C", dtype=F32, shapes=SHAPES):
    optimizer = fastadam.Adam(**{"learning_rate": 0.1, **(options or {})})
    variables = make_variables(order, dtype, shapes)
    train(optimizer, variables, range(3))
    return optimizer, variables


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        np.testing.assert_array_equal(bits(a), bits(e))


def assert_goes_on_alike(optimizer, variables, again, others):
    assert_same(again.get_weights(), optimizer.get_weights())
    before = [w.copy() for w in map(np.asarray, variables)]
    train(optimizer, variables, range(3, 6))
    assert all((np.asarray(w) != b).any() for w, b in zip(variables, before, strict=True) if b.size)
    train(again, others, range(3, 6))
    assert_same(others, variables)
    assert_same(again.get_weights(), optimizer.get_weights())
    assert again.get_config() == optimizer.get_config()


def saved(path, options=None, **kwargs):
    optimizer, variables = trained(options, **kwargs)
    optimizer.save(path)
    return optimizer, variables


def refuses(path, variables, message="", cls=fastadam.Adam):
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        cls.load(path, variables)


def rewrite(path, change, tensors=None, checksum=True):
    """The file with a header changed by someone who knows the format."""
    import safetensors.numpy

    with safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["fastadam"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    text = change(header)
    text = text if isinstance(text, str) else json.dumps(header)
    metadata = {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()) if checksum else 0)}
    safetensors.numpy.save_file({**arrays, **(tensors or {})}, path, metadata)


class Halving(fastadam.schedules.LearningRateSchedule):
    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start * 0.5**step

    def get_config(self):
        return {"start": self.start}


class Snapshot:
    """An optimizer two steps into training, whose whole state is compared later."""

    def __init__(self):
        self.variables = [np.ones(3, F32), np.full((2, 2), 2, F32)]
        self.gradients = [np.full(3, 0.5, F32), np.full((2, 2), 0.25, F32)]
        self.optimizer = fastadam.Adam(0.1, amsgrad=True)
        for _ in range(2):
            self.optimizer.apply_gradients(self.good_pairs())
        self.before = self.state()

    def good_pairs(self):
        return list(zip(self.gradients, self.variables, strict=True))

    def state(self):
        return copy.deepcopy(
            [self.variables, self.gradients, self.optimizer.get_weights(), self.optimizer.get_config()]
        )

    def assert_unchanged(self):
        for before, after in zip(self.before[:3], self.state()[:3], strict=True):
            assert len(before) == len(after)
            for b, a in zip(before, after, strict=True):
                np.testing.assert_array_equal(b, a)
        assert self.before[3] == self.state()[3]


def history_of(optimizer):
    """The history of an optimizer's first variable, if it is a deferred table."""
    return parts_of(optimizer).state.entries[0].history


class Pair:
    """Two optimizers of equal options on copies of one table, the second deferred."""

    def __init__(self, rows=3000, width=(5,), dtype=F32, mode="deferred", **options):
        self.rng = np.random.RandomState(rows)
        self.tables = [random_array(self.rng, (rows, *width), low=-6, high=0).astype(dtype) for _ in range(2)]
        self.tables[1][...] = self.tables[0]
        self.start = self.tables[0].copy()
        self.optimizers = [
            fastadam.Adam(**{"learning_rate": 0.01, **options}, sparse_update=name) for name in ("dense", mode)
        ]

    def step(self, ids, low=-20, high=2, values=None):
        dtype, shape = self.tables[0].dtype, (len(ids), *self.tables[0].shape[1:])
        values = random_array(self.rng, shape, low, high).astype(dtype) if values is None else values
        for optimizer, table in zip(self.optimizers, self.tables, strict=True):
            optimizer.apply_gradients([(fastadam.IndexedSlices(values, np.asarray(ids, np.int64)), table)])

    def rest(self, steps):
        for _ in range(steps):
            self.step([])

    def gather(self, ids):
        dense, deferred = (o.gather(t, ids) for o, t in zip(self.optimizers, self.tables, strict=True))
        np.testing.assert_array_equal(bits(dense), bits(self.tables[0][ids]))
        np.testing.assert_array_equal(bits(deferred), bits(dense))

    def lags(self):
        history = history_of(self.optimizers[1])
        return history is not None and history.waits

    def compare(self):
        dense, deferred = (optimizer.get_weights() for optimizer in self.optimizers)
        assert len(dense) == len(deferred)
        for a, b in zip([self.tables[0], *dense], [self.tables[1], *deferred], strict=True):
            np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(b)))
        assert not self.lags()


def ones(*shape):
    return np.ones(shape, F32)


def step_by_half(optimizer, *variables):
    """A step whose gradients are 0.5 everywhere."""
    return optimizer.apply_gradients([(np.full(np.shape(w), 0.5, F32), w) for w in variables])


def warned(function, pattern):
    """The text of the one warning that a function gives, at a line of a test's file."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    assert [w.category for w in found] == [UserWarning], [str(w.message) for w in found]
    assert re.search(pattern, str(found[0].message)), found[0].message
    assert found[0].filename in (function.__code__.co_filename, __file__)
    return str(found[0].message)


def rss_anon():
    """KiB of anonymous memory that are resident, without what malloc keeps of what tests before have freed."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
