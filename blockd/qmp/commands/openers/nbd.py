"""The opener of the nbd driver."""

from __future__ import annotations

from blockd.block import Driver
from blockd.nbd.client import NbdDriver, Target
from blockd.objects import Endpoint, find_tls
from blockd.qmp.addresses import address_of
from blockd.qmp.opening import Opening
from blockd.qmp.types.blockdev import NbdOptions


async def open_nbd(opening: Opening, options: NbdOptions) -> Driver:
    tasks = opening.graph.tasks
    assert tasks is not None, "the daemon gives its graph a nursery"
    creds, hostname = options.tls_creds, options.tls_hostname
    objects = opening.graph.objects
    tls = None if creds is None else find_tls(objects, creds, Endpoint.CLIENT)
    return await NbdDriver.open(
        Target(
            address_of(options.server), options.export, tls, creds, hostname, options.x_dirty_bitmap
        ),
        tasks,
        read_only=opening.common.read_only,
        auto_read_only=opening.common.auto_read_only,
        open_timeout_seconds=options.open_timeout,
        reconnect_delay_seconds=options.reconnect_delay,
    )
