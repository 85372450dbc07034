"""Short runs of the campaigns in tests/fuzz about crashes, threads and memory; tests/README.md has the long ones."""

from __future__ import annotations

import pytest
from helpers import run_campaign, weekly

CAMPAIGNS = {  # program, what, number of cases
    "kills save": 12,
    "kills save_delta": 12,
    "kills merge_deltas": 12,
    "kills rebase": 8,
    "kills savers": 45,
    "disks full": 8,
    "disks power": 0,
    "threads core": 8,
    "threads torch": 4,
    "processes fork": 2,
    "processes spawn": 2,
    "processes exit": 2,
    "signals": 24,
    "leaks core-steps": 6_000,
    "leaks core-optimizers": 6_000,
    "leaks core-files": 60,
    "leaks c-steps": 20_000,
}
WEEKLY = {
    "leaks torch-steps": 6_000,
    "leaks torch-optimizers": 1_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("campaign", [*CAMPAIGNS, *weekly(*WEEKLY)])
def test_a_campaign_finds_nothing(campaign):
    if "torch" in campaign:
        pytest.importorskip("torch")
    run_campaign(campaign, {**CAMPAIGNS, **WEEKLY}[campaign])
