"""What must be dirty in a bitmap, and what may be, from the writers' logs and the commands.

Pure but for the logs and the disk, which it reads. Everything is counted in blocks of
``BLOCK_BYTES``, of which a granule has one or more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pyroaring import BitMap

from tests.torture.write_log import BLOCK_BYTES, Answer, Kind, WriteLog, stamped

#: What the disk holds at a block.
Content = Callable[[int], bytes]


@dataclass(frozen=True)
class Moment:
    """A command in the writers' time: writes before ``before`` had been answered when it was sent,
    those from ``after`` on were sent when its answer had come.
    """

    before: int
    after: int


@dataclass(frozen=True)
class Model:
    """One bitmap. ``must``, ``may``: blocks. Writes from ``must_from`` on (``may_from`` on) come to
    that where it records.
    """

    recording: bool
    must: BitMap = field(default_factory=BitMap)
    may: BitMap = field(default_factory=BitMap)
    must_from: int = 0
    may_from: int = 0

    def cleared(self, at: Moment) -> Model:
        return Model(self.recording, must_from=at.after, may_from=at.before)

    def enabled(self, at: Moment) -> Model:
        if self.recording:
            return self
        return replace(self, recording=True, must_from=at.after, may_from=at.before)

    def disabled(self, at: Moment, log: WriteLog) -> Model:
        if not self.recording:
            return self
        return Model(False, must=self.must_at(log, at.before), may=self.may_at(log, at.after))

    def merged(self, must: BitMap, may: BitMap) -> Model:
        return replace(self, must=self.must | must, may=self.may | may)

    def must_at(self, log: WriteLog, end: int, content: Content | None = None) -> BitMap:
        """What has to be dirty by now; with ``content`` also what was not answered but done."""
        must = self.must.copy()
        if self.recording and self.must_from < end:
            for number, write, answer in log.entries(self.must_from, end):
                if answer is Answer.DONE:
                    must.add_range(write.blocks().start, write.blocks().stop)
                elif content is not None and write.kind is Kind.WRITE:
                    must.update(
                        block
                        for block in write.blocks()
                        if content(block) == stamped(number, block)
                    )
        return must

    def may_at(self, log: WriteLog, end: int) -> BitMap:
        may = self.may.copy()
        return may | touched(log, self.may_from, end) if self.recording else may


def touched(log: WriteLog, first: int, end: int) -> BitMap:
    """The blocks of the writes from ``first`` up to ``end``."""
    blocks = BitMap()
    for _, write, _ in log.entries(first, max(first, end)):
        blocks.add_range(write.blocks().start, write.blocks().stop)
    return blocks


#: What becomes of a model by something that began before the kill, at the given moment.
Change = Callable[[Model, Moment], Model]


@dataclass
class BitmapModel:
    """A bitmap by name, and what is not known of it: a command or a job that was under way."""

    name: str
    granularity: int
    model: Model
    #: A job's, which has not been told of yet.
    job: Change | None = None
    #: A command's, which has not been answered yet.
    command: Change | None = None
    #: It may not be there: it was being added, or removed.
    may_be_gone: bool = False

    def possible(self, at: Moment) -> Sequence[Model]:
        """All that it can be."""
        models = [self.model]
        if self.job is not None:
            models.append(self.job(self.model, at))
        if self.command is not None:
            models += [self.command(model, at) for model in models]
        return models

    def expanded(self, blocks: BitMap) -> BitMap:
        """The blocks of all granules that have one of ``blocks``."""
        each = self.granularity // BLOCK_BYTES
        if each <= 1:
            return blocks
        expanded = BitMap()
        for granule in {block // each for block in blocks}:
            expanded.add_range(granule * each, (granule + 1) * each)
        return expanded


@dataclass(frozen=True)
class Verdict:
    """What a bitmap is, held against what it had to be. In blocks and granules."""

    lost: BitMap
    dirty_granules: int
    overshoot_granules: int


def judge(
    bitmap: BitmapModel, models: Sequence[Model], dirty: BitMap, log: WriteLog, content: Content
) -> Verdict:
    """``models``: what it can be, ``dirty``: the blocks of its dirty granules."""
    end = log.count()
    must, *others = [model.must_at(log, end, content) for model in models]
    for other in others:
        must &= other
    may = BitMap.union(*[model.may_at(log, end) for model in models])
    each = max(bitmap.granularity // BLOCK_BYTES, 1)
    granules = BitMap({block // each for block in dirty})
    wanted = BitMap({block // each for block in may})
    return Verdict(must - dirty, len(granules), len(granules - wanted))
