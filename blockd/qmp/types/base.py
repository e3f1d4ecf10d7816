"""What the declarations are made of."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta


class Object(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """A JSON object. A member whose default is None may be left out, but is never ``null``."""

    #: Members of a tagged object that QEMU looks at before its tag.
    before_tag: ClassVar[tuple[str, ...]] = ()


class Nothing(Object, kw_only=True):
    """An object without members."""


class Command(Object, kw_only=True):
    """The arguments of the command ``command``; the docstring says what it does.

    ``returns`` declares what it answers. ``read_only``: it changes nothing, so that clients may
    give it who may only look.
    """

    command: ClassVar[str]
    returns: ClassVar[Any] = Nothing
    read_only: ClassVar[bool] = False


class Query(Command, kw_only=True):
    """A command that only tells."""

    read_only: ClassVar[bool] = True


#: Integers as wide as QEMU's; ``c_type`` says how wide, and how it names an unsigned one.
Int64 = Annotated[int, Meta(extra={"c_type": "int64"})]
UInt16 = Annotated[int, Meta(extra={"c_type": "uint16_t"})]
UInt32 = Annotated[int, Meta(extra={"c_type": "uint32_t"})]
UInt64 = Annotated[int, Meta(extra={"c_type": "uint64"})]
#: A number of bytes. QEMU calls it unsigned, but takes negative ones and refuses them later.
Size = Annotated[int, Meta(extra={"c_type": "size"})]

#: Text that no log may show.
SecretText = Annotated[str, Meta(extra={"secret": True})]
