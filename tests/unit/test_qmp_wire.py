"""QMP's bytes: messages in, however they are cut, and lines out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from blockd import limits
from blockd.events import Event
from blockd.qmp import wire
from blockd.qmp.framing import Broken, Reader

#: Some mistake, in the library's words.
PARSE_ERROR = Broken("JSON parse error")
TOO_LARGE = Broken("JSON token size limit exceeded")
TOO_DEEP = Broken("JSON nesting depth limit exceeded")
DUPLICATE = Broken("JSON parse error, duplicate key")


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


#: What a client sends, and the messages that are in it.
CASES: dict[str, tuple[bytes, list[Any]]] = {
    # Framing.
    "no line end": (b'{"execute": "quit"}', [{"execute": "quit"}]),
    "line end": (b'{"execute": "quit"}\r\n', [{"execute": "quit"}]),
    "two on a line": (b'{"id": 1}{"id": 2}', [{"id": 1}, {"id": 2}]),
    "one on three lines": (b'{\n"id":\r\n\t1 }\n', [{"id": 1}]),
    "only blanks": (b" \n\r\n\t", []),
    "nothing": (b"", []),
    "brackets in strings": (b'{"a": "}]{["}{}', [{"a": "}]{["}, {}]),
    "quotes in strings": (b'{"a": "\\"}\\\\"}{}', [{"a": '"}\\'}, {}]),
    "array": (b'[1, ["x"]]', [[1, ["x"]]]),
    "string": (b'"x y"', ["x y"]),
    "words": (b'1 true null\n"x"2{}', [1, True, None, "x", 2, {}]),
    # Values.
    "empty": (b'{"a": {}, "b": []}', [{"a": {}, "b": []}]),
    "UTF-8": ('{"a": "é€😀"}'.encode(), [{"a": "é€😀"}]),
    "escapes": (
        rb'{"\u00e9": "\ud83d\ude00\"\\\/\b\f\n\r\t"}',
        [{"é": '😀"\\/\b\f\n\r\t'}],
    ),
    "64 bits": (
        b"[9223372036854775807, -9223372036854775808, 18446744073709551615]",
        [[2**63 - 1, -(2**63), 2**64 - 1]],
    ),
    "above 64 bits": (b"[18446744073709551616]", [[2.0**64]]),
    "below 64 bits": (b"[-9223372036854775809]", [[-(2.0**63)]]),
    "very long integer": (b"[" + b"9" * 5000 + b"]", [[float("inf")]]),
    "integers are exact": (b"[9007199254740993]", [[9007199254740993]]),
    "floats": (b"[1.5, -0.25e3, 1.0]", [[1.5, -250.0, 1.0]]),
    # QEMU's dialect.
    "single quotes": (b"{'a': 'b'}", [{"a": "b"}]),
    "both quotes": (b'{\'a\': "it\'s", "b": \'say "x"\'}', [{"a": "it's", "b": 'say "x"'}]),
    "escaped single quotes": (rb"""{'a': 'it\'s', "b": "it\'s"}""", [{"a": "it's", "b": "it's"}]),
    "escaped double quotes": (rb"""{'a': '\"x\\'}""", [{"a": '"x\\'}]),
    "brackets in single quotes": (b"{'a': '}\"'}{}", [{"a": '}"'}, {}]),
    # Mistakes, and that the next message is read.
    "duplicate key": (b'{"a": 1, "a": 1}{}', [DUPLICATE, {}]),
    "duplicate key inside": (b'{"x": [{"a": {}, "a": 1}]}{}', [DUPLICATE, {}]),
    "same key on two levels": (b'{"a": {"a": 1}}', [{"a": {"a": 1}}]),
    "missing colon": (b'{"a" 1}{}', [PARSE_ERROR, {}]),
    "missing value": (b'{"a":}{}', [PARSE_ERROR, {}]),
    "trailing comma": (b'{"a": 1,}[1,]{}', [PARSE_ERROR, PARSE_ERROR, {}]),
    "key without quotes": (b"{a: 1}{}", [PARSE_ERROR, {}]),
    "wrong bracket": (b"{]{}", [PARSE_ERROR, {}]),
    "closing brackets": (b"}]{}", [PARSE_ERROR, PARSE_ERROR, {}]),
    "bad word": (b"nul\n{}", [PARSE_ERROR, {}]),
    "bad word before a message": (b"x{}", [PARSE_ERROR, {}]),
    "bad number": (b"[01]{}", [PARSE_ERROR, {}]),
    "no numbers": (b"[NaN][-Infinity]{}", [PARSE_ERROR, PARSE_ERROR, {}]),
    "bad escape": (rb'{"a": "\x"}{}', [PARSE_ERROR, {}]),
    "short escape": (rb'{"a": "\u12"}{}', [PARSE_ERROR, {}]),
    "half a surrogate pair": (rb'["\ud83d"]["\ude00\ud83d"]{}', [PARSE_ERROR, PARSE_ERROR, {}]),
    "surrogate in UTF-8": (b'["\xed\xa0\xbd"]{}', [PARSE_ERROR, {}]),
    "NUL": (rb'["a\u0000b"]{}', [PARSE_ERROR, {}]),
    "no NUL": (rb'["\\u0000"]', [["\\u0000"]]),
    "cut UTF-8": (b'["\xc3"]{}', [PARSE_ERROR, {}]),
    "open string": (b'{"execute": "quit}\n{}', [PARSE_ERROR, {}]),
    "open single quote": (b"{'execute': it's}\n{}", [PARSE_ERROR, {}]),
    "line end in a string": (b'["a\\\nb"]\n{}', [PARSE_ERROR, PARSE_ERROR, PARSE_ERROR, {}]),
    "control character": (b'{"a": [\x00{}', [PARSE_ERROR, {}]),
    "no UTF-8": (b"\xff\xfe{}", [PARSE_ERROR, PARSE_ERROR, {}]),
    "no UTF-8 inside": (b"[\xff{}", [PARSE_ERROR, {}]),
    # Limits.
    "deepest": (nested(limits.QMP_NESTING_LIMIT) + b"{}", [Any, {}]),
    "too deep": (nested(limits.QMP_NESTING_LIMIT + 1) + b"{}", [TOO_DEEP, {}]),
    "far too deep": (nested(10_000) + b"{}", [TOO_DEEP, {}]),
    "too deep with the rest in strings": (
        b"[" * 1000 + b'"]"' + b"]" * 999 + b"\"[\", ']']{}",
        [TOO_DEEP, {}],
    ),
}


def pieces(data: bytes, rng: random.Random) -> Iterator[bytes]:
    while data:
        size = rng.choice((1, 2, 3, 10, 100, 10_000))
        yield data[:size]
        data = data[size:]


def read(*parts: bytes) -> list[Any]:
    reader = Reader()
    return [message for part in parts for message in reader.feed(part)]


def check(got: list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected), got
    for message, wanted in zip(got, expected, strict=True):
        if wanted is PARSE_ERROR:
            assert isinstance(message, Broken)
            assert message.message.startswith("JSON parse error, ")
        elif wanted is not Any:
            assert message == wanted
            assert type(message) is type(wanted)


each_case = pytest.mark.parametrize(("data", "expected"), CASES.values(), ids=CASES.keys())


@each_case
def test_whole(data: bytes, expected: list[Any]) -> None:
    # A word ends where something else begins.
    check(read(data + b"\n"), expected)


@each_case
def test_byte_by_byte(data: bytes, expected: list[Any]) -> None:
    check(read(*(data[at : at + 1] for at in range(len(data))), b"\n"), expected)


@each_case
def test_in_random_pieces(data: bytes, expected: list[Any]) -> None:
    for seed in range(20):
        check(read(*pieces(data + b"\n", random.Random(seed))), expected)


def test_a_message_is_there_with_its_last_byte() -> None:
    reader = Reader()
    assert list(reader.feed(b'{"a": [1]')) == []
    assert list(reader.feed(b"}")) == [{"a": [1]}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 2}', "JSON parse error, duplicate key"),
        (b"[NaN]", "JSON parse error, invalid keyword 'NaN'"),
        (b'{"a":}', "JSON parse error, Expecting value at character 5"),
        (b'["a\n', "JSON parse error, Invalid control character at character 3"),
        (rb'["\u0000"]', r"JSON parse error, \u0000 is not a valid Unicode character"),
        (b'["\xff', "JSON parse error, invalid UTF-8 sequence"),
    ],
)
def test_the_client_is_told_what_is_wrong(data: bytes, message: str) -> None:
    assert read(data + b"\n")[0] == Broken(message)


# -- size --------------------------------------------------------------------------------------


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(limits, "QMP_MESSAGE_BYTES", 100)
    return 100


@pytest.mark.parametrize("template", [b'{"a": "%s"}', b"['%s']", b'"%s"', b"[%s]"])
@pytest.mark.parametrize("piece_bytes", [1, 7, 10_000])
def test_a_message_may_be_as_large_as_the_limit_and_no_larger(
    small_messages: int, template: bytes, piece_bytes: int
) -> None:
    room = small_messages - len(template) + len(b"%s")
    for size, expected in ((room, Any), (room + 1, TOO_LARGE), (10 * room, TOO_LARGE)):
        data = template % (b"1" * size) + b'\n{"next": true}'
        parts = [data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)]
        check(read(*parts), [expected, {"next": True}])


@pytest.mark.parametrize(
    "endless", [b"{", b'{"a": "', b"['", b'"', b"x", b"1", b'{"a": 1, "b": [', b"[\\", b'"\\\\']
)
def test_of_an_endless_message_nothing_is_kept(small_messages: int, endless: bytes) -> None:
    reader = Reader()
    messages = list(reader.feed(endless))
    for _ in range(1000):
        messages += reader.feed(b" " * 20 if endless == b"{" else b"1" * 20)
        assert len(reader._text) <= small_messages + 20
    assert messages == [TOO_LARGE]


def test_after_an_endless_string_a_control_character_begins_afresh(small_messages: int) -> None:
    assert read(b'{"a": "', b"x" * 1000, b'\n{"next": 1}') == [TOO_LARGE, {"next": 1}]


def test_blanks_between_messages_are_not_kept(small_messages: int) -> None:
    reader = Reader()
    assert list(reader.feed(b" " * 1000)) == []
    assert list(reader.feed(b"\n{}")) == [{}]


def test_a_message_in_many_pieces_takes_no_longer_than_it_is_large() -> None:
    """Counted, not timed: each byte is looked at a few times at the most."""
    data = b'{"a": "' + b"x" * 200_000 + b'"}'
    reader = Reader()
    seen = 0
    for at in range(0, len(data), 100):
        seen += len(reader._text) - reader._scanned
        list(reader.feed(data[at : at + 100]))
    assert seen < len(data)


# -- out ---------------------------------------------------------------------------------------


def test_a_reply() -> None:
    assert wire.success({"a": 1}, {}) == b'{"return":{"a":1}}\r\n'
    assert wire.success(None, {}) == b'{"return":{}}\r\n'
    assert wire.success([], {"id": None}) == b'{"return":[],"id":null}\r\n'


def test_an_error() -> None:
    assert (
        wire.failure("GenericError", "No", {"id": [1]})
        == b'{"id":[1],"error":{"class":"GenericError","desc":"No"}}\r\n'
    )


@pytest.mark.parametrize(
    "value", ["x\n\r é😀", 0, -(2**63), 2**64 - 1, 1.5, True, None, [1, {"a": []}], {"b": {}}]
)
def test_what_was_read_as_id_is_sent_back_on_one_line(value: object) -> None:
    line = wire.success(None, {"id": value})
    assert line.count(b"\n") == 1
    assert read(line) == [{"return": {}, "id": value}]


def test_the_deepest_id_can_be_sent_back() -> None:
    text = nested(limits.QMP_NESTING_LIMIT)
    (value,) = read(text)
    assert wire.success(None, {"id": value}) == b'{"return":{},"id":' + text + b"}\r\n"


def test_an_event() -> None:
    happened = Event("JOB_STATUS_CHANGE", {"id": "j", "status": "null"}, 1_234_567_890_123_456)
    assert wire.event(happened) == (
        b'{"timestamp":{"seconds":1234567,"microseconds":890123},'
        b'"event":"JOB_STATUS_CHANGE","data":{"id":"j","status":"null"}}\r\n'
    )


def test_an_event_without_data() -> None:
    assert wire.event(Event("STOP", {}, 0)) == (
        b'{"timestamp":{"seconds":0,"microseconds":0},"event":"STOP"}\r\n'
    )


def test_a_name_that_is_not_utf_8_can_be_told() -> None:
    name = b"ab\xffc".decode("utf-8", "surrogateescape")
    assert wire.success({"names": [name, "\u00e9"]}, {"id": 1}) == (
        '{"return":{"names":["ab\ufffdc","\u00e9"]},"id":1}\r\n'.encode()
    )
