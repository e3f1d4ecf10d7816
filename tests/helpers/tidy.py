"""What two daemons may tell differently without differing: times, paths, how far a job has got."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

Message = dict[str, Any]

#: How a backup job begins.
START = ["created", "running", "paused", "running"]

#: The changes of a job that come before the reply to a command which only begins something. What
#: happens to the job then is seen before the reply or after it, as time will have it.
BEFORE_REPLY = {
    "blockdev-backup": START,
    "drive-backup": START,
    "transaction": START,
    "blockdev-create": ["created", "running"],
    "block-job-pause": [],
    "job-pause": [],
    "block-job-resume": ["running"],
    "job-resume": ["running"],
    "block-job-set-speed": [],
}

#: How the files are called that hold no raw image.
IMAGE_SUFFIX = ".q"

#: Fields of a job that tell how far it has got, and that its end is reached.
PROGRESS = [("offset", "len"), ("current-progress", "total-progress")]


def tidy(message: Message, directory: Path) -> Message:
    """``message`` with paths relative to DIR and all that depends on time or build left out."""
    text = json.dumps(message).replace(str(directory), "DIR")
    tidied: Message = _tidy_value(json.loads(re.sub(r"#block\d+", "#block", text)))
    tidied.pop("timestamp", None)
    if tidied.get("event") == "BLOCK_IMAGE_CORRUPTED":
        # Each program describes the damage in its own words, and tells where it is or not.
        tidied["data"] = {key: tidied["data"][key] for key in ("device", "node-name", "fatal")}
    return tidied


def _tidy_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_tidy_value(item) for item in value if not _is_unnamed_filter(item)]
    if not isinstance(value, dict):
        return value
    tidied = {key: _tidy_value(item) for key, item in value.items()}
    for part, whole in PROGRESS:
        if {part, whole} <= tidied.keys() and tidied[part] != tidied[whole]:
            tidied[part] = "partial"
    if _is_filter(tidied):
        # How far the copying has got, and what the peer's filter stands on besides.
        del tidied["backing_file_depth"]
        tidied.pop("dirty-bitmaps", None)
        tidied["image"].pop("backing-image", None)
    if "actual-size" in tidied:
        tidied["actual-size"] = "some"
        if tidied["format"] == "file" and tidied["filename"].endswith(IMAGE_SUFFIX):
            # Each program lets the file of an image grow in its own way.
            tidied["virtual-size"] = "some"
    if tidied.get("status") == "running":
        tidied.pop("busy", None)
    if "package" in tidied:
        tidied["package"] = "name"
        tidied["qemu"] = sorted(tidied["qemu"])
    return tidied


def _is_filter(value: Any) -> bool:
    """Whether this is the node that keeps the old data of a backup's source."""
    return isinstance(value, dict) and value.get("drv") == "copy-before-write"


def _is_unnamed_filter(value: Any) -> bool:
    """The peer lists such a node for each backup, ours only where it was given a name."""
    return _is_filter(value) and value["node-name"].startswith("#block")


def statuses(items: list[Message], job: str) -> list[str]:
    """What JOB_STATUS_CHANGE says of ``job``, in order."""
    return [
        item["data"]["status"]
        for item in items
        if item.get("event") == "JOB_STATUS_CHANGE" and item["data"]["id"] == job
    ]


def without_noise(items: list[Message]) -> list[Message]:
    """``items`` without the pauses that no client asked for, and with exports in order.

    The peer pauses and resumes every job whenever it changes its graph of nodes: any number of
    pairs, as time will have it. The pair with which a job begins is no noise.
    """
    kept: list[Message] = []
    for item in items:
        kept.append(item)
        for job in _running_again(item):
            seen = statuses(kept, job)
            if seen[-2:] == ["paused", "running"] and seen != START:
                del kept[-1]
                del kept[max(n for n, kept_item in enumerate(kept) if statuses([kept_item], job))]
    return _exports_in_order(kept)


def _exports_in_order(items: list[Message]) -> list[Message]:
    """Exports that end one after another do so in any order: those with a client take longer."""
    ended = sorted(
        (item for item in items if item.get("event") == "BLOCK_EXPORT_DELETED"),
        key=lambda item: str(item["data"]["id"]),
    )
    return [ended.pop(0) if item.get("event") == "BLOCK_EXPORT_DELETED" else item for item in items]


def _running_again(item: Message) -> list[str]:
    """The job that ``item`` says is running, if it does."""
    if item.get("event") == "JOB_STATUS_CHANGE" and item["data"]["status"] == "running":
        return [item["data"]["id"]]
    return []


def split_at_reply(
    command: str, arguments: Message, events: list[Message]
) -> tuple[list[Message], list[Message]]:
    """The events that belong before the reply to ``command``, and those that only happened to."""
    changes = BEFORE_REPLY.get(command)
    if changes is None:
        return events, []
    jobs = jobs_of(command, arguments)
    for end in range(len(events) + 1):
        if all(statuses(events[:end], job) == changes for job in jobs):
            rest = events[end:]
            others = [event for event in rest if not {*jobs} & {*event["data"].values()}]
            return events[:end] + others, [event for event in rest if event not in others]
    return events, []


def jobs_of(command: str, arguments: Message) -> list[str]:
    """The jobs that a command is about."""
    if command == "transaction":
        datas = [action["data"] for action in arguments["actions"]]
        return [data["job-id"] for data in datas if "job-id" in data]
    return [next(arguments[key] for key in ("job-id", "id", "device") if key in arguments)]


def job_by_job(items: list[Message]) -> list[Message]:
    """``items`` with each run of events in the order of the jobs that they are about."""
    runs = itertools.groupby(items, key=lambda item: "event" in item)
    return [
        item for is_events, run in runs for item in (sorted(run, key=_job) if is_events else run)
    ]


def _job(event: Message) -> str:
    data = event["data"]
    return str(data.get("id", data.get("device")))
