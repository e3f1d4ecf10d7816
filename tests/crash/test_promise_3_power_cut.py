"""Promise 3, at some instants of one run in a real guest; ``scripts/powercut`` looks at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.powercut.campaign import Campaign

#: So many that regions were disarmed, and some of what was written then is old.
BACKUPS = 3
POINTS = 15


def test_after_a_power_cut_nothing_durable_is_lost_and_no_bitmap(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    cache = pytestconfig.cache
    assert cache is not None
    campaign = Campaign(tmp_path, cache.mkdir("guest"), seed=3)
    campaign.run(BACKUPS, POINTS)
    assert campaign.broken == []
    assert campaign.figures["points replayed"] == POINTS
    assert campaign.figures["changed granules"] > POINTS
    assert campaign.figures["overshoot granules"] < campaign.figures["armed granules"]
