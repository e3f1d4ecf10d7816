"""Making images."""

from __future__ import annotations

from typing import ClassVar, Literal

from blockd.qmp.types.base import Command, Int64, Object, Size
from blockd.qmp.types.blockdev import BlockdevRef

#: The drivers of QEMU, as one that a backing file is of.
BackingFormat = Literal[
    "file", "host_device", "nbd", "null-co", "qcow", "qcow2", "qed", "raw", "vdi", "vhdx", "vmdk"
]


class CreateOptions(Object, kw_only=True):
    """What is to be made, and with what."""


class CreateFile(CreateOptions, tag_field="driver", tag="file", kw_only=True):
    """A regular file of ``size`` bytes, all zero; one that is there is emptied first.

    ``preallocation``: take its space from the file system now: ``falloc``, or ``full`` by writing
    zeroes.
    """

    filename: str
    size: Size
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off"


class CreateQcow2(CreateOptions, tag_field="driver", tag="qcow2", kw_only=True):
    """A qcow2 image in the node ``file``, which grows where it must; what it held is lost.

    ``size``: the disk's, in bytes. ``backing-file``: the name of the image that is read where this
    one has nothing, which need not exist yet; ``backing-fmt`` its format. ``preallocation``: make
    all tables (``metadata``), take the space (``falloc``), write zeroes (``full``).
    ``data-file``: the node that is to hold the data; with ``data-file-raw`` it is a raw image of
    the same content at all times. ``version`` v2 lacks what the other options ask for.
    """

    file: BlockdevRef
    data_file: BlockdevRef | None = None
    data_file_raw: bool = False
    extended_l2: bool = False
    size: Size
    version: Literal["v2", "v3"] = "v3"
    backing_file: str | None = None
    backing_fmt: BackingFormat | None = None
    cluster_size: Size = 65536
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off"
    lazy_refcounts: bool = False
    refcount_bits: Int64 = 16
    compression_type: Literal["zlib", "zstd"] = "zlib"


class CreateRaw(CreateOptions, tag_field="driver", tag="raw", kw_only=True):
    """Nothing: a raw image is what is in its file, so make that."""


class CreateHostDevice(CreateOptions, tag_field="driver", tag="host_device", kw_only=True):
    """Nothing: devices are not made here."""


BlockdevCreateOptions = CreateFile | CreateQcow2 | CreateRaw | CreateHostDevice


class BlockdevCreate(Command, kw_only=True):
    """Make an image, in a job of the type ``create`` that stays until ``job-dismiss``.

    The job's ``error`` says why it failed; then there is no image, and a file that was made is
    gone.
    """

    command: ClassVar[str] = "blockdev-create"

    job_id: str
    options: BlockdevCreateOptions
