"""Random NBD conversations, the same for any server, and what servers make of them.

A program is made from a ``Random`` alone. ``run`` plays it on one server and returns what that
answered, in a form in which two servers can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import NamedTuple

from blockd.nbd import wire
from blockd.nbd.options import ALLOCATION_DEPTH, BASE_ALLOCATION, meta_data
from blockd.nbd.wire import ClientFlag, Cmd, CmdFlag, Headers, Info, Option, Rep
from tests.helpers.nbd_client import NbdClient
from tests.helpers.nbd_codec import Call, Pending, info_bytes, option_bytes

DISK_BYTES = 1 << 20
EXPORT = "disk"
DESCRIPTION = "the description"

CLOSED = "closed"


class Haggling(NamedTuple):
    """A client's flags, and its options with their data."""

    flags: int
    options: list[tuple[int, bytes]]


class Program(NamedTuple):
    """``batches``: requests that are all sent before their replies are awaited."""

    haggling: Haggling
    batches: list[list[Call]]

    @property
    def calls(self) -> list[Call]:
        return [call for batch in self.batches for call in batch]

    @property
    def headers(self) -> Headers:
        if (Option.EXTENDED_HEADERS, b"") in self.haggling.options:
            return Headers.EXTENDED
        structured = (Option.STRUCTURED_REPLY, b"") in self.haggling.options
        return Headers.STRUCTURED if structured else Headers.SIMPLE


class Answer(NamedTuple):
    """To one option, or to one request: ``code`` is Rep's, or Errno's, or 0, or CLOSED.

    ``data``: what came with it, if it was no error; ``message``: if it was one; ``statuses``: the
    runs of a block status by context, each with its end in the range.
    """

    code: int | str
    data: bytes = b""
    message: str = ""
    statuses: Mapping[int, list[tuple[int, int]]] = {}


class Played(NamedTuple):
    """The answers to all requests in their order, and what the disk holds at the end."""

    answers: list[Answer]
    content: bytes


# --- making them --------------------------------------------------------------------------------

NAMES = [EXPORT.encode()] * 6 + [
    b"",
    b"nope",
    b"x" * 100,
    b"x" * 4096,
    b"x" * 4097,
    b"\xff",
    b"a\0",
]
#: Options with what they mostly take: a name with requests, queries, or nothing.
NAMED = [Option.INFO, Option.GO]
PLAIN = [Option.LIST, Option.STRUCTURED_REPLY, Option.STARTTLS, Option.ABORT]
PLAIN += [Option.EXTENDED_HEADERS]
QUERYING = [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT]
QUERIES = [BASE_ALLOCATION.encode()] * 3
QUERIES += [b"base:", b"base:x", b"base", b"qemu:", b"qemu:dirty-bitmap:", b"qemu:dirty-bitmap:b"]
QUERIES += [b"qemu:allocation-depth", b"", b":", b"x:y", b"q" * 5000]
UNKNOWN = [0, 4, 12, 2**16, 2**32 - 1]


def haggling(random: Random) -> Haggling:
    flags = random.choice([*[3] * 20, ClientFlag.C_FIXED_NEWSTYLE, 0, 2, 4, 2**31])
    count = random.randrange(8)
    options = [_option(random) for _ in range(count)]
    if random.random() < 0.2:
        options.append((Option.EXPORT_NAME, random.choice(NAMES)))
    return Haggling(int(flags), options)


def _option(random: Random) -> tuple[int, bytes]:
    option: int
    chosen = random.random()
    if chosen < 0.35:
        option, data = random.choice(NAMED), _info_data(random)
    elif chosen < 0.65:
        option, data = random.choice(PLAIN), b""
    elif chosen < 0.95:
        option, data = random.choice(QUERYING), _query_data(random)
    else:
        option, data = random.choice(UNKNOWN), random.randbytes(random.randrange(9))
    if random.random() < 0.1 and option not in QUERYING:
        data = _damaged(random, data)
    elif random.random() < 0.1:
        # No more than that: QEMU takes what follows the queries for the next option.
        data = data[: random.randrange(len(data) + 1)]
    return option, data


def _info_data(random: Random) -> bytes:
    requests = [*Info, 4, 2**16 - 1]
    asked = [random.choice(requests) for _ in range(random.randrange(4))]
    return info_bytes(random.choice(NAMES), *asked)


def _query_data(random: Random) -> bytes:
    name = random.choice(NAMES)
    queries = [random.choice(QUERIES) for _ in range(random.randrange(4))]
    data = wire.U32.pack(len(name)) + name + wire.U32.pack(len(queries))
    return data + b"".join(wire.U32.pack(len(query)) + query for query in queries)


def _damaged(random: Random, data: bytes) -> bytes:
    """Longer, shorter, or with another byte somewhere."""
    at = random.randrange(len(data) + 1)
    junk = random.randbytes(random.randrange(1, 5))
    return random.choice([data[:at], data + junk, data[:at] + junk + data[at + len(junk) :]])


def program(random: Random) -> Program:
    """Into transmission, and then requests."""
    headers = random.choice([None, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
    options = [(headers.value, b"")] if headers else []
    if headers and random.random() < 0.8:
        contexts = [BASE_ALLOCATION, ALLOCATION_DEPTH][: random.choice([1, 2])]
        data = meta_data(EXPORT, contexts)
        options.append((Option.SET_META_CONTEXT.value, data))
    options.append((Option.GO.value, info_bytes(EXPORT.encode())))
    made = Program(Haggling(3, options), [])
    for _ in range(random.randrange(1, 8)):
        made.batches.append(_batch(random, extended=made.headers is Headers.EXTENDED))
    return made


#: Each request of a batch changes at most a part of the disk that is its own: what is in flight at
#: the same time may take effect in any order.
PARTS = 8
PART_BYTES = DISK_BYTES // PARTS
COMMANDS = [Cmd.READ] * 4 + [Cmd.WRITE] * 4 + [Cmd.WRITE_ZEROES] * 3 + [Cmd.TRIM] * 2
COMMANDS += [Cmd.FLUSH, Cmd.CACHE, Cmd.BLOCK_STATUS, Cmd.BLOCK_STATUS]
FLAGS: list[int] = [
    *[CmdFlag.FUA] * 3,
    CmdFlag.NO_HOLE,
    CmdFlag.DF,
    CmdFlag.REQ_ONE,
    CmdFlag.FAST_ZERO,
]
FLAGS += [3, CmdFlag.PAYLOAD_LEN, 2**15]
UNKNOWN_COMMANDS = [8, 255, 2**16 - 1]
LENGTHS = [0, 1, 511, 512, 513, 4096, PART_BYTES]
FAR = [DISK_BYTES - 1, DISK_BYTES, DISK_BYTES + 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
LONG = [PART_BYTES + 1, DISK_BYTES + 1, 2**25 + 1, 2**31, 2**32 - 1]
#: What more would follow a WRITE is never sent.
PAYLOAD_MAX_BYTES = 2**25


def _batch(random: Random, *, extended: bool) -> list[Call]:
    parts = random.sample(range(PARTS), random.choice([1, 1, 1, 3, PARTS]))
    calls = [_call(random, part * PART_BYTES, extended=extended) for part in parts]
    fatal = [call for call in calls if _is_fatal(call)]
    # What else was in flight then may have been done or not.
    return fatal[:1] or calls


def _is_fatal(call: Call) -> bool:
    """Whether a server hangs up, rather than read the payload for which there is no room."""
    return call.cmd == Cmd.WRITE and call.length > PAYLOAD_MAX_BYTES


def _call(random: Random, start: int, *, extended: bool) -> Call:
    cmd = int(random.choice(COMMANDS if random.random() < 0.97 else UNKNOWN_COMMANDS))
    length = random.choice([*LENGTHS, random.randrange(PART_BYTES)])
    offset = start + random.randrange(PART_BYTES - length + 1)
    flags = 0 if random.random() < 0.6 else int(random.choice(FLAGS))
    if random.random() < 0.1:
        # Wrong, and so it changes nothing; never a range that ends in the disk.
        if random.random() < 0.5:
            offset, length = random.choice(FAR), max(length, 2)
        elif cmd != Cmd.FLUSH:
            longer = [2**32, 2**40, 2**63 - 1] if extended and cmd != Cmd.WRITE else []
            offset, length = DISK_BYTES - PART_BYTES + 1, random.choice([*LONG, *longer])
    if flags & CmdFlag.PAYLOAD_LEN and (extended or cmd == Cmd.BLOCK_STATUS):
        # With that, a length is a payload's: QEMU ends of a block status with one.
        flags = 0
    data = b""
    if cmd == Cmd.WRITE and length <= PAYLOAD_MAX_BYTES:
        data = random.randbytes(length)
    return Call(cmd, offset, length, flags, data)


# --- playing them -------------------------------------------------------------------------------


def haggle(address: str, haggling: Haggling) -> list[list[Answer]]:
    """The answers to each option up to the end, which may be that the server hangs up."""
    with NbdClient.connect(address, flags=haggling.flags) as client:
        told: list[list[Answer]] = []
        for option, data in haggling.options:
            try:
                told.append(_ask(client, option, data, haggling.flags))
            except (EOFError, ConnectionError):
                told.append([Answer(CLOSED)])
                break
            entered = option in (Option.GO, Option.EXPORT_NAME, Option.ABORT)
            if entered and told[-1][-1].code == Rep.ACK:
                break
        return told


def _ask(client: NbdClient, option: int, data: bytes, flags: int) -> list[Answer]:
    client.send(option_bytes(option, data))
    if option == Option.EXPORT_NAME:
        return [Answer(Rep.ACK, _entry(client, flags))]
    return list(_replies(client, option))


def _entry(client: NbdClient, flags: int) -> bytes:
    zeroes = 0 if flags & ClientFlag.C_NO_ZEROES else wire.EXPORT_NAME_ZEROES_BYTES
    return client.receive(wire.EXPORT_NAME_REPLY.size + zeroes)


def _replies(client: NbdClient, option: int) -> Iterator[Answer]:
    kind = 0
    while kind != Rep.ACK and kind < Rep.ERR_UNSUP:
        head = client.receive(wire.OPTION_REPLY.size)
        magic, answered, kind, length = wire.OPTION_REPLY.unpack(head)
        assert (magic, answered) == (wire.OPTION_REPLY_MAGIC, option), head
        payload = client.receive(length)
        if kind >= Rep.ERR_UNSUP:
            yield Answer(kind, message=payload.decode(errors="replace"))
        else:
            yield Answer(kind, payload)


def run(address: str, program: Program) -> Played:
    """Play a whole program."""
    answers: list[Answer] = []
    client = _enter(address, program.haggling)
    try:
        for batch in program.batches:
            if _is_fatal(batch[0]):
                answers.append(_hung_up(client, batch[0]))
                client.close()
                client = _enter(address, program.haggling)
            else:
                answers += map(_answer, client.run_all(batch, depth=len(batch)))
        return Played(answers, client.read(0, DISK_BYTES))
    finally:
        client.close()


def _hung_up(client: NbdClient, call: Call) -> Answer:
    """The end, whether or not a reply came before it."""
    client.submit(call)
    while not client.at_end():
        pass
    return Answer(CLOSED)


def _enter(address: str, haggling: Haggling) -> NbdClient:
    client = NbdClient.connect(address, flags=haggling.flags)
    for option, data in haggling.options:
        client.option(option, data)
        client.structured |= option == Option.STRUCTURED_REPLY
        client.extended |= option == Option.EXTENDED_HEADERS
    return client


def _answer(pending: Pending) -> Answer:
    if pending.error is not None:
        return Answer(int(pending.error.code), message=pending.error.message)
    statuses = {context: _runs(pending, runs) for context, runs in pending.statuses.items()}
    return Answer(0, bytes(pending.data), statuses=statuses)


def _runs(pending: Pending, told: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """End and flags of each run that is another than the one before it, up to the range's end."""
    runs: list[tuple[int, int]] = []
    at = pending.call.offset
    end = at + pending.call.length
    for length, flags in told:
        at = min(at + length, end)
        if runs and runs[-1][1] == flags:
            runs.pop()
        runs.append((at, flags))
    return runs
