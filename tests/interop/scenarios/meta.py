"""Commands about the daemon itself."""

from __future__ import annotations

from tests.helpers.scenario import Scenario, do

SCENARIOS = [
    Scenario(
        "meta-queries",
        [do("query-version"), do("query-version", x=1), do("query-commands", x=1)],
    ),
    Scenario("meta-unknown-commands", [do("nope"), do("query-status"), do("qmp_capabilities")]),
    Scenario("meta-quit-takes-nothing", [do("quit", x=1)]),
]
