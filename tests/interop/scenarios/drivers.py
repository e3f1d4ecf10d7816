"""Drivers that change nothing but how a node behaves, and those without a disk."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import Differs, Do, Scenario, do
from tests.interop.words import delete, export, file, refused, server


def add(driver: str, name: str = "d", **options: Any) -> Do:
    return do("blockdev-add", driver=driver, node_name=name, **options)


BELOW = do("blockdev-add", node_name="below", **file("n.img"))
READ_ONLY_BELOW = do("blockdev-add", node_name="below", **file("n.img", **{"read-only": True}))
GROUP = do("object-add", qom_type="throttle-group", id="g", limits={"iops-total": 1000})
ANY_ERROR = {"event": "none"}


def nbd(name: str, **server_options: Any) -> Do:
    return add("nbd", name, server={"type": "unix", "path": "DIR/peer.sock", **server_options})


SCENARIOS = [
    Scenario(
        "driver-null-co",
        [
            Differs(
                add("null-co", latency_ns=-1),
                "a negative number for an unsigned one is refused in one way",
                refused("Parameter 'latency-ns' expects uint64"),
            ),
            add("null-co"),
            add("null-co", "small", size=1000),
            add("null-co", "known", size=1 << 20, read_zeroes=True),
            delete("d"),
            delete("small"),
            delete("known"),
        ],
    ),
    Scenario(
        "driver-throttle",
        [
            BELOW,
            add("throttle", file="below", throttle_group="g"),
            add("throttle", file="nobody", throttle_group="g"),
            GROUP,
            add("throttle", file="below", throttle_group="g"),
            do("object-del", id="g"),
            delete("below"),
            server(),
            export("d", writable=True),
            delete("d"),
            do("block-export-del", id="e"),
            delete("d"),
            do("object-del", id="g"),
        ],
    ),
    Scenario(
        "driver-blkdebug",
        [
            BELOW,
            add("blkdebug", image="nobody"),
            add("blkdebug", image="below", inject_error=[{"event": "sometimes"}]),
            add("blkdebug", image="below", inject_error=[{"iotype": "read"}]),
            add("blkdebug", image="below", set_state=[{"event": "none"}]),
            add("blkdebug", image="below", inject_error=[{**ANY_ERROR, "iotype": "discard"}]),
            delete("below"),
            delete("d"),
            delete("below"),
        ],
    ),
    Scenario(
        "driver-copy-on-read",
        [
            READ_ONLY_BELOW,
            add("copy-on-read", file="below"),
            add("copy-on-read", file="below", read_only=True),
            delete("below"),
            BELOW,
            add("copy-on-read", file="below", bottom="nobody"),
            add("copy-on-read", file="below"),
            delete("d"),
        ],
    ),
    Scenario(
        "driver-nbd-where-nobody-is",
        [
            nbd("n"),
            add("nbd", "n", server={"type": "inet", "host": "127.0.0.1", "port": "1"}),
            add("nbd", "n", server={"type": "inet", "host": "no.invalid", "port": "1"}),
            add("nbd", "n", server={"type": "inet", "host": "no..label", "port": "1"}),
            add("nbd", "n", server={"type": "unix", "path": "/" + "s" * 200}),
            add("nbd", "n", server={"type": "unix", "path": "none at all", "abstract": True}),
            add("nbd", "n", server={"type": "vsock", "cid": "x", "port": "1"}),
            add("nbd", "n", server={"type": "vsock", "cid": "1", "port": "x"}),
            add("nbd", "n", server={"type": "vsock", "cid": "2", "port": "1023"}),
            Differs(
                add("nbd", "n", server={"type": "inet", "host": "127.0.0.1", "port": "66666"}),
                "the C library connects to what is left of the port in 16 bits",
                [
                    {
                        "error": {
                            "class": "GenericError",
                            "desc": "address resolution failed for 127.0.0.1:66666: "
                            "Servname not supported for ai_socktype",
                        }
                    }
                ],
            ),
        ],
    ),
]
