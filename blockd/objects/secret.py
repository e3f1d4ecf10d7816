"""Passwords and keys."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import Self

from blockd import limits
from blockd.errors import BlockdError
from blockd.objects.files import read_file
from blockd.objects.registry import UserObject

_BASE64 = re.compile(rb"[A-Za-z0-9+/=\n]*")


@dataclass(slots=True, eq=False)
class Secret(UserObject):
    """Some bytes that nobody is shown."""

    value: bytes = field(repr=False)

    @classmethod
    def of(cls, data: str | None, path: str | None, *, is_base64: bool) -> Self:
        """From ``data`` or from the file ``path``, which is read now. Raises ``BlockdError``."""
        if data is not None and path is not None:
            raise BlockdError("'file' and 'data' are mutually exclusive")
        if path is not None:
            value = read_file(path, limits.SECRET_BYTES)
        elif data is not None:
            value = data.encode()
        else:
            raise BlockdError("Either 'file' or 'data' must be provided")
        return cls(_decode(value) if is_base64 else value)


def _decode(text: bytes) -> bytes:
    if b"\0" in text:
        raise BlockdError("Base64 data contains embedded NUL characters")
    if not _BASE64.fullmatch(text):
        raise BlockdError("Base64 data contains invalid characters")
    try:
        return base64.b64decode(text.replace(b"\n", b""), validate=True)
    except binascii.Error as error:
        # QEMU takes what it can make of it, which is another secret.
        raise BlockdError("Base64 data is cut off, or padded in its middle") from error
