from __future__ import annotations

import gc
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

import fastadam
import numpy as np
import pytest
from gpu import FakeGpu, build_fake, real_or_skip
from helpers import Snapshot
from hypothesis import settings
from providers import NAMES, Provider

# JAX would take most of the memory of a GPU at once, and leave CuPy and PyTorch none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # or a GPU multiplies float32 numbers with 10 bits

# The default run finds the same on every machine. `--hypothesis-profile=random`, which .ci/run adds, looks further.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("repeatable")
COMPILED = {"fake_extension", "fake_jax_cuda"}  # fixtures


def pytest_addoption(parser):
    parser.addoption(
        "--once", metavar="FILE", help="leave out tests that FILE names, and add the names of those that pass"
    )


def pytest_configure(config):
    if file := config.getoption("once"):
        config.pluginmanager.register(Once(Path(file), controller=not hasattr(config, "workerinput")))


class Once:
    """Runs no test again that has passed in a run before, except with new random examples."""

    def __init__(self, file, *, controller):
        self.file, self.controller = file, controller
        self.passed = set(file.read_text().splitlines()) if file.exists() else set()

    @pytest.hookimpl(trylast=True)  # after Hypothesis has marked its tests
    def pytest_collection_modifyitems(self, config, items):
        random = settings.get_current_profile_name() == "random"
        again = [i for i in items if i.nodeid not in self.passed or (random and i.get_closest_marker("hypothesis"))]
        config.hook.pytest_deselected(items=list(set(items) - set(again)))
        items[:] = again

    def pytest_runtest_logreport(self, report):
        if self.controller and report.when == "call" and report.passed:
            with self.file.open("a") as file:
                file.write(f"{report.nodeid}\n")


@pytest.hookimpl(tryfirst=True)  # before markers select
def pytest_collection_modifyitems(items):
    """What has to be compiled first and what runs weekly is slow; ids are the same in all processes."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid}: an id with an address, expected one that other processes give, too"
            )
        if COMPILED & set(item.fixturenames):
            item.add_marker("fake_gpu")
        if any(item.get_closest_marker(name) for name in ("fake_gpu", "native", "weekly")):
            item.add_marker("slow")


def pytest_collection_finish():
    """What was imported stays: a collection of garbage, which hundreds of tests ask for, need not walk through it."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    skipped = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"{count} x {reason}")
    if config.option.markexpr == "not slow":
        how = "-m slow runs them alone, -m '' runs everything; see tests/README.md"
        terminalreporter.write_line(f"Tests marked slow were left out: {how}", yellow=True)


@pytest.fixture(autouse=True)
def _process_settings():
    """Every test starts and ends with the default instruction set, threads and provider of gradients."""
    isa = fastadam.current_isa()
    yield
    fastadam.set_isa(isa)
    fastadam.set_num_threads(None)
    fastadam.set_gradient_provider(None)


@pytest.fixture(scope="module")
def rows_wait():
    """Tables as small as those of tests would have a pass over all their rows: here one row in 64 must be touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadam._core.deferred.history.crossover", lambda shape, item_size, replays: 64)
        yield


@pytest.fixture
def looked_up(monkeypatch):
    """Grows by one with every group whose parameters ``fastadam.torch`` looks up in Python; a repeated step is native."""
    from fastadam.torch._partition import Partitions

    calls, look_up = [], Partitions.of

    def counting(self, *arguments, **named):
        calls.append(self)
        return look_up(self, *arguments, **named)

    monkeypatch.setattr(Partitions, "of", counting)
    return calls


@pytest.fixture
def no_warning():
    """Any warning is an error, those that the settings of the tests ignore included."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(params=fastadam.isas())
def isa(request):
    fastadam.set_isa(request.param)
    return request.param


@pytest.fixture(params=NAMES)
def provider(request):
    return Provider(request.param)


@pytest.fixture
def snapshot():
    return Snapshot()


@pytest.fixture(scope="session")
def fake_extension():
    return FakeGpu(build_fake("_cuda"))


@pytest.fixture(scope="session")
def fake_jax_cuda():
    return build_fake("_jax_cuda")


@pytest.fixture
def fake_gpu(fake_extension, monkeypatch):
    """The CUDA extension with a GPU that runs on the CPU, in the place of the one that is installed."""
    monkeypatch.setitem(sys.modules, "fastadam._cuda", fake_extension.native)
    monkeypatch.setattr(fastadam, "_cuda", fake_extension.native, raising=False)
    fake_extension.start()
    yield fake_extension
    fake_extension.runtime.fake_cuda_reset()


@pytest.fixture(params=[pytest.param("fake", marks=pytest.mark.fake_gpu), pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request):
    if request.param == "fake":
        yield request.getfixturevalue("fake_gpu")
        return
    real = real_or_skip(request.config)
    real.start()
    yield real
    real.stop()


@pytest.fixture
def passes_touch_all_rows(monkeypatch):
    """A step of a deferred table makes a pass over it only if it touches all rows."""
    monkeypatch.setattr("fastadam._core.deferred.history.crossover", lambda shape, item_size, replays: 1.0)


@pytest.fixture
def small_file(tmp_path):
    """What `save` wrote of an optimizer with a schedule and one variable of two elements, and its variables."""
    path = tmp_path / "opt"
    optimizer = fastadam.Adam(fastadam.schedules.ExponentialDecay(0.1, 10, 0.5))
    w = fastadam.Variable(np.ones(2, np.float32), "w")
    optimizer.apply_gradients([(np.ones(2, np.float32), w)])
    optimizer.save(path)
    return path, [w]
