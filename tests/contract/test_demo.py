"""The demo, as a user starts it once its environment is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

from tests.helpers.logged_guest import SMALLEST_DISK_BYTES

ROOT = Path(__file__).parents[2]

#: A user's environment has blockd and what it needs, but not what its tests need.
WITHOUT_TEST_TOOLS = """
import runpy, sys
sys.modules["pytest"] = None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_demo(image: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TEST_TOOLS, ROOT / "scripts" / "demo.py", image],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,  # only bounds a hang
    )


def test_the_demo_succeeds_on_an_image_and_leaves_no_trace(tmp_path: Path) -> None:
    image = tmp_path / "mine.img"
    content = Random(0).randbytes(SMALLEST_DISK_BYTES)
    image.write_bytes(content)
    result = run_demo(image)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("All as promised.\n")
    assert image.read_bytes() == content
    assert list(tmp_path.iterdir()) == [image]


def test_the_demo_refuses_what_it_cannot_work_on(tmp_path: Path) -> None:
    image = tmp_path / "mine.qcow2"
    image.write_bytes(b"QFI\xfb" + bytes(SMALLEST_DISK_BYTES))
    result = run_demo(image)
    assert result.returncode == 1
    assert "is a qcow2 image" in result.stderr
    assert list(tmp_path.iterdir()) == [image]
