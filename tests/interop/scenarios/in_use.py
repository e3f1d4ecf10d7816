"""What may be done with a node that somebody uses, and who is said to be in the way.

In each story ``n`` is used in one way, and ``u`` and ``v`` are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.helpers.scenario import MIB, Asleep, Differs, Do, Scenario, Step, do
from tests.helpers.tidy import Message
from tests.interop.words import (
    backup,
    bitmap,
    delete,
    export,
    file,
    node,
    refused,
    server,
    unexport,
)

#: What is asked of ``n``. The last ones make something that the next ones would meet.
ASKED: dict[str, Do] = {
    "delete": delete("n"),
    "resize": do("block_resize", node_name="n", size=4 * MIB),
    "target": backup(job_id="k", device="v", target="n"),
    "write": export("w", name="w", writable=True),
    "write-older": do("nbd-server-add", device="n", name="z", writable=True),
    "read": export("r", name="r"),
    "bitmap": bitmap("x"),
    "parent": node("over", file="n"),
    "window": node("part", file="n", offset=512),
}


def story(name: str, steps: Sequence[Step], asked: Iterable[str], **different: Differs) -> Scenario:
    """``n`` is used, and then what is ``asked`` is done; ``different`` are answers of our own."""
    free = [node("u"), node("v", file=file("m.img")), server()]
    done = [different.get(each.replace("-", "_"), ASKED[each]) for each in asked]
    return Scenario(f"in-use-{name}", [*free, *steps, *done])


def over(*steps: Step, **options: object) -> list[Step]:
    """``p`` over ``n``, a file node."""
    below = do("blockdev-add", node_name="n", **file("n.img"))
    return [below, node("p", file="n", **options), *steps]


def beside(*steps: Step) -> list[Step]:
    """``n`` and ``q`` over one file node."""
    below = do("blockdev-add", node_name="f", **file("n.img"))
    return [below, node("n", file="f"), node("q", file="f"), *steps]


def slow(device: str, target: str, **options: object) -> list[Step]:
    return [backup(device=device, target=target, speed=1, **options), Asleep()]


T = node("t")
#: What starts no job: the rest would, and that ends as time will have it.
STILL = ["delete", "resize", "write", "write-older", "read", "bitmap", "parent", "window"]
#: The peer's parents would keep their sizes.
NOT_RESIZED = [name for name in STILL if name != "resize"]
NO_FILTER = "ours has no node of its own over the source"
RESIZE = (
    "Permission conflict on node 'n': permissions 'resize' are both required by an unnamed block "
    "device (uses node 'n' as 'root' child) and unshared by block job 'j' (uses node 'n' as "
    "'source' child)."
)
FILL = (
    "Could not create node: Permission conflict on node 'n': permissions 'write' are both required "
    "by block job 'k' (uses node 'n' as 'target' child) and unshared by block job 'j' (uses node "
    "'n' as 'source' child)."
)
GONE: list[Message] = [
    {"event": "BLOCK_EXPORT_DELETED", "data": {"id": "w"}},
    {"return": {}},
]
AT_ANY_TIME = "a guest may come at any time: its writes pass the backup's view"
SOURCE = Scenario(
    "in-use-source",
    [
        node("n"),
        T,
        node("v", file=file("m.img")),
        server(),
        *slow("n", "t"),
        ASKED["delete"],
        Differs(ASKED["resize"], NO_FILTER, refused(RESIZE)),
        Differs(ASKED["target"], NO_FILTER, refused(FILL)),
        Differs(ASKED["write"], AT_ANY_TIME, [{"return": {}}]),
        Differs(unexport("w"), AT_ANY_TIME, GONE),
        ASKED["read"],
        unexport("r"),
        ASKED["bitmap"],
    ],
)

SCENARIOS = [
    SOURCE,
    story("exported", [node("n"), export("e")], STILL),
    story("exported-to-write", [node("n"), export("e", writable=True)], STILL),
    story("read-only", [node("n", read_only=True), export("e")], [*STILL, "target"]),
    story("child", over(), NOT_RESIZED),
    story("child-in-part", over(offset=512), STILL),
    story("child-exported", over(export("e", "p")), STILL),
    story("child-exported-to-write", over(export("e", "p", writable=True)), STILL),
    story("child-source", over(T, *slow("p", "t")), ["delete", "resize", "write", "write-older"]),
    story("child-target", over(T, *slow("u", "p")), STILL),
    story("inline-child", [node("p", file=file("n.img", **{"node-name": "n"}))], NOT_RESIZED),
    story("beside-a-writer", beside(export("e", "q", writable=True)), STILL),
    story("beside-a-source", beside(T, *slow("q", "t")), ["resize", "write", "read", "bitmap"]),
    story("beside-a-target", beside(T, *slow("u", "q")), ["resize", "write", "read", "bitmap"]),
]
