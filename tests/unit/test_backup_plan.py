"""Which backups are refused, with which words, and what a backup's end does to its bitmap."""

from __future__ import annotations

import pytest

from blockd.backup.plan import (
    BackupRequest,
    BitmapMode,
    Sync,
    conclude_bitmap,
    copy_cluster_bytes,
    resolve,
)
from blockd.bitmap import Bits, NodeBitmaps
from blockd.errors import BlockdError

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


class Disk:
    def __init__(self, name: str, size_bytes: int = MIB, *, read_only: bool = False) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.read_only = read_only
        self.bitmaps = NodeBitmaps(size_bytes)


@pytest.fixture
def source() -> Disk:
    disk = Disk("s")
    disk.bitmaps.add("b", GRANULE)
    disk.bitmaps.add("busy", GRANULE).pin("export")
    return disk


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
    source: Disk, sync: Sync, name: str | None, mode: BitmapMode | None, refusal: str | None
) -> None:
    request = BackupRequest(sync, name, mode)
    if refusal is None:
        plan = resolve(request, source, Disk("t"))
        assert plan.sync is sync
        used = plan.used
        assert (None if used is None else used.bitmap.name) == name
        if used is not None:
            assert used.mode is (mode or ON_SUCCESS)
    else:
        with pytest.raises(BlockdError) as caught:
            resolve(request, source, Disk("t"))
        assert caught.value.message == refusal


def refusal_of(request: BackupRequest, source: Disk, target: Disk, **blockers: str) -> str:
    with pytest.raises(BlockdError) as caught:
        resolve(request, source, target, **blockers)
    return caught.value.message


def test_the_checks_come_in_the_peers_order(source: Disk) -> None:
    request = BackupRequest(FULL)
    wrong = Disk("t", MIB // 2, read_only=True)
    busy = "block device is in use by block job: backup"
    bad_request = BackupRequest(FULL, bitmap_mode=ALWAYS)
    assert refusal_of(bad_request, source, source) == NO_BITMAP
    assert refusal_of(request, source, source, source_blocker=busy) == (
        "Source and target cannot be the same"
    )
    assert refusal_of(request, source, wrong, source_blocker=busy, target_blocker="x") == (
        "Node 's' is busy: block device is in use by block job: backup"
    )
    assert refusal_of(request, source, wrong, target_blocker=busy) == (
        "Node 't' is busy: block device is in use by block job: backup"
    )
    assert refusal_of(request, source, wrong) == "Source and target image have different sizes"
    assert refusal_of(request, source, Disk("t", read_only=True)) == (
        "Could not create node: Block node is read-only"
    )


def test_a_refusal_leaves_the_bitmap_alone(source: Disk) -> None:
    refusal_of(BackupRequest(FULL, "b", ALWAYS), source, source)
    assert not source.bitmaps.get("b").busy


@pytest.mark.parametrize(
    ("target_cluster", "cluster"), [(None, 65536), (512, 65536), (2 * MIB, 2 * MIB)]
)
def test_the_copy_cluster(target_cluster: int | None, cluster: int) -> None:
    assert copy_cluster_bytes(target_cluster) == cluster


# The table of specification section 4; a backup that goes well has a rest where it ignored errors.
ENDS: list[tuple[BitmapMode, bool, str]] = [
    (ON_SUCCESS, True, "succ rest"),
    (ON_SUCCESS, False, "old succ"),
    (ALWAYS, True, "succ rest"),
    (ALWAYS, False, "succ rest"),
    (NEVER, True, "old succ"),
    (NEVER, False, "old succ"),
]


@pytest.mark.parametrize(("mode", "succeeded", "left"), ENDS)
@pytest.mark.parametrize("recording", [True, False])
def test_what_a_backups_end_leaves_in_its_bitmap(
    mode: BitmapMode, left: str, *, succeeded: bool, recording: bool
) -> None:
    granules = {"old": {1, 2}, "succ": {2, 3} if recording else set(), "rest": {1, 5}}
    bitmaps = NodeBitmaps(MIB)
    bitmap = bitmaps.add("b", GRANULE)
    bitmaps.recent += [(GRANULE, 2 * GRANULE)]
    if not recording:
        bitmap.disable()
    freeze = bitmap.freeze("j")
    bitmaps.recent += [(2 * GRANULE, 2 * GRANULE)]
    rest = Bits(MIB, GRANULE)
    rest.update_granules(granules["rest"])
    conclude_bitmap(freeze, mode, succeeded=succeeded, rest=rest)
    extents = bitmap.usable_bits().extents()
    dirty = {at // GRANULE for each in extents for at in range(each.offset, each.end, GRANULE)}
    assert dirty == set().union(*(granules[part] for part in left.split()))
    assert not bitmap.busy
    assert bitmap.recording is recording
