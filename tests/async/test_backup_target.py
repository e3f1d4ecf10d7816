"""What a drive-backup's target leaves behind where it can't be made: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockd.backup import FilterDriver
from blockd.block import Driver, FileDriver, Graph, Hold, Node
from blockd.errors import BlockdError
from blockd.qmp.commands.backup_target import TargetFiles
from blockd.qmp.types.backup import DriveBackup
from tests.helpers.command_rig import command_rig
from tests.helpers.memory_driver import MemoryDriver
from tests.helpers.qcow2 import qemu_img

SIZE = 64 * 1024


class FilesOnly(Graph):
    """Nothing can be put over a file."""

    def add(self, name: str | None, driver: Driver, **options: Any) -> Node:
        if not isinstance(driver, FileDriver):
            raise BlockdError("no such node today")
        return super().add(name, driver, **options)


@pytest.mark.parametrize("rehearsing", [False, True])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
async def test_a_node_that_is_refused_leaves_none_below(
    tmp_path: Path,
    mode: Any,
    kind: str,
    rehearsing: bool,
) -> None:
    target = tmp_path / "target"
    if mode == "existing":
        qemu_img("create", "-f", kind, target, str(SIZE))
    before = sorted(tmp_path.iterdir())
    arguments = DriveBackup(
        job_id="j", device="n", sync="full", target=str(target), format=kind, mode=mode
    )
    graph = FilesOnly()
    for _ in range(2):
        # The second time the file must not be locked.
        with pytest.raises(BlockdError, match="no such node today"):
            await TargetFiles(graph, rehearsing=rehearsing).open(
                arguments, Node("n", MemoryDriver(SIZE))
            )
        assert not list(graph)
        assert sorted(tmp_path.iterdir()) == before


async def test_a_filter_that_is_refused_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with command_rig(n=MemoryDriver(SIZE), t=MemoryDriver(SIZE)) as rig:
        hold = rig.graph.hold

        def refuse_filters(node: Node, *arguments: Any, **options: Any) -> Hold:
            if isinstance(node.driver, FilterDriver):
                raise BlockdError("no such filter today")
            return hold(node, *arguments, **options)

        monkeypatch.setattr(rig.graph, "hold", refuse_filters)
        with pytest.raises(BlockdError, match="no such filter today"):
            await rig.execute(
                "blockdev-backup",
                **{"job-id": "j", "device": "n", "target": "t", "sync": "full"},
                filter_node_name="f",
            )
        assert {node.name for node in rig.graph} == {"n", "t"}
        assert not any(node.users for node in rig.graph)
