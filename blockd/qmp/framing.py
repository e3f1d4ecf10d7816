"""QMP messages out of a stream of bytes: JSON texts that nothing but their brackets delimits.

Where a text ends is found here; reading it is the library's work. A text ends where its brackets
are balanced, right or wrong, and also at a byte that JSON has no place for, as with QEMU:
after a mistake the next text is read afresh, and a client that left a string open gets back into
step with its next line, or with a byte 0xFF.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import orjson

from blockd import limits

_BLANKS = re.compile(rb"[ \t\r\n]*+")
#: Bytes that are neither in a text nor between two.
_ALIEN = rb"\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff"
#: What counts inside brackets, and what ends a word or a number outside of them.
_MARK = re.compile(rb"[{}\[\]\"'" + _ALIEN + rb"]")
_WORD_END = re.compile(rb"[ \t\r\n{}\[\]\"'" + _ALIEN + rb"]")
#: The rest of a string up to its closing quote, or to a byte that no string has.
_STRING_REST = {
    ord('"'): re.compile(rb'(?:[^"\\\x00-\x1f\xfe\xff]|\\[^\x00-\x1f\xfe\xff])*+'),
    ord("'"): re.compile(rb"(?:[^'\\\x00-\x1f\xfe\xff]|\\[^\x00-\x1f\xfe\xff])*+"),
}
_ANY_STRING = re.compile(r""""(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+'""", re.DOTALL)
_OPENING = b"{[\"'"
_ESCAPE_OR_QUOTE = re.compile(r'\\.|"', re.DOTALL)
#: What JSON has for the dialect's escapes and quotes, where it is another thing.
_IN_JSON = {"\\'": "'", '"': '\\"'}
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class Broken(NamedTuple):
    """What came instead of a message; ``message`` tells the client."""

    message: str


class Reader:
    """Turns a client's bytes into JSON values, however they are cut.

    Holds at most one text of ``limits.QMP_MESSAGE_BYTES``. A text over a limit is reported once
    and its rest is passed over.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._begin_next(0)

    def _begin_next(self, end: int) -> None:
        """The text up to ``end`` is done with."""
        del self._text[:end]
        #: Up to here the text has been looked at.
        self._scanned = 0
        #: What the text begins with: nothing yet, a word, or a bracket or quote.
        self._kind = ""
        self._depth = 0
        #: The quote of the string in which the scan stopped, or 0.
        self._quote = 0
        self._passing_over = False

    def feed(self, data: bytes) -> Iterator[Any | Broken]:
        """The values that ``data`` completes; to be taken to the end before the next call."""
        self._text += data
        while True:
            end = self._find_end()
            reason = None if self._passing_over else self._excess(end)
            if reason is not None:
                self._passing_over = True
                yield Broken(reason)
            if end is not None:
                text = bytes(self._text[:end])
                passed_over = self._passing_over
                self._begin_next(end)
                if not passed_over:
                    yield _decode(text)
            elif reason is None:
                break
        if self._passing_over:
            del self._text[: self._scanned]
            self._scanned = 0

    def _excess(self, end: int | None) -> str | None:
        if self._depth > limits.QMP_NESTING_LIMIT:
            return "JSON nesting depth limit exceeded"
        if (len(self._text) if end is None else end) > limits.QMP_MESSAGE_BYTES:
            return "JSON token size limit exceeded"
        return None

    def _find_end(self) -> int | None:
        """Where the first text ends, if its end is there."""
        text = self._text
        if not self._kind:
            del text[: _end(_BLANKS, text, 0)]
            if not text:
                return None
            if text[0] in _OPENING:
                self._kind = "value"
            elif _WORD_END.match(text):
                # A closing bracket or an alien byte: a text of its own, and a wrong one.
                return 1
            else:
                self._kind = "word"
        return self._value_end() if self._kind == "value" else self._word_end()

    def _word_end(self) -> int | None:
        match = _WORD_END.search(self._text, self._scanned)
        self._scanned = len(self._text)
        return match.start() if match is not None else None

    def _value_end(self) -> int | None:
        text = self._text
        while True:
            if self._quote:
                if not self._pass_string():
                    return None
            elif (match := _MARK.search(text, self._scanned)) is not None:
                self._scanned = match.end()
                self._pass_mark(text[match.start()])
            else:
                self._scanned = len(text)
                return None
            if self._depth <= 0 and not self._quote:
                return self._scanned
            if self._depth > limits.QMP_NESTING_LIMIT and not self._passing_over:
                return None

    def _pass_mark(self, byte: int) -> None:
        if byte in _STRING_REST:
            self._quote = byte
        elif byte in b"{[":
            self._depth += 1
        elif byte in b"}]":
            self._depth -= 1
        else:
            self._depth = 0

    def _pass_string(self) -> bool:
        """Go on behind the string in which the scan is; whether its end is there."""
        text = self._text
        end = self._scanned = _end(_STRING_REST[self._quote], text, self._scanned)
        if text[end : end + 1] == b"\\":
            end += 1
        if end >= len(text):
            return False
        if text[end] != self._quote:
            # A line ends inside the string, or the like: the text is wrong, and ends here.
            self._depth = 0
        self._scanned = end + 1
        self._quote = 0
        return True


def _end(pattern: re.Pattern[bytes], text: bytearray, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _decode(text: bytes) -> Any | Broken:
    try:
        return _load(text.decode())
    except UnicodeDecodeError:
        return Broken("JSON parse error, invalid UTF-8 sequence")
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        return Broken(f"JSON parse error, {what} at character {error.pos}")
    except ValueError as error:
        return Broken(f"JSON parse error, {error}")


def _load(text: str) -> Any:
    if "'" in text:
        text = _ANY_STRING.sub(_double_quoted, text)
    value = json.loads(
        text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_refuse_constant
    )
    if "\\u" in text:
        _refuse_bad_characters(text, value)
    return value


def _double_quoted(match: re.Match[str]) -> str:
    """A string of QEMU's dialect, which may stand in single quotes, as JSON has it."""
    inside = _ESCAPE_OR_QUOTE.sub(lambda match: _IN_JSON.get(match[0], match[0]), match[0][1:-1])
    return f'"{inside}"'


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _integer(digits: str) -> int | float:
    """An integer where it fits into 64 bits, signed or not; otherwise a float, as in QEMU."""
    if len(digits) <= len(str(-(2**63))) and -(2**63) <= int(digits) < 2**64:
        return int(digits)
    return float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"invalid keyword '{name}'")


def _refuse_bad_characters(text: str, value: Any) -> None:
    """A NUL would end a file's name early; half a surrogate pair could not be sent back."""
    if _NUL.search(text):
        raise ValueError("\\u0000 is not a valid Unicode character")
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        raise ValueError("half a surrogate pair is not a valid Unicode character") from None
