"""The content of compressed clusters: raw deflate or zstd (specification, "compression_type").

These calls compute and block nobody else: both libraries let go of the interpreter meanwhile, so
worker threads may run several.
"""

from __future__ import annotations

import errno
import io
import zlib

import zstandard

from blockd.block.qcow2.features import CompressionType

#: Raw deflate with a window of 4 KiB, as the format has it; and what QEMU compresses with.
_WINDOW_BITS = -12
_MEMORY_LEVEL = 9
_ZSTD_LEVEL = 3


def decompress(kind: CompressionType, data: bytes, cluster_size_bytes: int) -> bytes:
    """A cluster's content. What follows its end in ``data`` is ignored: only sectors are counted.

    No stream gives more than one cluster. Raises ``OSError`` where it is damaged or gives less.
    """
    try:
        content = _UNPACK[kind](data, cluster_size_bytes)
    except (zlib.error, zstandard.ZstdError) as error:
        raise OSError(errno.EIO, f"a compressed cluster is damaged: {error}") from error
    if len(content) != cluster_size_bytes:
        raise OSError(errno.EIO, "a compressed cluster is damaged: it is too short")
    return content


def compress(kind: CompressionType, content: bytes | memoryview) -> bytes | None:
    """A cluster's content compressed, or None where that is no smaller."""
    packed = _PACK[kind](content)
    return packed if len(packed) < len(content) else None


def _inflate(data: bytes, limit: int) -> bytes:
    return zlib.decompressobj(_WINDOW_BITS).decompress(data, limit)


def _deflate(content: bytes | memoryview) -> bytes:
    packer = zlib.compressobj(
        zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WINDOW_BITS, _MEMORY_LEVEL
    )
    return packer.compress(content) + packer.flush()


def _unzstd(data: bytes, limit: int) -> bytes:
    # QEMU goes on with the next frame where one ends early.
    with zstandard.ZstdDecompressor().stream_reader(
        io.BytesIO(data), read_size=len(data), read_across_frames=True
    ) as reader:
        return reader.read(limit)


def _zstd(content: bytes | memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(content)


_UNPACK = {CompressionType.ZLIB: _inflate, CompressionType.ZSTD: _unzstd}
_PACK = {CompressionType.ZLIB: _deflate, CompressionType.ZSTD: _zstd}
