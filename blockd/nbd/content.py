"""What a READ returns, cut into data and holes where the client has asked for no single chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

from blockd import limits
from blockd.nbd.replies import SimpleReplies, is_zero
from blockd.nbd.wire import DONE, CmdFlag, Request


@dataclass(slots=True)
class _Run:
    """Consecutive bytes; without ``views`` they are zeroes."""

    length: int = 0
    views: list[memoryview] = field(default_factory=list)


class Content:
    """A reply to ``request``, a READ of at least one byte, as its data comes in."""

    def __init__(self, request: Request, replies: SimpleReplies) -> None:
        self._request = request
        self._replies = replies
        self._holes = replies.hole_bytes and not request.flags & CmdFlag.DF
        self._runs: list[_Run] = []

    def add(self, data: bytearray) -> None:
        """The next bytes, which must not change any more."""
        if not self._holes:
            self._add(len(data), memoryview(data))
            return
        view, step = memoryview(data), limits.NBD_HOLE_BYTES
        for start in range(0, len(data), step):
            end = min(start + step, len(data))
            zero = is_zero(data, start, end)
            self._add(end - start, None if zero else view[start:end])

    def _add(self, length: int, view: memoryview | None) -> None:
        if not self._runs or bool(self._runs[-1].views) is (view is None):
            self._runs.append(_Run())
        run = self._runs[-1]
        run.length += length
        if view is not None:
            run.views.append(view)

    def reply(self) -> list[memoryview]:
        """All of it, once all data is there."""
        parts: list[memoryview] = []
        skip = 0
        for run in self._runs:
            parts.append(self._head(run, skip))
            parts += run.views
            skip += run.length
        return parts

    def _head(self, run: _Run, skip: int) -> memoryview:
        replies = self._replies
        size, put = replies.hole_bytes, replies.put_hole
        if run.views:
            size, put = replies.data_header_bytes, replies.put_data_header
        head = memoryview(bytearray(size))
        done = DONE if run is self._runs[-1] else 0
        put(head, 0, self._request.cookie, self._request.offset, run.length, skip=skip, done=done)
        return head
