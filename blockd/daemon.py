"""The whole daemon: makes the parts, lets them know each other, and ends them in order."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import AsyncIterator

import trio

from blockd import limits
from blockd.block import Graph
from blockd.events import Bus
from blockd.job import Jobs
from blockd.nbd import NbdServer
from blockd.qmp import QmpServer, Services
from blockd.systemd import ServiceManager

_log = logging.getLogger(__name__)


async def run(qmp_path: str) -> None:
    """Serve QMP clients on a Unix socket until one says ``quit`` or a signal says so.

    Raises ``BlockdError`` where the socket can't be had.
    """
    manager = ServiceManager()
    stop = trio.Event()
    bus = Bus()
    graph = Graph()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            jobs = Jobs(nursery, bus)
            nbd = NbdServer(nursery, bus)

            async def end_service() -> None:
                manager.stopping()
                await nbd.close()
                await jobs.cancel_all(limits.SHUTDOWN_SECONDS)

            qmp = QmpServer(qmp_path, Services(graph, jobs, nbd, bus, end_service, stop.set))
            await nursery.start(qmp.serve)
            nursery.start_soon(_stop_at_signal, signals, stop)
            nursery.start_soon(manager.watchdog)
            # What is there now stays: a full garbage collection must not go through it again
            # and again, for it would keep the loop for 10 ms and more.
            gc.collect()
            gc.freeze()
            _log.info("serving QMP on %s", qmp_path)
            manager.ready()
            try:
                await stop.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await end_service()
                    await qmp.close()
                    await _close_nodes(graph)
            nursery.cancel_scope.cancel()


async def _stop_at_signal(signals: AsyncIterator[int], stop: trio.Event) -> None:
    async for number in signals:
        _log.info("ending: %s", signal.Signals(number).name)
        stop.set()


async def _close_nodes(graph: Graph) -> None:
    """Flush and close all nodes; what can't be flushed is said, and keeps nobody waiting."""
    try:
        with trio.fail_after(limits.SHUTDOWN_SECONDS):
            await graph.close()
    except* OSError as errors:
        for error in errors.exceptions:
            _log.error("a disk could not be flushed: %s", error)
    except* trio.TooSlowError:
        _log.error("not all disks could be flushed within %d seconds", limits.SHUTDOWN_SECONDS)
