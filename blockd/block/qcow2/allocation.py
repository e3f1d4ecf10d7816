"""How a range is allocated, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from blockd import limits
from blockd.block.allocation import Allocation
from blockd.block.qcow2.entries import Kind
from blockd.block.qcow2.reading import Reader
from blockd.extent import Extent


async def find_allocation(reader: Reader, offset: int, length: int) -> list[Allocation]:
    """Runs from ``offset`` on, as ``Driver.allocation`` gives them.

    Neighbours that are alike are one run, wherever the file has them.
    """
    found: list[Allocation] = []
    end = offset + min(
        length, limits.QCOW2_ALLOCATION_CLUSTERS << reader.mapping.geometry.cluster_bits
    )
    while offset < end:
        for run in await _next_runs(reader, offset, end - offset):
            last = found[-1] if found else None
            if last is not None and last[1:] == run[1:]:
                whole = Extent(last.extent.offset, last.extent.length + run.extent.length)
                found[-1] = run._replace(extent=whole)
            elif len(found) < limits.ALLOCATION_RUNS_LIMIT:
                found.append(run)
            else:
                return found
            offset = run.extent.end
    return found


async def _next_runs(reader: Reader, offset: int, length: int) -> Sequence[Allocation]:
    """The first run, or the first few where a backing file is asked."""
    run = await reader.mapping.find(offset, length)
    if run.kind is not Kind.UNALLOCATED:
        return [Allocation(Extent(offset, run.length), run.kind is Kind.ZERO)]
    inside = reader.inside_backing(offset, run.length)
    if not inside:
        return [Allocation(Extent(offset, run.length), zero=True, depth=0)]
    assert reader.backing is not None
    return [
        below._replace(depth=below.depth + 1 if below.depth else 0)
        for below in await reader.backing.allocation(offset, inside)
    ]
