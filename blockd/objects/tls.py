"""TLS credentials: files in a directory, under the names that QEMU's manual gives them."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from blockd.errors import BlockdError
from blockd.objects.registry import UserObject
from blockd.objects.secret import Secret


class Endpoint(Enum):
    """The end of a connection that credentials are for."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(slots=True, eq=False)
class TlsAnon(UserObject):
    """No credentials: encrypted, and whoever listens in the middle is not found out."""

    endpoint: Endpoint


@dataclass(slots=True, eq=False)
class TlsPsk(UserObject):
    """Keys that both ends have, by user name."""

    endpoint: Endpoint
    keys: dict[str, bytes] = field(repr=False)
    #: As whom a client presents itself.
    username: str | None

    @classmethod
    def load(cls, endpoint: Endpoint, directory: str | None, username: str | None) -> Self:
        """Read ``keys.psk``: lines of USER:HEX. Raises ``BlockdError``."""
        if endpoint is Endpoint.SERVER and username is not None:
            raise BlockdError("username should not be set when endpoint=server")
        path = _credential(directory, "keys.psk")
        keys = _read_keys(path)
        if endpoint is Endpoint.SERVER:
            return cls(endpoint, keys, None)
        user = "qemu" if username is None else username
        if user not in keys:
            raise BlockdError(f"Username {user} not found in PSK file {path}")
        return cls(endpoint, keys, user)


def _read_keys(path: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace() or line.startswith("#"):
                    continue
                user, colon, key = line.rstrip("\n").partition(":")
                if not (user and colon):
                    raise BlockdError(f"Line {number} of PSK file {path} is not USER:HEX")
                keys[user] = bytes.fromhex(key)
    except OSError as error:
        raise BlockdError(f"Unable to access credentials {path}: {error.strerror}") from error
    except ValueError as error:
        raise BlockdError(f"PSK file {path} has a key that is not hexadecimal") from error
    return keys


@dataclass(slots=True, eq=False)
class TlsX509(UserObject):
    """Certificates. ``context`` has them all, and says whether the other end must have one."""

    endpoint: Endpoint
    context: ssl.SSLContext = field(repr=False)

    @classmethod
    def load(
        cls,
        endpoint: Endpoint,
        directory: str | None,
        password: Secret | None,
        *,
        verify_peer: bool,
    ) -> Self:
        """Read ``ca-cert.pem``, ``ca-crl.pem``, and the end's certificate and key.

        A list of revoked certificates need not be there, nor a client's own. Raises
        ``BlockdError``.
        """
        server = endpoint is Endpoint.SERVER
        authority = _credential(directory, "ca-cert.pem")
        where = os.path.dirname(authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        if not verify_peer:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif server:
            context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(authority)
        except OSError as error:  # ssl.SSLError is one
            raise BlockdError(f"Unable to import CA certificate list {authority}") from error
        _load_revocations(context, f"{where}/ca-crl.pem")
        if server or os.path.exists(f"{where}/client-cert.pem"):
            certificate = _credential(directory, f"{endpoint.value}-cert.pem")
            key = _credential(directory, f"{endpoint.value}-key.pem")
            _load_pair(context, certificate, key, password)
        return cls(endpoint, context)


def _load_revocations(context: ssl.SSLContext, path: str) -> None:
    if not os.path.exists(path):
        return
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise BlockdError(f"Cannot load CRL '{path}': {_reason(error)}") from error
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_pair(
    context: ssl.SSLContext, certificate: str, key: str, password: Secret | None
) -> None:
    try:
        # Without a password of any kind the library would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password.value if password is not None else "")
    except OSError as error:
        raise BlockdError(
            f"Cannot load certificate '{certificate}' & key '{key}': {_reason(error)}"
        ) from error


def _credential(directory: str | None, name: str) -> str:
    if directory is None:
        raise BlockdError("Missing 'dir' property value")
    path = f"{directory}/{name}"
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise BlockdError(f"Unable to access credentials {path}: {error.strerror}") from error


def _reason(error: OSError) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or str(error)
