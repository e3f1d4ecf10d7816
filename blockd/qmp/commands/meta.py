"""The daemon as a whole. ``qmp_capabilities`` is the monitor's own."""

from __future__ import annotations

from typing import Any

from blockd.qmp.services import Services
from blockd.qmp.session import VERSION
from blockd.qmp.types.meta import QueryVersion, Quit


def query_version(_services: Services, _arguments: QueryVersion) -> dict[str, Any]:
    return VERSION


async def quit_daemon(services: Services, _arguments: Quit) -> None:
    await services.end_service()
    services.stop()
