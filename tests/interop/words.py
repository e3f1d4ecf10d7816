"""The words that the scenarios are written in: the commands they use most, and usual waits."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import MIB, Asleep, Differs, Do, Step, Until, Write, do
from tests.helpers.tidy import Message

CLUSTER = 64 * 1024
SERVER = {"type": "unix", "data": {"path": "DIR/nbd.sock"}}


def file(name: str, **options: Any) -> dict[str, Any]:
    """A protocol node as an inline child."""
    return {"driver": "file", "filename": f"DIR/{name}", **options}


def node(name: str, **options: Any) -> Do:
    """The raw node ``name`` over NAME.img; ``file`` overrides what it is over."""
    return do(
        "blockdev-add",
        driver="raw",
        node_name=name,
        **{"file": file(f"{name}.img"), **options},
    )


def delete(name: str) -> Do:
    return do("blockdev-del", node_name=name)


def server(address: Any = None, **options: Any) -> Do:
    return do("nbd-server-start", addr=SERVER if address is None else address, **options)


def export(identifier: str, on: str = "n", **options: Any) -> Do:
    return do("block-export-add", type="nbd", id=identifier, node_name=on, **options)


def unexport(identifier: str, **options: Any) -> Do:
    return do("block-export-del", id=identifier, **options)


def bitmap(name: str, on: str = "n", **options: Any) -> Do:
    return do("block-dirty-bitmap-add", node=on, name=name, **options)


def each_bitmap_command(on: str, name: str, *commands: str) -> list[Step]:
    """``remove``, ``clear`` and so on, of one bitmap."""
    return [do(f"block-dirty-bitmap-{command}", node=on, name=name) for command in commands]


def merge(target: str, *sources: Any, on: str = "n") -> Do:
    return do("block-dirty-bitmap-merge", node=on, target=target, bitmaps=[*sources])


def backup(**options: Any) -> Do:
    """A blockdev-backup of ``n`` to ``t``, full where nothing else is said, as job ``j``."""
    defaults = {"job_id": "j", "device": "n", "target": "t", "sync": "full"}
    return do("blockdev-backup", **{**defaults, **options})


def slow_backup(job: str = "j", **options: Any) -> list[Step]:
    """A backup that has copied one chunk, and sleeps now for longer than any test takes."""
    return [backup(job_id=job, speed=1, **options), Asleep(job)]


def drive_backup(**options: Any) -> Do:
    """A drive-backup of ``n`` to the existing raw file t.img, as job ``j``."""
    defaults = {"job_id": "j", "device": "n", "target": "DIR/t.img", "sync": "full"}
    return do("drive-backup", **{**defaults, "mode": "existing", "format": "raw", **options})


def status(which: str, job: str = "j") -> Until:
    """Wait for a job to be ``paused``, ``concluded`` and so on."""
    return Until("JOB_STATUS_CHANGE", {"id": job, "status": which})


def not_kept(step: Do, node: str = "n") -> Differs:
    """A persistent bitmap where nothing can keep it."""
    why = f"Can't store persistent bitmaps to {node}: Operation not supported"
    return Differs(step, "ours tells the way out", refused(f"{why}: start blockd with --state-dir"))


def refused(description: str) -> list[Message]:
    """What is seen of a command that is refused."""
    return [{"error": {"class": "GenericError", "desc": description}}]


#: Until the job is gone.
ENDED = status("null")

#: Nodes ``n`` and ``t``, to back up from and to.
DISKS: list[Step] = [node("n"), node("t")]

#: The same, and ``n`` exported for writing.
GUEST_DISKS: list[Step] = [*DISKS, server(), export("e", writable=True)]

#: Two places to write to that lie in different chunks of a copy.
TWO_WRITES: list[Step] = [Write("n", 0, 512), Write("n", 2 * MIB, CLUSTER)]
