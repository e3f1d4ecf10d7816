"""TLS credentials: files in a directory, under the names that QEMU's manual gives them."""

from __future__ import annotations

import os
import ssl
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Self

from blockd.errors import BlockdError
from blockd.objects.registry import Objects, UserObject
from blockd.objects.secret import Secret


class Endpoint(Enum):
    """The end of a connection that credentials are for."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(slots=True, eq=False)
class TlsCredentials(UserObject):
    """What one end of a TLS connection has to show, and asks the other for."""

    endpoint: Endpoint
    #: Connections are made with it; None where this Python is too old for the credentials.
    context: ssl.SSLContext | None = field(repr=False)


@dataclass(slots=True, eq=False)
class TlsAnon(TlsCredentials):
    """No credentials: encrypted, and whoever listens in the middle is not found out.

    TLS has had none of these since version 1.3.
    """

    @classmethod
    def make(cls, endpoint: Endpoint) -> Self:
        """As QEMU: Diffie and Hellman's exchange, anonymous."""
        context = _anonymous_context(endpoint)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        # Level 0 has what has no certificates.
        context.set_ciphers("ADH+AESGCM:@SECLEVEL=0")
        if endpoint is Endpoint.SERVER:
            _load_dh_group(context)
        return cls(endpoint, context)


@dataclass(slots=True, eq=False)
class TlsPsk(TlsCredentials):
    """Keys that both ends have, by user name."""

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
            return cls(endpoint, _psk_server_context(keys), keys, None)
        user = "qemu" if username is None else username
        if user not in keys:
            raise BlockdError(f"Username {user} not found in PSK file {path}")
        return cls(endpoint, _psk_client_context(user, keys[user]), keys, user)


#: With an exchange of keys, so that who gets the key later can't read what he recorded.
_PSK_CIPHERS: Final = "kECDHEPSK:kDHEPSK"


def _psk_server_context(keys: dict[str, bytes]) -> ssl.SSLContext | None:
    if sys.version_info < (3, 13) or not ssl.HAS_PSK:
        return None
    context = _anonymous_context(Endpoint.SERVER)
    context.set_ciphers(_PSK_CIPHERS)
    # Whoever is unknown has no key, and OpenSSL refuses him.
    context.set_psk_server_callback(lambda user: keys.get(user or "", b""))
    return context


def _psk_client_context(user: str, key: bytes) -> ssl.SSLContext | None:
    if sys.version_info < (3, 13) or not ssl.HAS_PSK:
        return None
    context = _anonymous_context(Endpoint.CLIENT)
    # A server may do without the key, and show a certificate in its place: none is good.
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_ciphers(_PSK_CIPHERS)
    context.set_psk_client_callback(lambda _: (user, key))
    return context


def find_tls(objects: Objects, object_id: str, endpoint: Endpoint) -> ssl.SSLContext:
    """What connections are made with. Raises ``BlockdError`` where the id names no such thing."""
    found = objects.find(object_id, TlsCredentials)
    if found is None and object_id in objects:
        raise BlockdError(f"Object with id '{object_id}' is not TLS credentials")
    if found is None:
        raise BlockdError(f"No TLS credentials with id '{object_id}'")
    if found.endpoint is not endpoint:
        raise BlockdError(f"Expected TLS credentials for a {endpoint.value} endpoint")
    if found.context is None:
        raise BlockdError(
            f"TLS credentials '{object_id}' are keys, for which blockd needs Python 3.13 or newer"
        )
    return found.context


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
class TlsX509(TlsCredentials):
    """Certificates. ``context`` has them all, and says whether the other end must have one."""

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
        context = _context(endpoint)
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
            _refuse_authority(certificate, endpoint)
            _load_pair(context, certificate, key, password)
        return cls(endpoint, context)


def _context(endpoint: Endpoint) -> ssl.SSLContext:
    server = endpoint is Endpoint.SERVER
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Every connection is looked at anew, also after an authority has revoked something.
    context.options |= ssl.OP_NO_TICKET
    if server:
        context.num_tickets = 0
    return context


def _anonymous_context(endpoint: Endpoint) -> ssl.SSLContext:
    """No certificate is asked for."""
    context = _context(endpoint)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _load_dh_group(context: ssl.SSLContext) -> None:
    """ffdhe2048 of RFC 7919. Python takes groups from files alone, so this is one in memory."""
    fd = os.memfd_create("dh-params.pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, _FFDHE2048)
        context.load_dh_params(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


_FFDHE2048: Final = b"""-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


def _load_revocations(context: ssl.SSLContext, path: str) -> None:
    if not os.path.exists(path):
        return
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise BlockdError(f"Cannot load CRL '{path}': {_reason(error)}") from error
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _refuse_authority(certificate: str, endpoint: Endpoint) -> None:
    """A machine whose own certificate makes others could let anybody in, in any name."""
    looked_at = _context(endpoint)
    with suppress(OSError):  # what is no certificate is refused when it is loaded
        looked_at.load_verify_locations(certificate)
    # In a file of several, the authorities that made the first may follow.
    if looked_at.cert_store_stats()["x509_ca"] == looked_at.cert_store_stats()["x509"] > 0:
        raise BlockdError(
            f"The certificate {certificate} basic constraints show a CA,"
            f" but we need one for a {endpoint.value}"
        )


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
