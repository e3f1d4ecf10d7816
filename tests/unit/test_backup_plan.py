"""Which backups are refused, with which words, and what a backup's end does to its bitmap."""

from __future__ import annotations

from typing import Any

import pytest

from blockd.backup import BackupRequest, BitmapMode, Performance, Sync, plan_backup
from blockd.backup.plan import conclude_bitmap
from blockd.bitmap import Bits, NodeBitmaps
from blockd.block import Claim, Node, Role
from blockd.errors import BlockdError
from tests.helpers.memory_driver import MemoryDriver

MIB = 1024 * 1024
GRANULE = 64 * 1024

FULL, INCREMENTAL, BITMAP = Sync.FULL, Sync.INCREMENTAL, Sync.BITMAP
TOP, NONE = Sync.TOP, Sync.NONE
ON_SUCCESS, ALWAYS, NEVER = BitmapMode.ON_SUCCESS, BitmapMode.ALWAYS, BitmapMode.NEVER

NO_NAME = "must provide a valid bitmap name for '{}' sync mode"
NO_SUCH = "Bitmap '{}' could not be found"
NO_MODE = "Bitmap sync mode must be given when providing a bitmap"
ONLY_ON_SUCCESS = "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"
NO_BITMAP = "Cannot specify bitmap sync mode without a bitmap"
BUSY = "Bitmap 'busy' is currently in use by another operation and cannot be used"
USELESS = "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'"


MEANINGLESS = "sync mode 'none' does not produce meaningful bitmap outputs"


def disk(name: str, size_bytes: int = MIB, *, cluster_bytes: int | None = None) -> Node:
    driver = MemoryDriver(size_bytes)
    driver.cluster_size_bytes = cluster_bytes
    return Node(name, driver)


def read_only(node: Node) -> Node:
    node.read_only = True
    return node


@pytest.fixture
def source() -> Node:
    node = disk("s")
    node.bitmaps.add("b", GRANULE)
    node.bitmaps.add("busy", GRANULE).pin("export")
    return node


# As qemu-storage-daemon 10.0.2 answers. None: it takes the request.
REQUESTS: list[tuple[Sync, str | None, BitmapMode | None, str | None]] = [
    (INCREMENTAL, None, None, NO_NAME.format("incremental")),
    (INCREMENTAL, None, ALWAYS, NO_NAME.format("incremental")),
    (INCREMENTAL, "b", None, None),
    (INCREMENTAL, "b", ON_SUCCESS, None),
    (INCREMENTAL, "b", ALWAYS, ONLY_ON_SUCCESS),
    (INCREMENTAL, "b", NEVER, ONLY_ON_SUCCESS),
    (INCREMENTAL, "nope", None, NO_SUCH.format("nope")),
    (INCREMENTAL, "nope", NEVER, ONLY_ON_SUCCESS),
    (INCREMENTAL, "", None, NO_SUCH.format("")),
    (INCREMENTAL, "busy", None, BUSY),
    (INCREMENTAL, "busy", ALWAYS, ONLY_ON_SUCCESS),
    (BITMAP, None, None, NO_NAME.format("bitmap")),
    (BITMAP, None, ON_SUCCESS, NO_NAME.format("bitmap")),
    (BITMAP, "b", None, NO_MODE),
    (BITMAP, "b", ON_SUCCESS, None),
    (BITMAP, "b", ALWAYS, None),
    (BITMAP, "b", NEVER, None),
    (BITMAP, "nope", None, NO_SUCH.format("nope")),
    (BITMAP, "busy", None, NO_MODE),
    (BITMAP, "busy", NEVER, BUSY),
    (FULL, None, None, None),
    (FULL, None, ON_SUCCESS, NO_BITMAP),
    (FULL, None, NEVER, NO_BITMAP),
    (FULL, "b", None, NO_MODE),
    (FULL, "b", ON_SUCCESS, None),
    (FULL, "b", ALWAYS, None),
    (FULL, "b", NEVER, USELESS),
    (FULL, "nope", NEVER, NO_SUCH.format("nope")),
    (FULL, "", None, NO_SUCH.format("")),
    (FULL, "busy", None, NO_MODE),
    (FULL, "busy", NEVER, BUSY),
    (TOP, None, None, None),
    (TOP, None, ALWAYS, NO_BITMAP),
    (TOP, "b", None, NO_MODE),
    (TOP, "b", ON_SUCCESS, None),
    (TOP, "b", ALWAYS, None),
    (TOP, "b", NEVER, USELESS.replace("full", "top")),
    (TOP, "nope", NEVER, NO_SUCH.format("nope")),
    (NONE, None, None, None),
    (NONE, None, NEVER, NO_BITMAP),
    (NONE, "b", None, NO_MODE),
    *[(NONE, "b", mode, MEANINGLESS) for mode in BitmapMode],
    (NONE, "nope", None, NO_SUCH.format("nope")),
    (NONE, "busy", NEVER, BUSY),
]


@pytest.mark.parametrize(("sync", "name", "mode", "refusal"), REQUESTS)
def test_a_request_is_refused_in_the_peers_words(
    source: Node, sync: Sync, name: str | None, mode: BitmapMode | None, refusal: str | None
) -> None:
    request = BackupRequest(sync, name, mode)
    if refusal is None:
        plan = plan_backup(request, source, disk("t"))
        assert plan.sync is sync
        used = plan.used
        assert (None if used is None else used.bitmap.name) == name
        if used is not None:
            assert used.mode is (mode or ON_SUCCESS)
    else:
        with pytest.raises(BlockdError) as caught:
            plan_backup(request, source, disk("t"))
        assert caught.value.message == refusal


def refusal_of(request: BackupRequest, source: Node, target: Node, **others: Any) -> str:
    with pytest.raises(BlockdError) as caught:
        plan_backup(request, source, target, **others)
    return caught.value.message


def busy(node: Node) -> Node:
    node.users.add(Claim("block job 'k'", Role.TARGET))
    return node


def no_name() -> None:
    raise BlockdError("Invalid node-name: '1'")


ALL_WRONG = Performance(max_workers=0, max_chunk_bytes=-1, min_cluster_bytes=1000)
SMALL, WRONG = MIB // 2, 1000
BUSY_NODE = "Node '{}' is busy: block device is in use by block job: backup"
NO_NODE = "Could not create node: "


def test_the_checks_come_in_the_peers_order(source: Node) -> None:
    """Each time the first mistake of the time before is mended, and all the others are left."""
    both = BackupRequest(FULL, bitmap_mode=ALWAYS, compress=True, performance=ALL_WRONG)
    assert refusal_of(both, busy(disk("s")), disk("t")) == NO_BITMAP
    request = BackupRequest(FULL, compress=True, performance=ALL_WRONG)
    alone = busy(disk("s"))
    assert refusal_of(request, alone, alone) == "Source and target cannot be the same"
    target = busy(read_only(disk("t", SMALL)))
    assert refusal_of(request, alone, target) == "Compression is not supported for this drive "
    request = BackupRequest(FULL, performance=ALL_WRONG)
    assert refusal_of(request, alone, target) == BUSY_NODE.format("s")
    assert refusal_of(request, source, target) == BUSY_NODE.format("t")
    target = read_only(disk("t", SMALL))
    words = "max-workers must be between 1 and 2147483647"
    assert refusal_of(request, source, target) == words
    chunk = Performance(max_chunk_bytes=-1, min_cluster_bytes=WRONG)
    words = "max-chunk must be zero (which means no limit) or positive"
    assert refusal_of(BackupRequest(FULL, performance=chunk), source, target) == words
    large = BackupRequest(FULL, performance=Performance(min_cluster_bytes=1 << 32))
    words = "Source and target image have different sizes"
    assert refusal_of(large, source, target) == words
    target = read_only(disk("t"))
    words = "min-cluster-size too large: 4294967296 > 16777216"
    assert refusal_of(large, source, target, check_filter_name=no_name) == words
    cluster = Performance(max_chunk_bytes=WRONG, min_cluster_bytes=WRONG)
    request = BackupRequest(FULL, performance=cluster)
    words = f"{NO_NODE}Invalid node-name: '1'"
    assert refusal_of(request, source, target, check_filter_name=no_name) == words
    assert refusal_of(request, source, target) == f"{NO_NODE}Block node is read-only"
    words = f"{NO_NODE}Cannot create block-copy-state: min-cluster-size needs to be a power of 2"
    assert refusal_of(request, source, disk("t")) == words
    request = BackupRequest(FULL, performance=Performance(max_chunk_bytes=WRONG))
    words = "Required max-chunk (1000) is less than backup cluster size (65536)"
    assert refusal_of(request, source, disk("t")) == words


def test_a_refusal_leaves_the_bitmap_alone(source: Node) -> None:
    refusal_of(BackupRequest(FULL, "b", ALWAYS), source, source)
    assert not source.bitmaps.get("b").busy


@pytest.mark.parametrize("workers", [-1, 0, 1 << 31, 1 << 62])
def test_how_many_workers_there_may_not_be(workers: int) -> None:
    with pytest.raises(BlockdError, match="max-workers must be between 1 and 2147483647"):
        Performance(max_workers=workers).check_bounds()


@pytest.mark.parametrize("nbytes", [-1, -(1 << 63)])
def test_how_large_a_chunk_may_not_be(nbytes: int) -> None:
    with pytest.raises(BlockdError, match="max-chunk must be zero"):
        Performance(max_chunk_bytes=nbytes).check_bounds()


@pytest.mark.parametrize("nbytes", [3, 1000, 65537, 3 * MIB])
def test_how_large_a_cluster_may_not_be(nbytes: int) -> None:
    with pytest.raises(BlockdError, match="needs to be a power of 2"):
        Performance(min_cluster_bytes=nbytes).cluster_bytes(None)


@pytest.mark.parametrize(
    ("target_cluster", "least", "cluster"),
    [
        (None, 0, 65536),
        (None, 1, 65536),
        (512, 512, 65536),
        (2 * MIB, 65536, 2 * MIB),
        (None, 4 * MIB, 4 * MIB),
        (65536, 16 * MIB, 16 * MIB),
    ],
)
def test_the_copy_cluster(
    source: Node, target_cluster: int | None, least: int, cluster: int
) -> None:
    target = disk("t", cluster_bytes=target_cluster)
    request = BackupRequest(FULL, performance=Performance(min_cluster_bytes=least))
    assert plan_backup(request, source, target).cluster_bytes == cluster


@pytest.mark.parametrize(
    ("asked", "chunk"), [(0, None), (65536, 65536), (65537, 131072), ((1 << 63) - 1, 1 << 63)]
)
def test_a_chunk_is_whole_clusters(source: Node, asked: int, chunk: int | None) -> None:
    request = BackupRequest(FULL, performance=Performance(max_chunk_bytes=asked))
    assert plan_backup(request, source, disk("t")).max_chunk_bytes == chunk


# The table of specification section 4; a backup that goes well has a rest where it ignored errors.
# What it may have damaged on the target is a part of the rest, or stays with what was there.
ENDS: list[tuple[BitmapMode, bool, str]] = [
    (ON_SUCCESS, True, "succ rest"),
    (ON_SUCCESS, False, "old succ torn"),
    (ALWAYS, True, "succ rest torn"),
    (ALWAYS, False, "succ rest torn"),
    (NEVER, True, "old succ torn"),
    (NEVER, False, "old succ torn"),
]


@pytest.mark.parametrize(("mode", "succeeded", "left"), ENDS)
@pytest.mark.parametrize("recording", [True, False])
def test_what_a_backups_end_leaves_in_its_bitmap(
    mode: BitmapMode, left: str, *, succeeded: bool, recording: bool
) -> None:
    granules = {"old": {1, 2}, "succ": {2, 3} if recording else set(), "rest": {1, 5}, "torn": {7}}
    bitmaps = NodeBitmaps(MIB)
    bitmap = bitmaps.add("b", GRANULE)
    bitmaps.recent += [(GRANULE, 2 * GRANULE)]
    if not recording:
        bitmap.disable()
    freeze = bitmap.freeze("j")
    bitmaps.recent += [(2 * GRANULE, 2 * GRANULE)]
    rest, torn = Bits(MIB, GRANULE), Bits(MIB, GRANULE)
    rest.update_granules(granules["rest"])
    torn.update_granules(granules["torn"])
    conclude_bitmap(freeze, mode, succeeded=succeeded, rest=rest, torn=torn)
    extents = bitmap.usable_bits().extents()
    dirty = {at // GRANULE for each in extents for at in range(each.offset, each.end, GRANULE)}
    assert dirty == set().union(*(granules[part] for part in left.split()))
    assert not bitmap.busy
    assert bitmap.recording is recording
