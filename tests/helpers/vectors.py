"""The published vectors: what is in ``protocol/vectors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parents[2] / "protocol" / "vectors"


def load(name: str) -> dict[str, Any]:
    """The file ``name``."""
    content: dict[str, Any] = json.loads((VECTORS / name).read_text(encoding="utf-8"))
    return content


def named(name: str, part: str) -> dict[str, dict[str, Any]]:
    """The vectors in a file's list ``part``, by name."""
    vectors = load(name)[part]
    found = {vector["name"]: vector for vector in vectors}
    assert len(found) == len(vectors)
    return found
