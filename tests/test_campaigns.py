"""Short runs of the campaigns in tests/fuzz about crashes, threads and memory; tests/README.md has the long ones."""

from __future__ import annotations

import pytest
from helpers import run_campaign

CAMPAIGNS = {  # program, what, number of cases
    "kills save": 40,
    "kills save_delta": 30,
    "kills merge_deltas": 30,
    "kills rebase": 20,
    "kills savers": 90,
    "disks full": 24,
    "disks power": 0,
    "threads core": 40,
    "threads torch": 15,
    "processes fork": 10,
    "processes spawn": 6,
    "processes exit": 6,
    "signals": 60,
    "leaks core-steps": 20_000,
    "leaks core-optimizers": 4_000,
    "leaks core-files": 150,
    "leaks c-steps": 40_000,
    "leaks torch-steps": 20_000,
    "leaks torch-optimizers": 3_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_a_campaign_finds_nothing(campaign):
    if "torch" in campaign:
        pytest.importorskip("torch")
    run_campaign(campaign, CAMPAIGNS[campaign])
