"""What the topmost image of a source holds: all that a backup with sync top copies."""

from __future__ import annotations

import trio

from blockd import limits
from blockd.backup.clusters import Clusters
from blockd.backup.source_map import by_clusters
from blockd.block import Node


async def leave_out_lower_layers(source: Node, clusters: Clusters) -> int:
    """Settle what only the layers below hold, so that nobody copies it; how many clusters.

    What guests write to meanwhile is copied, whichever layer held it: that is right, too.
    """
    left_out = 0
    first = 0
    while first < clusters.count:
        offset = first << clusters.shift
        length = min(limits.BACKUP_MAP_BYTES, clusters.size_bytes - offset)
        await trio.lowlevel.checkpoint()
        try:
            allocation = await source.allocation(offset, length)
        except OSError:
            # Then it is copied, and what fails there fails there.
            first = -(-(offset + length) >> clusters.shift)
            continue
        runs = by_clusters(
            allocation,
            first,
            clusters.cluster_bytes,
            clusters.size_bytes,
            lambda run: run.depth != 1,
        )
        for run in runs:
            if run.chosen:
                left_out += clusters.leave_out(first, run.end)
            first = run.end
    return left_out
