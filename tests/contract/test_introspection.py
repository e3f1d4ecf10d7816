"""What the daemon says of itself, and whether its answers and events are as it says."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from blockd.qmp.commands import COMMANDS, schema
from blockd.qmp.introspection import describe
from blockd.qmp.types.base import Command, Nothing
from blockd.qmp.types.blockdev import BlockdevRefOrNull
from blockd.qmp.types.event import EVENTS
from blockd.qmp.types.introspection import SchemaEntity
from tests.helpers.daemon import Daemon
from tests.helpers.qcow2_damage import first_data, make_damaged
from tests.helpers.qmp_client import QmpClient

DISK_BYTES = 1 << 20
RETURNS = {command.name: getattr(command.declaration, "returns", Nothing) for command in COMMANDS}
DATA = {event.event: event for event in EVENTS}


class Checked:
    """A client that holds every answer and every event to its declaration, and counts them."""

    def __init__(self, client: QmpClient) -> None:
        self._client = client
        self.full_answers: set[str] = set()
        self.heard: set[str] = set()

    def do(self, command: str, **arguments: Any) -> Any:
        sent = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer = self._client.execute(command, sent)
        msgspec.convert(answer, RETURNS[command])
        # A schema's defaults are null; everything else is absent instead.
        assert command == "query-qmp-schema" or None not in list(leaves(answer)), command
        if answer:
            self.full_answers.add(command)
        return answer

    def until(self, name: str, **data: Any) -> None:
        """Wait for an event; what came before it is checked too."""
        while True:
            event = self._client.next_event()
            told = event["data"]
            msgspec.convert(told, DATA[event["event"]])
            assert None not in list(leaves(told)), event
            self.heard.add(event["event"])
            if event["event"] == name and data.items() <= told.items():
                return


def leaves(value: Any) -> Iterator[Any]:
    match value:
        case dict():
            for member in value.values():
                yield from leaves(member)
        case list():
            for item in value:
                yield from leaves(item)
        case _:
            yield value


#: Events that ``tests/crash`` hears, and holds against their declarations.
TOLD_OF_KEPT_BITMAPS = {
    "BLOCK_DIRTY_BITMAP_RECOVERED",
    "BLOCK_DIRTY_BITMAPS_UNSAFE",
    "BLOCK_DIRTY_BITMAPS_SAFE",
}


def test_answers_and_events_are_as_declared(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"x" * DISK_BYTES)
    with QmpClient(daemon.qmp_path) as client:
        checked = Checked(client)
        make_everything(checked, tmp_path)
        fail_and_finish_a_backup(checked, daemon, tmp_path)
        cancel_a_backup(checked, tmp_path)
        exceed_a_threshold(checked, tmp_path)
        find_damage(checked, tmp_path)
        checked.do("transaction", dry_run=True, actions=[{"type": "abort", "data": {}}])
        for command in ("query-version", "query-commands", "query-qmp-schema", "query-block"):
            checked.do(command)
        checked.do("query-blockstats", query_nodes=True)
        checked.do("block-export-del", id="e")
        checked.until("BLOCK_EXPORT_DELETED", id="e")
    returning = {command for command, returns in RETURNS.items() if returns is not Nothing}
    # The peer has no devices either.
    assert checked.full_answers == returning - {"query-block"}
    assert checked.heard == DATA.keys() - TOLD_OF_KEPT_BITMAPS


def make_everything(checked: Checked, directory: Path) -> None:
    file = {"driver": "file", "filename": str(directory / "disk.img")}
    checked.do("blockdev-add", driver="raw", node_name="n", file=file)
    for name in ("b", "c"):
        checked.do("block-dirty-bitmap-add", node="n", name=name)
    address = {"type": "unix", "data": {"path": str(directory / "nbd.sock")}}
    checked.do("nbd-server-start", addr=address)
    checked.do("block-export-add", id="e", type="nbd", node_name="n")
    checked.do("query-block-exports")


def backup(checked: Checked, directory: Path, **options: Any) -> None:
    target = str(directory / "target.img")
    checked.do("drive-backup", job_id="j", device="n", target=target, format="raw", **options)


def look(checked: Checked) -> None:
    for query in ("query-jobs", "query-block-jobs", "query-named-block-nodes"):
        checked.do(query)


def fail_and_finish_a_backup(checked: Checked, daemon: Daemon, directory: Path) -> None:
    """The kernel refuses some of the writes to the target, which stops the job; then no more."""
    (directory / "target.img").write_bytes(bytes(DISK_BYTES))
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (DISK_BYTES // 2, unlimited))
    backup(
        checked,
        directory,
        mode="existing",
        sync="full",
        on_target_error="stop",
        auto_finalize=False,
        auto_dismiss=False,
    )
    checked.until("BLOCK_JOB_ERROR")
    look(checked)
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    checked.do("job-resume", id="j")
    checked.until("BLOCK_JOB_PENDING")
    checked.do("job-finalize", id="j")
    checked.until("BLOCK_JOB_COMPLETED")
    checked.do("job-dismiss", id="j")


def cancel_a_backup(checked: Checked, directory: Path) -> None:
    backup(checked, directory, sync="bitmap", bitmap="b", bitmap_mode="never", auto_finalize=False)
    look(checked)
    checked.do("block-job-cancel", device="j")
    checked.until("BLOCK_JOB_CANCELLED")
    checked.until("JOB_STATUS_CHANGE", status="null")


# -- the schema itself ---------------------------------------------------------------------------


def test_it_is_of_the_form_that_it_declares() -> None:
    msgspec.convert(schema(), list[SchemaEntity])


def test_every_type_is_there_once_and_is_used() -> None:
    kinds = {entity["name"]: entity["meta-type"] for entity in schema()}
    assert len(kinds) == len(schema())
    calls = {name for name, kind in kinds.items() if kind in ("command", "event")}
    used = {name for entity in schema() for name in used_types(entity)}
    assert used == kinds.keys() - calls


def used_types(entity: dict[str, Any]) -> Iterator[str]:
    for key in ("arg-type", "ret-type", "element-type"):
        if key in entity:
            yield entity[key]
    if entity["meta-type"] != "enum":
        for part in (*entity.get("members", ()), *entity.get("variants", ())):
            yield part["type"]


def test_commands_and_events_are_the_ones_there_are(daemon: Daemon) -> None:
    with QmpClient(daemon.qmp_path) as client:
        commands = {each["name"] for each in client.execute("query-commands")}
        told = client.execute("query-qmp-schema")
    assert told == schema()
    assert {each["name"] for each in told if each["meta-type"] == "command"} == commands
    assert {each["name"] for each in told if each["meta-type"] == "event"} == DATA.keys()


def test_null_is_a_type_where_it_has_a_meaning() -> None:
    class Image(Command, kw_only=True):
        backing: BlockdevRefOrNull | UnsetType = UNSET

    entities = {entity["name"]: entity for entity in describe({"make-image": Image}, [])}
    choice = entities["BlockdevRefOrNull"]
    assert entities["Image"]["members"] == [
        {"name": "backing", "type": "BlockdevRefOrNull", "default": None}
    ]
    assert {part["type"] for part in choice["members"]} == {"str", "null", "NodeOptions"}
    assert entities["null"] == {"name": "null", "meta-type": "builtin", "json-type": "null"}


def test_a_node_may_hold_one_of_its_own_kind() -> None:
    types = {entity["name"]: entity for entity in schema()}
    below = {part["name"]: part for part in types["RawOptions"]["members"]}["file"]["type"]
    assert below == "BlockdevRef"
    assert {part["type"] for part in types[below]["members"]} == {"str", "NodeOptions"}


def exceed_a_threshold(checked: Checked, directory: Path) -> None:
    (directory / "t.img").write_bytes(bytes(DISK_BYTES))
    file = {"driver": "file", "filename": str(directory / "t.img")}
    checked.do("blockdev-add", driver="raw", node_name="t", file=file)
    checked.do("block-set-write-threshold", node_name="t", write_threshold=1)
    checked.do("blockdev-backup", job_id="k", device="n", target="t", sync="full")
    checked.until("BLOCK_WRITE_THRESHOLD")
    checked.until("JOB_STATUS_CHANGE", id="k", status="null")


def find_damage(checked: Checked, directory: Path) -> None:
    make_damaged(directory / "d.q", first_data)
    file = {"driver": "file", "filename": str(directory / "d.q")}
    checked.do("blockdev-add", driver="qcow2", node_name="d", file=file)
    target = str(directory / "d.img")
    checked.do("drive-backup", job_id="k", device="d", target=target, sync="full", format="raw")
    checked.until("BLOCK_IMAGE_CORRUPTED")
    checked.until("JOB_STATUS_CHANGE", id="k", status="null")
