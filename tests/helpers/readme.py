"""The README's commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def commands_in_blocks(root: Path) -> list[list[dict[str, Any]]]:
    """The README's blocks of JSON lines, their paths under ``root``."""
    text = README.read_text().replace('"/', f'"{root}/')
    blocks = re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [[json.loads(line) for line in block.splitlines()] for block in blocks]


def shell_lines(root: Path, program: str) -> list[list[str]]:
    """The README's indented lines that run ``program``, in the order that they are in."""
    text = README.read_text().replace(" /", f" {root}/").replace("=/", f"={root}/")
    return [line.split()[1:] for line in re.findall(rf"^    ({program} .*)$", text, re.MULTILINE)]
