"""x-blockd-audit."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial

from blockd.backup import AuditJob, check_not_same
from blockd.block import Node, Role
from blockd.errors import BlockdError
from blockd.job import Group
from blockd.qmp.services import Services
from blockd.qmp.types.bitmap import XBlockdAudit


async def audit(services: Services, arguments: XBlockdAudit) -> None:
    job = _make_job(services, arguments)
    try:
        services.jobs.admit(job)
    except BlockdError:
        await job.give_up()
        raise
    services.jobs.begin([Group([job], nullcontext)])


def _make_job(services: Services, arguments: XBlockdAudit) -> AuditJob:
    graph = services.graph
    node = graph.get(arguments.node, device=arguments.node)
    target = graph.get(arguments.target, device=arguments.target)
    bitmap = node.bitmaps.get(arguments.bitmap)
    bitmap.check_usable(to_change=True)
    if not bitmap.recording:
        raise BlockdError(f"Bitmap '{bitmap.name}' is disabled: nobody knows what it should have")
    check_not_same(node, target)
    if node.size_bytes != target.size_bytes:
        raise BlockdError("Node and target have different sizes")
    if arguments.sample == 0:
        raise BlockdError(
            "A 'sample' of 0 bytes compares nothing: give a number of bytes, or leave it out to "
            "compare everything"
        )
    services.jobs.check_id(arguments.job_id)
    return AuditJob(
        arguments.job_id,
        node,
        bitmap,
        target,
        sample_bytes=arguments.sample,
        speed=arguments.speed,
        keep=partial(graph.archive.keep, node),
        release=_hold(services, f"job '{arguments.job_id}'", node, target).close,
    )


def _hold(services: Services, user: str, *nodes: Node) -> ExitStack:
    with ExitStack() as holds:
        for node in nodes:
            hold = services.graph.hold(node, user, Role.SOURCE, writes=False)
            holds.callback(hold.release)
        return holds.pop_all()
