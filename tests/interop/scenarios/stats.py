"""query-blockstats."""

from __future__ import annotations

from dataclasses import dataclass

from tests.helpers.scenario import MIB, Connect, Differs, Scenario, Stage, Write, do
from tests.helpers.tidy import Message
from tests.interop.words import DISKS, ENDED, GUEST_DISKS, backup, export, file, node

STATS = do("query-blockstats", query_nodes=True)


@dataclass(frozen=True)
class Trim:
    """A guest that writes there already gives up a range."""

    export: str
    offset: int
    length: int

    def play(self, stage: Stage) -> list[Message]:
        stage.guests[self.export].trim(self.offset, self.length)
        return []


@dataclass(frozen=True)
class Highest:
    """All that the peer counts of a node which is not a device: of each, and of the one below."""

    def play(self, stage: Stage) -> list[Message]:
        *events, reply = STATS.play(stage)
        return [*events, *[_brief(node) for node in reply["return"]]]


def _brief(node: Message) -> Message:
    brief = {
        "node-name": node["node-name"],
        "highest": node["stats"]["wr_highest_offset"],
        "specific": node.get("driver-specific"),
    }
    return brief | ({"parent": _brief(node["parent"])} if "parent" in node else {})


@dataclass(frozen=True)
class Written:
    """How often and how much was written to a node."""

    node: str

    def play(self, stage: Stage) -> list[Message]:
        *_, reply = STATS.play(stage)
        stats = {node["node-name"]: node["stats"] for node in reply["return"]}[self.node]
        return [{name: stats[name] for name in ("wr_operations", "wr_bytes", "rd_operations")}]


SCENARIOS = [
    Scenario(
        "stats-of-nodes-that-nobody-used",
        [
            STATS,
            do("blockdev-add", node_name="f", **file("n.img")),
            node("n", file="f"),
            node("m", read_only=True),
            STATS,
            do("query-blockstats"),
            do("query-blockstats", query_nodes=False),
            do("query-blockstats", query_nodes=1),
            do("query-blockstats", wat=1),
        ],
    ),
    Scenario(
        "stats-of-writes",
        [
            *GUEST_DISKS,
            node("w", file=file("m.img"), offset=4096, discard="unmap"),
            export("w", "w", writable=True),
            Connect("n"),
            Highest(),
            Write("n", MIB, 100),
            Highest(),
            Write("n", 4096, 100),
            Highest(),
            Differs(
                Written("n"),
                "the peer counts the requests of devices only",
                [{"wr_operations": 2, "wr_bytes": 200, "rd_operations": 0}],
            ),
            Write("w", 100, 100),
            Trim("w", 0, 4096),
            Trim("w", 65, 511),
            Trim("n", MIB, MIB),
            Highest(),
        ],
    ),
    Scenario("stats-of-a-target", [*DISKS, backup(), ENDED, Highest()]),
]
