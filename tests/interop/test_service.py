"""The unit file, read by systemd itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tools import require_tool

UNIT = Path(__file__).parents[2] / "systemd" / "blockd.service"


def test_systemd_has_nothing_to_say_about_the_unit() -> None:
    tool = require_tool("systemd-analyze")
    result = subprocess.run(
        [tool, "verify", UNIT],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_service_stays_hardened() -> None:
    """systemd's own score, 0 (closed) to 100; what is open is what opening disks needs."""
    tool = require_tool("systemd-analyze")
    result = subprocess.run(
        [tool, "security", "--offline=true", "--threshold=25", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stdout
