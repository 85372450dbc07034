from __future__ import annotations

import sys
import warnings

import fastadam
import pytest
from gpu import FakeGpu, build_fake, real_or_skip
from helpers import Snapshot
from providers import NAMES, Provider


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
        patch.setattr("fastadam._core.staleness.crossover", lambda shape, item_size, replays: 64)
        yield


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
def fake_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fake_cuda")


@pytest.fixture(scope="session")
def fake_extension(fake_folder):
    return FakeGpu(build_fake(fake_folder, "_cuda"))


@pytest.fixture(scope="session")
def fake_jax_cuda(fake_folder):
    return build_fake(fake_folder, "_jax_cuda")


@pytest.fixture
def fake_gpu(fake_extension, monkeypatch):
    """The CUDA extension with a GPU that runs on the CPU, in the place of the one that is installed."""
    monkeypatch.setitem(sys.modules, "fastadam._cuda", fake_extension.native)
    monkeypatch.setattr(fastadam, "_cuda", fake_extension.native, raising=False)
    fake_extension.start()
    yield fake_extension
    fake_extension.runtime.fake_cuda_reset()


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request):
    if request.param == "fake":
        yield request.getfixturevalue("fake_gpu")
        return
    real = real_or_skip()
    real.start()
    yield real
    real.cupy.cuda.Stream.null.use()
