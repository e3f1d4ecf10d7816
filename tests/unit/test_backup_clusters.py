"""Which clusters a backup has still to copy."""

from __future__ import annotations

import pytest

from blockd.backup.clusters import Clusters
from blockd.backup.source_map import Run, by_clusters
from blockd.bitmap import Bits
from blockd.block import Allocation
from blockd.extent import Extent

CLUSTER = 1024
SIZE = 20 * CLUSTER + 512


def bits(granularity_bytes: int, *marks: tuple[int, int], size_bytes: int = SIZE) -> Bits:
    made = Bits(size_bytes, granularity_bytes)
    for offset, length in marks:
        made.mark(offset, length)
    return made


# How many clusters are copied was seen on qemu-storage-daemon 10.0.2: they are counted whole.
@pytest.mark.parametrize(
    ("granularity", "marks", "runs"),
    [
        pytest.param(1024, [(0, 1), (3072, 2048)], [(0, 1), (3, 5)], id="same"),
        pytest.param(512, [(0, 1)], [(0, 1)], id="finer"),
        pytest.param(512, [(512, 1024)], [(0, 2)], id="finer, across"),
        pytest.param(512, [(0, 1), (1600, 1)], [(0, 1), (1, 2)], id="finer, near"),
        pytest.param(512, [(0, 1), (1023, 1), (1025, 1)], [(0, 2)], id="finer, one run"),
        pytest.param(4096, [(5000, 1)], [(4, 8)], id="coarser"),
        pytest.param(8192, [(SIZE - 1, 1)], [(16, 21)], id="coarser, cut by the end"),
        pytest.param(1024, [(SIZE - 1, 1)], [(20, 21)], id="the last, partial one"),
        pytest.param(512, [], [], id="none"),
    ],
)
def test_a_bitmap_is_rounded_outward_to_clusters(
    granularity: int, marks: list[tuple[int, int]], runs: list[tuple[int, int]]
) -> None:
    wanted = bits(granularity, *marks)
    clusters = Clusters(SIZE, CLUSTER, wanted)
    assert list(clusters.wanted_runs()) == runs
    every = {cluster for first, end in runs for cluster in range(first, end)}
    assert {cluster for cluster in range(21) if clusters.wants(cluster)} == every
    if granularity >= CLUSTER or not every:
        assert clusters.count_at_once() == len(every)
    else:
        assert clusters.count_at_once() is None


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (1024, 1), (1025, 2)])
def test_everything(size: int, count: int) -> None:
    clusters = Clusters(size, CLUSTER, None)
    assert clusters.count_at_once() == count
    assert list(clusters.wanted_runs()) == [(0, count)]
    assert sum(clusters.length(number, number + 1) for number in range(count)) == size


def test_a_part_of_what_is_wanted() -> None:
    clusters = Clusters(SIZE, CLUSTER, bits(4096, (5000, 1)))
    assert list(clusters.wanted_runs(6, 20)) == [(6, 8)]
    assert list(clusters.wanted_runs(8, 20)) == []


def test_a_cluster_takes_its_way() -> None:
    clusters = Clusters(SIZE, CLUSTER, None)
    clusters.set_total(21)
    assert clusters.next_pending(0, 21) == (0, 21)

    claim = clusters.claim(4, 8)
    assert clusters.next_pending(0, 21) == (0, 4)
    assert clusters.next_pending(4, 21) == (8, 21)
    assert clusters.next_unsettled(4, 21) == 4

    clusters.settle(claim)
    assert clusters.reading == {}
    assert clusters.next_unsettled(4, 21) == 8
    assert clusters.next_pending(4, 21) == (8, 21)
    clusters.save(4, 8)

    clusters.settle_unread(0, 4)
    assert clusters.next_unsettled(0, 21) == 8
    assert clusters.next_pending(2, 6) == (6, 6)
    clusters.save(0, 4)

    rest = clusters.claim(8, 21)
    clusters.settle(rest)
    assert not clusters.finished.is_set()
    clusters.save(8, 20)
    clusters.skip(1)
    assert clusters.finished.is_set()
    assert clusters.skipped == 1
    assert unsaved(clusters) == [(20, 21)]


def test_what_is_given_back_is_pending_again() -> None:
    clusters = Clusters(SIZE, CLUSTER, None)
    clusters.give_back(clusters.claim(4, 8))
    assert clusters.next_pending(0, 21) == (0, 21)
    assert clusters.pop_given_back() == (4, 8)
    assert clusters.pop_given_back() is None


def test_a_claim_shrinks_from_both_ends() -> None:
    clusters = Clusters(SIZE, CLUSTER, None)
    claim = clusters.claim(4, 12)
    clusters.settle_to(claim, 6)
    clusters.settle_to(claim, 6)
    clusters.cut(claim, 9)
    clusters.cut(claim, 9)
    assert (claim.first, claim.end) == (6, 9)
    assert set(clusters.reading) == {6, 7, 8}
    assert set(clusters.settled) == {4, 5}
    assert clusters.pop_given_back() == (9, 12)
    assert clusters.pop_given_back() is None
    assert clusters.next_pending(4, 21) == (9, 21)
    clusters.cut(claim, 6)
    clusters.give_back(claim)
    assert clusters.pop_given_back() == (6, 9)
    assert clusters.pop_given_back() is None
    assert not clusters.reading


def unsaved(clusters: Clusters) -> list[tuple[int, int]]:
    return [run for step in clusters.unsaved_runs() for run in step]


def test_what_is_left_is_pending_being_read_or_only_in_memory() -> None:
    clusters = Clusters(SIZE, CLUSTER, bits(1024, (0, 12 * CLUSTER)))
    clusters.settle(clusters.claim(0, 6))
    clusters.save(0, 3)
    clusters.claim(8, 9)
    clusters.settled.add_range(12, 21)  # guests wrote there; the backup does not want it
    assert unsaved(clusters) == [(3, 12)]


def test_long_and_scattered_work_comes_in_steps() -> None:
    count = 1 << 20
    clusters = Clusters(count * CLUSTER, CLUSTER, None)
    clusters.settle_unread(0, count)
    for first in range(0, count, 1 << 15):
        clusters.save(first, first + 1)
    steps = list(clusters.unsaved_runs())
    assert len(steps) >= 16
    assert sum(end - first for step in steps for first, end in step) == count - 32
    assert clusters.next_unsettled(5, count) == count


def allocation(*runs: tuple[int, bool]) -> list[Allocation]:
    made, offset = [], 0
    for length, zero in runs:
        made.append(Allocation(Extent(offset, length), zero))
        offset += length
    return made


DATA, ZERO = False, True


@pytest.mark.parametrize(
    ("said", "runs"),
    [
        pytest.param([(2048, DATA)], [(2, DATA)], id="data"),
        pytest.param([(2048, ZERO)], [(2, ZERO)], id="zero"),
        pytest.param([(1500, DATA), (4000, ZERO)], [(2, DATA), (5, ZERO)], id="hole inward"),
        pytest.param([(100, DATA), (900, ZERO), (600, DATA)], [(2, DATA)], id="small hole"),
        pytest.param([(100, ZERO)], [(1, DATA)], id="too little said"),
        pytest.param([], [(1, DATA)], id="nothing said"),
        pytest.param(
            [(1024, ZERO), (1024, DATA), (1024, ZERO)],
            [(1, ZERO), (2, DATA), (3, ZERO)],
            id="in turn",
        ),
        pytest.param(
            [(1000, DATA), (24, ZERO), (1024, ZERO)],
            [(1, DATA), (2, ZERO)],
            id="zero runs in a row",
        ),
        pytest.param(
            [(1024, DATA), (24, ZERO), (1000, ZERO), (1000, DATA)],
            [(1, DATA), (2, ZERO), (3, DATA)],
            id="zero runs that make up a cluster",
        ),
        pytest.param([(SIZE - 100, DATA), (100, ZERO)], [(21, DATA)], id="small hole at the end"),
        pytest.param([(20480, DATA), (512, ZERO)], [(20, DATA), (21, ZERO)], id="partial cluster"),
    ],
)
def test_allocation_in_clusters(said: list[tuple[int, bool]], runs: list[tuple[int, bool]]) -> None:
    assert list(by_clusters(allocation(*said), 0, CLUSTER, SIZE)) == [
        Run(end, chosen=zero) for end, zero in runs
    ]
