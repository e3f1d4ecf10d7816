"""Objects that commands make for other commands to name."""

from __future__ import annotations

from typing import Any

from tests.helpers.scenario import Do, Scenario, do


def add(kind: str, name: str = "o", **options: Any) -> Do:
    return do("object-add", qom_type=kind, id=name, **options)


def delete(name: str = "o") -> Do:
    return do("object-del", id=name)


def group(**limits: int) -> list[Do]:
    """The same limits in both forms; each is deleted if it came to be."""
    told = {name.replace("_", "-"): value for name, value in limits.items()}
    older = {f"x-{name}": value for name, value in told.items()}
    return [
        add("throttle-group", "new", limits=told),
        delete("new"),
        add("throttle-group", "old", **older),
        delete("old"),
    ]


#: What the peer takes of one limit, and what it does not.
LIMITS: list[dict[str, int]] = [
    {"bps_total": 100, "bps_read": 5},
    {"iops_total": 100, "iops_write": 5},
    {"bps_total_max": 5, "bps_read_max": 5, "bps_read": 1},
    {"bps_total": 10**15},
    {"bps_total": 10**15 + 1},
    {"bps_total": 10, "bps_total_max": 10**15 + 5},
    {"bps_total_max": 5},
    {"bps_total": 5, "bps_read_max": 5},
    {"bps_total": 10, "bps_total_max": 5},
    {"iops_total": 10, "iops_total_max": 5},
    {"bps_total": 10, "bps_total_max": 10},
    {"bps_total": 0, "bps_total_max": 0},
    {"bps_total": 10, "bps_total_max": 50, "bps_total_max_length": 0},
    {"bps_total": 10, "bps_total_max": 50, "bps_total_max_length": 2**32 - 1},
    {"bps_total": 10, "bps_total_max": 10**6, "bps_total_max_length": 10**9},
    {"bps_total": 10, "bps_total_max": 10**6, "bps_total_max_length": 10**9 + 1},
    {"bps_total": 10, "bps_total_max_length": 5},
    {"bps_total_max_length": 5},
    {"bps_total_max_length": 0},
    {"bps_write": 3, "bps_read_max_length": 0},
    {"iops_size": 4096},
    {"iops_size": 4096, "iops_read": 1},
    {"iops_total": 1, "iops_total_max": 2, "iops_total_max_length": 3, "bps_read": 4},
]

SCENARIOS = [
    Scenario(
        "objects-ids",
        [
            *[
                step
                for name in ("a", "a.b", "a-b_c9", "x" * 200)
                for step in (add("iothread", name), add("iothread", name), delete(name))
            ],
            *[add("iothread", name) for name in ("", "1", "a b", "-a", "a/b", "é", "a#")],
            delete(),
            delete(""),
            do("object-del"),
            do("object-del", id="o", x=1),
            add("secret", data="s"),
            add("secret", data="other"),
            add("iothread"),
            add("tls-creds-x509"),
            delete(),
            delete(),
        ],
    ),
    Scenario(
        "objects-arguments",
        [
            do("object-add"),
            do("object-add", id="o"),
            do("object-add", qom_type="secret"),
            do("object-add", qom_type=5, id="o"),
            do("object-add", qom_type="wat", id=5),
            add("secret", wat=1),
            add("secret", data=5),
            add("secret", data="x", format="wat"),
            add("throttle-group", limits=5),
            add("throttle-group", limits={"wat": 1}),
            add("throttle-group", limits={"bps-total": "1"}),
            add("throttle-group", x_bps_total=1.5),
            add("tls-creds-x509", endpoint="wat"),
            add("tls-creds-anon", dir=5),
            add("iothread", poll_max_ns="1"),
        ],
    ),
    Scenario(
        "objects-secrets",
        [
            add("secret"),
            add("secret", data="x", file="DIR/small.img"),
            add("secret", file="DIR/none"),
            add("secret", file="DIR"),
            add("secret", file=""),
            add("secret", data="!!", format="base64"),
            add("secret", data=" eA==", format="base64"),
            add("secret", file="DIR/small.img", format="base64"),
            add("secret", "a", data=""),
            add("secret", "b", data="é"),
            add("secret", "c", data="eA=\n=", format="base64"),
            add("secret", "d", file="DIR/small.img"),
        ],
    ),
    Scenario(
        "objects-tls",
        [
            add("tls-creds-x509"),
            add("tls-creds-x509", dir="DIR/none", endpoint="server"),
            add("tls-creds-x509", dir="DIR", endpoint="client"),
            add("tls-creds-x509", dir="DIR/n.img"),
            add("tls-creds-psk", endpoint="server"),
            add("tls-creds-psk", dir="DIR/none"),
            add("tls-creds-psk", dir="DIR", endpoint="server", username="u"),
            add("tls-creds-anon"),
            add("tls-creds-anon", "server", endpoint="server", dir="DIR/none", verify_peer=False),
        ],
    ),
    Scenario(
        "objects-iothreads",
        [
            add("iothread", poll_max_ns=-1),
            add("iothread", poll_grow=-1),
            add("iothread", aio_max_batch=-1),
            add("iothread", thread_pool_max=-1),
            add("iothread", thread_pool_max=0),
            add("iothread", thread_pool_min=5, thread_pool_max=3),
            add("iothread", thread_pool_min=65),
            add("iothread", poll_max_ns=2**62, poll_shrink=1, thread_pool_min=64),
        ],
    ),
    Scenario("objects-throttle-groups", [step for limits in LIMITS for step in group(**limits)]),
    Scenario(
        "objects-throttle-groups-in-two-forms",
        [
            add("throttle-group", "a", limits={"bps-total": 2}, x_bps_total=1),
            add("throttle-group", limits={"bps-total": 2}, x_bps_read=1),
            add("throttle-group", x_bps_total=-1),
            add("throttle-group", x_iops_size=-1),
            add("throttle-group", limits={"bps-total": -1}),
        ],
    ),
]
