"""The mark beside an incomplete target: durable before the first byte, and where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockd.backup import Sync
from blockd.block import Node, RawDriver
from tests.helpers.backup_rig import open_rig, pattern
from tests.helpers.driver_subjects import open_image
from tests.helpers.memory_driver import MemoryDriver

CONTENT = pattern(4)
MARK = "target.img.blockd-incomplete"

pytestmark = pytest.mark.usefixtures("small_backup_limits")


class Recorder:
    """What is done to files, in order, and to the target of the backup."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._directory = directory
        for name in ("fsync", "rename", "replace", "unlink"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, self._recorded(name, real))

    def _recorded(self, name: str, real: Any) -> Any:
        def call(*arguments: Any) -> None:
            last = arguments[-1]
            path = os.readlink(f"/proc/self/fd/{last}") if name == "fsync" else os.fspath(last)
            self.calls.append(f"{name} {self._short(path)}")
            real(*arguments)

        return call

    def _short(self, path: str) -> str:
        """The mark's file while it has another name is "new"."""
        if path == str(self._directory):
            return "directory"
        name = os.path.basename(path)
        return "new" if name.startswith(f"{MARK}.") else name

    def watch(self, target: MemoryDriver) -> None:
        def look(operation: str) -> int:
            self.calls.append(f"target: {operation}")
            return 0

        target.delay = look


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(tmp_path, monkeypatch)


def without_repeats(calls: list[str]) -> Iterator[str]:
    for at, call in enumerate(calls):
        if at == 0 or calls[at - 1] != call:
            yield call


async def test_everything_is_durable_before_the_next_step(
    tmp_path: Path, recorder: Recorder
) -> None:
    target = MemoryDriver(len(CONTENT))
    recorder.watch(target)

    async def empty() -> None:
        recorder.calls.append("target: emptied")

    async with open_rig(MemoryDriver(CONTENT), target) as rig:
        path = str(tmp_path / "target.img")
        assert await rig.copy(Sync.FULL, target_path=path, empty_target=empty) is None
    calls = [call for call in recorder.calls if call != "target: allocation"]
    assert [call.replace("replace", "rename") for call in without_repeats(calls)] == [
        "fsync new",
        f"rename {MARK}",
        "fsync directory",
        "target: emptied",
        "target: write",
        "target: flush",
        f"unlink {MARK}",
        "fsync directory",
    ]
    assert target.durable == CONTENT
    assert list(tmp_path.iterdir()) == []


async def test_the_mark_of_a_target_behind_a_symlink_lies_beside_the_file(tmp_path: Path) -> None:
    directory = tmp_path / "real"
    directory.mkdir()
    (directory / "target.img").write_bytes(bytes(len(CONTENT)))
    link = tmp_path / "link.img"
    link.symlink_to(directory / "target.img")
    driver = open_image(link)
    path = Node("target", driver).path
    await driver.close()

    target = MemoryDriver(len(CONTENT))
    hold = target.hold("write")
    async with open_rig(MemoryDriver(CONTENT), target) as rig:
        job = rig.job(Sync.FULL, target_path=path)
        await rig.start(job)
        with hold:
            await hold.reached.wait()
            assert {each.name for each in directory.iterdir()} == {"target.img", MARK}
            assert {each.name for each in tmp_path.iterdir()} == {"real", "link.img"}
        assert await rig.finish(job) is None
    assert {each.name for each in directory.iterdir()} == {"target.img"}


async def test_a_window_of_a_file_has_no_mark_that_others_would_share(tmp_path: Path) -> None:
    path = tmp_path / "target.img"
    path.write_bytes(bytes(64 * 1024))
    driver = open_image(path)
    file = Node("file", driver)
    half = driver.size_bytes // 2
    windows = [
        RawDriver(file, offset_bytes=0, size_bytes=half),
        RawDriver(file, offset_bytes=half, size_bytes=half),
        RawDriver(file, offset_bytes=half),
    ]
    assert [Node("window", window).path for window in windows] == [None, None, None]
    above = RawDriver(Node("window", windows[1]))
    assert Node("above", above).path is None
    assert Node("whole", RawDriver(file)).path == str(path)
    await driver.close()
