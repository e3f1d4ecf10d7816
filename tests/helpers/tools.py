"""Programs of others that some tests hold blockd against."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

#: Where distributions keep programs for root that anybody may run, and that PATH may not name.
FOR_ROOT = "/usr/sbin:/sbin"


def require_tool(name: str) -> str:
    """The path of the program ``name``; without it the test fails, for it can be installed."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{FOR_ROOT}")
    if path is None:
        pytest.fail(f"{name} is not installed; .ci/run installs whatever the tests need")
    return path


def lacking(what: str) -> NoReturn:
    """Skip the test, for this machine can't do that; except in CI: what CI does not run, nobody
    runs.
    """
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and in CI no test may be skipped for that")
    pytest.skip(what)
