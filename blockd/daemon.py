"""The whole daemon: makes the parts, lets them know each other, and ends them in order."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from blockd import limits
from blockd.block import Archive, Graph, NoArchive
from blockd.events import Bus
from blockd.job import Jobs
from blockd.nbd import NbdServer
from blockd.qmp import AccessList, QmpServer, Services
from blockd.state import StateDirectory, StateEvents, tell_of_unfinished
from blockd.systemd import ServiceManager

_log = logging.getLogger(__name__)


async def run(
    qmp_path: str, access_list: AccessList | None = None, state_path: str | None = None
) -> None:
    """Serve QMP clients on a Unix socket until one says ``quit`` or a signal says so.

    ``access_list``: who they may be; without one, whoever the socket's mode lets in.
    ``state_path``: the directory in which bitmaps outlive the daemon.
    Raises ``BlockdError`` where the socket or the directory can't be had.
    """
    last_resort = threading.Timer(limits.LAST_RESORT_SECONDS, _exit_at_once)
    last_resort.daemon = True
    try:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                bus = Bus()
                async with _archive(state_path, nursery, bus) as archive:
                    graph = Graph(nursery, bus, archive)
                    await _serve(
                        qmp_path, access_list, nursery, signals, last_resort, graph=graph, bus=bus
                    )
                nursery.cancel_scope.cancel()
    finally:
        last_resort.cancel()


async def _serve(
    qmp_path: str,
    access_list: AccessList | None,
    nursery: trio.Nursery,
    signals: AsyncIterator[int],
    last_resort: threading.Timer,
    *,
    graph: Graph,
    bus: Bus,
) -> None:
    manager = ServiceManager()
    stop, ended = trio.Event(), trio.Event()

    async def end_service() -> None:
        """The first who asks for the end brings it about, the others wait for it."""
        if not services.ending:
            services.ending = True
            manager.stopping()
            last_resort.start()
            await _end_service(services)
            ended.set()
        await ended.wait()

    jobs, nbd = Jobs(nursery, bus), NbdServer(nursery, bus)
    services = Services(graph, jobs, nbd, bus, end_service, stop.set)
    qmp = QmpServer(qmp_path, services, access_list)
    await nursery.start(qmp.serve)
    nursery.start_soon(_stop_at_signal, signals, stop)
    nursery.start_soon(manager.watchdog)
    # What is there now stays: a full garbage collection must not go through it again and again,
    # for it would keep the loop for 10 ms and more.
    gc.collect()
    gc.freeze()
    _log.info("serving QMP on %s", qmp_path)
    manager.ready()
    try:
        await stop.wait()
    finally:
        with trio.CancelScope(shield=True):
            await end_service()
            with trio.move_on_after(limits.SHUTDOWN_SECONDS):
                await qmp.close()
            await _close_nodes(graph)


@asynccontextmanager
async def _archive(path: str | None, nursery: trio.Nursery, bus: Bus) -> AsyncIterator[Archive]:
    """What keeps the bitmaps, for as long as there are nodes."""
    if path is None:
        yield NoArchive()
        return
    state = await StateDirectory.open(path, nursery, StateEvents(bus))
    try:
        tell_of_unfinished(state.unfinished_jobs)
        yield state
    finally:
        with trio.move_on_after(limits.SHUTDOWN_SECONDS, shield=True):
            await state.close()


async def _end_service(services: Services) -> None:
    """Let the command that is under way end, then close the exports, then end the jobs.

    Each is given its time: a disk that hangs does not keep the others from being flushed.
    """
    with trio.move_on_after(limits.SHUTDOWN_SECONDS):
        async with services.changes:
            pass
    with trio.move_on_after(limits.SHUTDOWN_SECONDS) as scope:
        await services.nbd.close()
    if scope.cancelled_caught:
        _log.error("NBD clients still wait for a disk that does not answer")
    await services.jobs.cancel_all(limits.SHUTDOWN_SECONDS)


def _exit_at_once() -> None:
    """What is left hangs in a system call, in a thread that nothing can end but the process."""
    _log.error("a disk does not answer: ending without it")
    os._exit(1)


async def _stop_at_signal(signals: AsyncIterator[int], stop: trio.Event) -> None:
    async for number in signals:
        _log.info("ending: %s", signal.Signals(number).name)
        stop.set()


async def _close_nodes(graph: Graph) -> None:
    """Flush and close all nodes; what can't be flushed is said, and keeps nobody waiting."""
    try:
        with trio.fail_after(limits.SHUTDOWN_FLUSH_SECONDS):
            await graph.close()
    except* OSError as errors:
        for error in errors.exceptions:
            _log.error("a disk could not be flushed: %s", error)
    except* trio.TooSlowError:
        seconds = limits.SHUTDOWN_FLUSH_SECONDS
        _log.error("not all disks could be flushed within %d seconds", seconds)
