"""The forms of a reply that succeeded, written into a buffer by the hot loop."""

from __future__ import annotations

from typing import ClassVar

from blockd.nbd.chunks import chunk
from blockd.nbd.wire import (
    DONE,
    EXTENDED_HEADER,
    EXTENDED_OFFSET_DATA_HEADER,
    EXTENDED_REPLY_MAGIC,
    OFFSET_DATA,
    OFFSET_DATA_HEADER,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Headers,
    ReplyType,
    Request,
)


class SimpleReplies:
    """proto.md, "Simple reply message"."""

    headers: ClassVar = Headers.SIMPLE
    #: Sizes of what the calls write, in bytes.
    done_bytes = data_header_bytes = SIMPLE_REPLY.size

    def put_done(self, buffer: memoryview, at: int, cookie: int, offset: int) -> None:
        """The whole reply to a request at ``offset`` without data to return."""
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def put_data_header(
        self, buffer: memoryview, at: int, cookie: int, offset: int, length: int
    ) -> None:
        """What comes before a READ's ``length`` bytes, at least one, from ``offset`` on."""
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def empty_read(self, request: Request) -> bytes:
        """The whole reply to a READ of no bytes."""
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)


class StructuredReplies(SimpleReplies):
    """proto.md, "Structured reply chunk message".

    Data comes in one chunk always, so NBD_CMD_FLAG_DF holds. What has no data may still be
    answered by a simple reply, and is.
    """

    headers = Headers.STRUCTURED
    data_header_bytes = OFFSET_DATA_HEADER.size

    def put_data_header(
        self, buffer: memoryview, at: int, cookie: int, offset: int, length: int
    ) -> None:
        header = (STRUCTURED_REPLY_MAGIC, DONE, OFFSET_DATA, cookie, length + 8, offset)
        OFFSET_DATA_HEADER.pack_into(buffer, at, *header)

    def empty_read(self, request: Request) -> bytes:
        return chunk(request, ReplyType.NONE, extended=False)


class ExtendedReplies(SimpleReplies):
    """proto.md's branch ``extension-ext-header``, "Extended reply chunk message"."""

    headers = Headers.EXTENDED
    done_bytes = EXTENDED_HEADER.size
    data_header_bytes = EXTENDED_OFFSET_DATA_HEADER.size

    def put_done(self, buffer: memoryview, at: int, cookie: int, offset: int) -> None:
        EXTENDED_HEADER.pack_into(buffer, at, EXTENDED_REPLY_MAGIC, DONE, 0, cookie, offset, 0)

    def put_data_header(
        self, buffer: memoryview, at: int, cookie: int, offset: int, length: int
    ) -> None:
        header = (EXTENDED_REPLY_MAGIC, DONE, OFFSET_DATA, cookie, offset, length + 8, offset)
        EXTENDED_OFFSET_DATA_HEADER.pack_into(buffer, at, *header)

    def empty_read(self, request: Request) -> bytes:
        return chunk(request, ReplyType.NONE, extended=True)
