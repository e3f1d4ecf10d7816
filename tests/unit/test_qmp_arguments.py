"""What a client is told about arguments that a command can't take: the peer's words throughout.

The sentences were heard from qemu-storage-daemon; ``tests/interop/test_qmp_refusals.py`` asks it
again.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import inspect

from blockd.errors import BlockdError
from blockd.qmp import arguments
from blockd.qmp.commands import COMMANDS
from blockd.qmp.types.base import Object
from blockd.qmp.types.blockdev import BlockdevRefOrNull, FileOptions
from tests.helpers.qmp_mistakes import least_object, structs
from tests.helpers.qmp_refusals import REFUSALS, declaration_of

# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "sent", "error"), REFUSALS)
def test_refusal(command: str, sent: dict[str, Any], error: str) -> None:
    with pytest.raises(BlockdError) as refused:
        arguments.parse(declaration_of(command), sent)
    assert type(refused.value) is BlockdError
    assert refused.value.message == error


def test_the_client_s_message_is_left_as_it_is() -> None:
    sent = {"driver": "raw", "file": {"driver": "file", "filename": "x"}, "node-name": "n"}
    before = repr(sent)
    arguments.parse(declaration_of("blockdev-add"), sent)
    assert repr(sent) == before


# -- what is taken -----------------------------------------------------------------------------


def test_defaults() -> None:
    taken = arguments.parse(declaration_of("block-dirty-bitmap-add"), {"node": "n", "name": "b"})
    assert (taken.granularity, taken.persistent, taken.disabled) == (None, False, False)


@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_the_ends_of_an_unsigned_range(value: int) -> None:
    sent = {"node": "n", "name": "b", "granularity": value}
    assert arguments.parse(declaration_of("block-dirty-bitmap-add"), sent).granularity == value


@pytest.mark.parametrize("value", [-(2**63), -1, 0, 2**63 - 1])
def test_the_ends_of_a_signed_range(value: int) -> None:
    sent = {"device": "j", "speed": value}
    assert arguments.parse(declaration_of("block-job-set-speed"), sent).speed == value


class Image(Object, kw_only=True):
    """It has a backing file, has none, or leaves that to the image."""

    backing: BlockdevRefOrNull | msgspec.UnsetType = msgspec.UNSET


def test_no_node_is_not_the_same_as_nothing_said() -> None:
    assert arguments.parse(Image, {}).backing is msgspec.UNSET
    assert arguments.parse(Image, {"backing": None}).backing is None
    assert arguments.parse(Image, {"backing": "n"}).backing == "n"
    below = arguments.parse(Image, {"backing": {"driver": "file", "filename": "f"}}).backing
    assert below == FileOptions(filename="f")
    for sent, error in (
        (3, "Invalid parameter type for 'backing', expected: BlockdevRefOrNull"),
        ({}, "Parameter 'backing.driver' is missing"),
    ):
        assert refusal(Image, {"backing": sent}) == error


def test_a_node_inside_a_node() -> None:
    file = {"driver": "host_device", "filename": "/dev/x", "cache": {"direct": True}}
    sent = {"driver": "raw", "node-name": "n", "file": {"driver": "raw", "file": file}}
    taken = arguments.parse(declaration_of("blockdev-add"), sent)
    assert taken.node_name == "n"
    assert taken.file.file.cache.direct is True
    assert taken.file.file.cache.no_flush is None


def test_a_node_by_name() -> None:
    sent = {"driver": "raw", "file": "below"}
    assert arguments.parse(declaration_of("blockdev-add"), sent).file == "below"


def test_bitmaps_by_name_and_of_other_nodes() -> None:
    sent = {"node": "n", "target": "t", "bitmaps": ["a", {"node": "m", "name": "b"}]}
    named, of_node = arguments.parse(declaration_of("block-dirty-bitmap-merge"), sent).bitmaps
    assert named == "a"
    assert (of_node.node, of_node.name) == ("m", "b")


# -- every command, from its declaration ---------------------------------------------------------

#: A value that no member takes, as JSON has no other type for it.
NEVER = 1.5


EACH = [
    pytest.param(command.declaration, struct, id=f"{command.name}-{struct.tag or ''}")
    for command in COMMANDS
    for struct in structs(command.declaration)
]


def refusal(declaration: Any, sent: dict[str, Any]) -> str:
    with pytest.raises(BlockdError) as refused:
        arguments.parse(declaration, sent)
    return refused.value.message


@pytest.mark.parametrize(("declaration", "struct"), EACH)
def test_the_least_that_a_command_needs(declaration: Any, struct: inspect.StructType) -> None:
    assert isinstance(arguments.parse(declaration, least_object(struct)), struct.cls)


@pytest.mark.parametrize(("declaration", "struct"), EACH)
def test_each_missing_member(declaration: Any, struct: inspect.StructType) -> None:
    """Missing is said before unexpected."""
    complete = least_object(struct)
    for name in complete:
        sent = {key: value for key, value in complete.items() if key != name} | {"x-y": 1}
        assert refusal(declaration, sent) == f"Parameter '{name}' is missing"


@pytest.mark.parametrize(("declaration", "struct"), EACH)
def test_a_member_too_many(declaration: Any, struct: inspect.StructType) -> None:
    sent = least_object(struct) | {"x-y": 1}
    assert refusal(declaration, sent) == "Parameter 'x-y' is unexpected"


def takes_null(field: inspect.Field) -> bool:
    """Whether null is one of its values, and not only what Python has where it is left out."""
    kind = field.type
    return (
        isinstance(kind, inspect.Metadata)
        and isinstance(kind.type, inspect.UnionType)
        and any(isinstance(each, inspect.NoneType) for each in kind.type.types)
    )


@pytest.mark.parametrize(("declaration", "struct"), EACH)
@pytest.mark.parametrize("wrong", [NEVER, None])
def test_each_member_of_a_wrong_type(
    declaration: Any, struct: inspect.StructType, wrong: object
) -> None:
    for field in struct.fields:
        if wrong is None and takes_null(field):
            continue
        message = refusal(declaration, least_object(struct) | {field.encode_name: wrong})
        assert message.startswith(
            (
                f"Invalid parameter type for '{field.encode_name}', expected: ",
                f"Parameter '{field.encode_name}' expects uint64",
            )
        )


@pytest.mark.parametrize(("declaration", "struct"), EACH)
def test_declarations_are_fit_to_be_published(declaration: Any, struct: inspect.StructType) -> None:
    """Each says what it means, and takes nothing that it does not know."""
    assert issubclass(struct.cls, msgspec.Struct)
    assert struct.cls.__doc__
    assert struct.forbid_unknown_fields
    assert "_" not in "".join(field.encode_name for field in struct.fields)


def test_command_names_differ() -> None:
    names = [command.name for command in COMMANDS]
    assert len(set(names)) == len(names)
