"""A disk in memory that remembers all that was done to it, and what a power cut could leave."""

from __future__ import annotations

import random

from tests.helpers.memory_driver import MemoryDriver

_SECTOR_BYTES = 512
#: A flush: what was written before it is durable. A new size: the file's end.
FLUSH = None
Step = tuple[int, bytes] | int | None


class PowerCutDriver(MemoryDriver):
    """``steps``: each write (offset and data), each new size, and each flush, in order."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.name = "file"
        self.filename = "/image.qcow2"
        self.steps: list[Step] = []
        self._first = bytes(content)

    def _change(self, operation: str, count: int, offset: int, data: bytes) -> None:
        super()._change(operation, count, offset, data)
        self.steps.append((offset, data))

    async def flush(self) -> None:
        await super().flush()
        self.steps.append(FLUSH)

    async def truncate(self, size_bytes: int) -> None:
        await super().truncate(size_bytes)
        self.steps.append(size_bytes)

    def left_after(self, count: int, rng: random.Random) -> bytes:
        """What the first ``count`` steps may leave: all up to the last flush, and of the later
        writes any sectors, in any order.
        """
        steps = self.steps[:count]
        flushed = max((at for at, step in enumerate(steps) if step is FLUSH), default=-1)
        content = bytearray(self._first)
        for step in steps[:flushed]:
            _apply(content, step)
        for step in steps[flushed + 1 :]:
            if isinstance(step, tuple) and rng.random() < 0.7:
                # Most arrive as a whole.
                _apply(content, step if rng.random() < 0.7 else None)
                _tear(content, step, rng)
            elif isinstance(step, int) and step > len(content):
                _apply(content, step)
        return bytes(content)


def _apply(content: bytearray, step: Step) -> None:
    if isinstance(step, tuple):
        offset, data = step
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
    elif step is not None:
        del content[step:]
        content.extend(bytes(step - len(content)))


def _tear(content: bytearray, step: tuple[int, bytes], rng: random.Random) -> None:
    """Let some of the write's sectors arrive."""
    offset, data = step
    for at in range(0, len(data), _SECTOR_BYTES):
        if rng.random() < 0.5:
            _apply(content, (offset + at, data[at : at + _SECTOR_BYTES]))
