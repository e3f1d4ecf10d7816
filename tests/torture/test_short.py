"""A short campaign; ``scripts/torture`` makes long ones."""

from __future__ import annotations

from pathlib import Path

from tests.torture.campaign import Campaign

KILLS = 10


def test_kills_lose_no_bit(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed=6)
    campaign.run(lambda figures: figures["kills"] < KILLS)
    assert campaign.figures["bitmaps checked"] > KILLS
    assert campaign.figures["overshoot granules"] == 0
