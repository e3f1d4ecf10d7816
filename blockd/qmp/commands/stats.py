"""query-blockstats."""

from __future__ import annotations

from typing import Any

from blockd.block import Accounts, Counts, Graph, Node, Role
from blockd.qmp.services import Services
from blockd.qmp.types.block import QueryBlockstats


def query_blockstats(services: Services, arguments: QueryBlockstats) -> list[dict[str, Any]]:
    graph = services.graph
    if not arguments.query_nodes:
        return []
    return [_describe(graph, node) for node in reversed(list(graph))]


def _describe(graph: Graph, node: Node) -> dict[str, Any]:
    described = {"node-name": node.name, "stats": _describe_accounts(graph.accounts(node))}
    discards = node.driver.discards
    if discards is not None:
        described["driver-specific"] = {
            "driver": node.driver.name,
            "discard-nb-ok": discards.operations,
            "discard-nb-failed": discards.failed,
            "discard-bytes-ok": discards.total_bytes,
        }
    child = node.driver.children.get(Role.FILE)
    if child is not None:
        described["parent"] = _describe(graph, child)
    return described


def _describe_accounts(accounts: Accounts) -> dict[str, Any]:
    described: dict[str, Any] = {
        "wr_highest_offset": accounts.highest,
        "account_invalid": False,
        "account_failed": False,
        "timed_stats": [],
    }
    kinds = {
        "rd": accounts.read,
        "wr": accounts.write,
        "flush": accounts.flush,
        "unmap": accounts.unmap,
        "zone_append": Counts(),
    }
    for name, counts in kinds.items():
        described[f"{name}_operations"] = counts.operations
        described[f"{name}_total_time_ns"] = counts.time_ns
        described[f"failed_{name}_operations"] = counts.failed
        described[f"invalid_{name}_operations"] = counts.invalid
        if name != "flush":
            described[f"{name}_bytes"] = counts.total_bytes
            described[f"{name}_merged"] = 0
    return described
