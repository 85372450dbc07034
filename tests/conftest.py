from __future__ import annotations

import fastadam
import pytest
from helpers import Snapshot
from providers import NAMES, Provider


@pytest.fixture(autouse=True)
def _process_settings():
    """Every test starts and ends with the default instruction set, threads and provider of gradients."""
    isa = fastadam.info.current_isa()
    yield
    fastadam.set_isa(isa)
    fastadam.set_num_threads(None)
    fastadam.set_gradient_provider(None)


@pytest.fixture(scope="module")
def rows_wait():
    """Tables as small as those of tests would have a pass over all their rows: here one row in 64 must be touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadam.staleness.crossover", lambda shape, item_size, replays: 64)
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
