"""QMP framing against random messages, cuts and garbage."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from blockd.qmp.framing import Broken, Reader

# Neither NUL nor half a surrogate pair, which are refused.
texts = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)
messages = st.lists(st.dictionaries(texts, values), max_size=4)
blanks = st.text(st.sampled_from(" \t\r\n"), max_size=2)
garbage = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b":", b",", b"1", b"a", b" "])
    | st.sampled_from([b"\n", b"\x00", b"\xff", b"\xc3", b'"a"', b"\\u12", b"true"])
    | st.binary(max_size=3)
).map(b"".join)


def read_in_pieces(data: bytes, cuts: list[int]) -> list[Any]:
    reader = Reader()
    ends = [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    starts = [0, *ends]
    parts = [data[start:end] for start, end in zip(starts, ends, strict=False)]
    return [message for part in parts for message in reader.feed(part)]


styles = st.fixed_dictionaries(
    {"ensure_ascii": st.booleans(), "indent": st.sampled_from([None, 1])}
)


@given(messages, st.lists(st.integers(0)), blanks, styles)
def test_messages_come_as_they_were_sent(
    sent: list[Any], cuts: list[int], between: str, style: dict[str, Any]
) -> None:
    text = between.join(json.dumps(each, **style) for each in sent)
    assert read_in_pieces(text.encode(), cuts) == sent


@given(garbage, st.lists(st.integers(0)))
def test_how_garbage_is_cut_makes_no_difference(data: bytes, cuts: list[int]) -> None:
    assert read_in_pieces(data, cuts) == read_in_pieces(data, [])


@given(garbage, st.sampled_from([b"\x00", b"\x01", b"\xfe", b"\xff"]))
def test_a_byte_that_json_has_no_place_for_ends_any_garbage(data: bytes, byte: bytes) -> None:
    *before, last = read_in_pieces(data + byte + b'{"execute": "quit"}', [])
    assert last == {"execute": "quit"}
    assert any(isinstance(message, Broken) for message in before)
