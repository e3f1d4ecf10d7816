"""Short campaigns; ``scripts/fuzz`` makes long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.campaign import TARGETS, Campaign

ROUNDS = 120


@pytest.mark.parametrize("target", TARGETS)
def test_random_input_does_no_harm(target: str, tmp_path: Path) -> None:
    Campaign(TARGETS[target], tmp_path, seed=1).run(lambda rounds: rounds < ROUNDS)
