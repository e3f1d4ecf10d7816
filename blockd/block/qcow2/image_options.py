"""What a new image can be asked to be, and which of that goes together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from blockd import limits
from blockd.block.qcow2.features import CompressionType
from blockd.block.qcow2.header import (
    BACKING_NAME_BYTES,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    SUBCLUSTERS,
)
from blockd.errors import BlockdError

SECTOR_BYTES = 512
_LEAST_EXTENDED_BYTES = SUBCLUSTERS * SECTOR_BYTES
_CLUSTER_SIZES = {1 << bits for bits in range(MIN_CLUSTER_BITS, MAX_CLUSTER_BITS + 1)}
_REFCOUNT_WIDTHS = {1 << order for order in range(7)}
_NEWER = "compatibility level 1.1 and above (use version=v3 or greater)"


class Preallocation(StrEnum):
    """What of a new image is there from the start; the names are QMP's."""

    OFF = "off"
    #: All tables, as if everything had been written to.
    METADATA = "metadata"
    #: And the room for the data.
    FALLOC = "falloc"
    #: And the data itself, written as zeroes.
    FULL = "full"


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What a new image is to be. ``data_file``: the name that its header gives for it."""

    size_bytes: int
    version: int = 3
    cluster_size_bytes: int = 64 * limits.KIB
    backing_file: str | None = None
    backing_format: str | None = None
    preallocation: Preallocation = Preallocation.OFF
    lazy_refcounts: bool = False
    refcount_bits: int = 16
    data_file: str | None = None
    data_file_raw: bool = False
    extended_l2: bool = False
    compression_type: CompressionType = CompressionType.ZLIB

    def check(self) -> None:
        """Raise ``BlockdError`` where that can't be, in QEMU's order and words."""
        for wrong, refusal in (*self._rules_of_format(), *self._rules_of_files()):
            if wrong:
                raise BlockdError(refusal)

    def _rules_of_format(self) -> list[tuple[bool, str]]:
        old = self.version < 3
        backed_and_full = (
            self.backing_file is not None
            and self.preallocation is not Preallocation.OFF
            and not self.extended_l2
        )
        return [
            (
                self.size_bytes % SECTOR_BYTES != 0,
                f"Image size must be a multiple of {SECTOR_BYTES} bytes",
            ),
            (self.extended_l2 and old, f"Extended L2 entries are only supported with {_NEWER}"),
            (
                self.cluster_size_bytes not in _CLUSTER_SIZES,
                f"Cluster size must be a power of two between {min(_CLUSTER_SIZES)} and "
                f"{max(_CLUSTER_SIZES) // limits.KIB}k",
            ),
            (
                self.extended_l2 and self.cluster_size_bytes < _LEAST_EXTENDED_BYTES,
                "Extended L2 entries are only supported with cluster sizes of at least "
                f"{_LEAST_EXTENDED_BYTES} bytes",
            ),
            (
                backed_and_full,
                "Backing file and preallocation can only be used at the same time if extended_l2 "
                "is on",
            ),
            (
                self.backing_format is not None and self.backing_file is None,
                "Backing format cannot be used without backing file",
            ),
            (self.lazy_refcounts and old, f"Lazy refcounts only supported with {_NEWER}"),
            (
                self.refcount_bits not in _REFCOUNT_WIDTHS,
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                self.refcount_bits != 16 and old,
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use version=v3 or greater)",
            ),
        ]

    def _rules_of_files(self) -> list[tuple[bool, str]]:
        old = self.version < 3
        backing_name_bytes = len((self.backing_file or "").encode("utf-8", "surrogateescape"))
        return [
            (
                self.data_file_raw and self.data_file is None,
                "data-file-raw requires data-file",
            ),
            (
                self.data_file_raw and self.backing_file is not None,
                "Backing file and data-file-raw cannot be used at the same time",
            ),
            (
                self.data_file is not None and old,
                f"External data files are only supported with {_NEWER}",
            ),
            (
                self.compression_type is not CompressionType.ZLIB and old,
                f"Non-zlib compression type is only supported with {_NEWER}",
            ),
            (self.size_bytes < 0, "Could not resize image: Image size cannot be negative"),
            (
                self.size_bytes > limits.NODE_BYTES,
                f"Could not resize image: offset({self.size_bytes}) exceeds maximum"
                f"({limits.NODE_BYTES})",
            ),
            (backing_name_bytes > BACKING_NAME_BYTES, "Backing file name too long"),
        ]
