"""The two forms of a reply that succeeded, written into a buffer by the hot loop."""

from __future__ import annotations

from blockd.nbd.wire import (
    DONE,
    OFFSET_DATA,
    OFFSET_DATA_HEADER,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    none_chunk,
)


class SimpleReplies:
    """proto.md, "Simple reply message"."""

    structured = False
    #: Sizes of what the calls write, in bytes.
    done_bytes = data_header_bytes = SIMPLE_REPLY.size

    def put_done(self, buffer: memoryview, at: int, cookie: int) -> None:
        """The whole reply to a request without data to return."""
        SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def put_data_header(
        self, buffer: memoryview, at: int, cookie: int, offset: int, length: int
    ) -> None:
        """What comes before a READ's ``length`` bytes, at least one, from ``offset`` on."""
        self.put_done(buffer, at, cookie)

    def empty_read(self, cookie: int) -> bytes:
        """The whole reply to a READ of no bytes."""
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)


class StructuredReplies(SimpleReplies):
    """proto.md, "Structured reply chunk message".

    Data comes in one chunk always, so NBD_CMD_FLAG_DF holds. What has no data may still be
    answered by a simple reply, and is.
    """

    structured = True
    data_header_bytes = OFFSET_DATA_HEADER.size

    def put_data_header(
        self, buffer: memoryview, at: int, cookie: int, offset: int, length: int
    ) -> None:
        header = (STRUCTURED_REPLY_MAGIC, DONE, OFFSET_DATA, cookie, length + 8, offset)
        OFFSET_DATA_HEADER.pack_into(buffer, at, *header)

    def empty_read(self, cookie: int) -> bytes:
        return none_chunk(cookie)
