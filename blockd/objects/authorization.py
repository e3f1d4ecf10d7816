"""Who may come in: lists of the names in certificates."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Self

import msgspec
import trio

from blockd import limits
from blockd.errors import BlockdError
from blockd.objects.files import read_file
from blockd.objects.registry import Objects, UserObject

_log = logging.getLogger(__name__)


class Policy(Enum):
    """What becomes of an identity."""

    ALLOW = "allow"
    DENY = "deny"


class Format(Enum):
    """What a rule's text is: the identity itself, or a pattern with ``*`` and ``?``."""

    EXACT = "exact"
    GLOB = "glob"


class Rule:
    """What becomes of the identities that match."""

    def __init__(self, match: str, policy: Policy, form: Format = Format.EXACT) -> None:
        pattern = re.escape(match)
        if form is Format.GLOB:
            pattern = pattern.replace(r"\*", ".*").replace(r"\?", ".")
        self.policy = policy
        self._pattern = re.compile(pattern, re.DOTALL)

    def matches(self, identity: str) -> bool:
        return self._pattern.fullmatch(identity) is not None


@dataclass(slots=True, eq=False)
class Authorization(UserObject):
    """Says which identities are allowed: here, none."""

    def allows(self, _identity: str) -> bool:
        """It may read a file."""
        return False


@dataclass(slots=True, eq=False)
class AuthzSimple(Authorization):
    """One identity alone."""

    identity: str

    def allows(self, identity: str) -> bool:
        return identity == self.identity


@dataclass(slots=True, eq=False)
class AuthzList(Authorization):
    """The first rule that matches decides; ``policy``, where none does."""

    rules: list[Rule]
    policy: Policy

    def allows(self, identity: str) -> bool:
        matching = (rule.policy for rule in self.rules if rule.matches(identity))
        return next(matching, self.policy) is Policy.ALLOW


@dataclass(slots=True, eq=False)
class AuthzListFile(Authorization):
    """A list in a file: JSON with the members of ``authz-list``.

    With ``refresh`` it is read anew for each client; while it can't be read, nobody is allowed.
    """

    path: str
    refresh: bool
    read: AuthzList

    @classmethod
    def load(cls, path: str, *, refresh: bool) -> Self:
        """Raises ``BlockdError`` where the file is no list now."""
        return cls(path, refresh, _read(path))

    def allows(self, identity: str) -> bool:
        if not self.refresh:
            return self.read.allows(identity)
        try:
            return _read(self.path).allows(identity)
        except BlockdError as error:
            _log.error("%s: nobody is let in", error.message)
            return False


class _FileRule(msgspec.Struct, forbid_unknown_fields=True):
    match: str
    policy: Policy
    format: Format = Format.EXACT


class _File(msgspec.Struct, forbid_unknown_fields=True):
    rules: list[_FileRule] = []
    policy: Policy = Policy.DENY


def _read(path: str) -> AuthzList:
    try:
        found = msgspec.json.decode(read_file(path, limits.AUTHZ_FILE_BYTES), type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BlockdError(f"'{path}' is no list of rules: {error}") from error
    rules = [Rule(each.match, each.policy, each.format) for each in found.rules]
    return AuthzList(rules, found.policy)


async def authorize(objects: Objects, object_id: str, subject: Iterable[Any]) -> None:
    """Raise ``BlockdError`` unless who has this certificate is allowed.

    ``object_id`` is looked up now, so that lists can be replaced; while it names none, nobody is
    allowed. ``subject``: as in what ``ssl.SSLSocket.getpeercert`` returns.
    """
    name = distinguished_name(subject)
    # It goes into a log, of which it must not make two lines.
    check = f"TLS x509 authz check for {_CONTROL.sub('?', name or str(subject))}"
    asked = objects.find(object_id, Authorization)
    if asked is None:
        raise BlockdError(f"{check}: no authz object '{object_id}'")
    if name is None or not await trio.to_thread.run_sync(asked.allows, name):
        raise BlockdError(f"{check} is denied")


#: The attributes' names in OpenSSL's long form, and those that GnuTLS, and so QEMU, writes.
_ATTRIBUTES: Final = {
    "businessCategory": "businessCategory",
    "commonName": "CN",
    "countryName": "C",
    "dnQualifier": "dnQualifier",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "generationQualifier": "generationQualifier",
    "givenName": "givenName",
    "initials": "initials",
    "localityName": "L",
    "name": "name",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "postalCode": "postalCode",
    "pseudonym": "pseudonym",
    "serialNumber": "serialNumber",
    "stateOrProvinceName": "ST",
    "streetAddress": "street",
    "surname": "surName",
    "title": "title",
    "userId": "UID",
}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SPECIAL: Final = re.compile(r'[,+"\\<>;]|^[ #]| $')


def distinguished_name(subject: Iterable[Any]) -> str | None:
    """A certificate's subject as QEMU writes it; None where it can't be written for sure.

    Source: RFC 4514, section 2; but the parts are in the certificate's own order, as in GnuTLS.
    """
    parts = []
    for part in subject:
        if any(name not in _ATTRIBUTES or "\0" in value for name, value in part):
            return None
        parts.append("+".join(f"{_ATTRIBUTES[name]}={_escape(value)}" for name, value in part))
    return ",".join(parts) or None


def _escape(value: str) -> str:
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", value)
