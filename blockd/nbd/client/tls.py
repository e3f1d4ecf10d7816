"""TLS as a client has it: to which server, and what went wrong in the user's words."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final

from blockd.errors import BlockdError
from blockd.nbd.client.stream import Stream

#: OpenSSL's numbers (X509_V_ERR_...), and what QEMU says.
_VERIFY_ERRORS: Final = {
    9: "The certificate is not yet activated",
    10: "The certificate has expired",
    18: "The certificate hasn't got a known issuer",
    19: "The certificate hasn't got a known issuer",
    20: "The certificate hasn't got a known issuer",
    23: "The certificate has been revoked",
}
_HOSTNAME_MISMATCH: Final = frozenset({62, 64})


@dataclass(frozen=True, slots=True)
class Tls:
    """``hostname``: what the server's certificate must be for, where one is looked at."""

    context: ssl.SSLContext = field(repr=False)
    hostname: str | None

    async def start(self, stream: Stream) -> None:
        """Raises ``BlockdError`` where the server is not who it should be, else ``OSError``."""
        if self.context.check_hostname and self.hostname is None:
            raise BlockdError("No hostname for certificate validation")
        try:
            await stream.start_tls(self.context, self.hostname)
        except ssl.SSLCertVerificationError as error:
            raise BlockdError(self._refusal(error)) from error
        except ssl.SSLError as error:
            raise BlockdError(f"TLS handshake failed: {tls_reason(error)}") from error
        except ValueError as error:
            raise BlockdError(f"TLS handshake failed: {error}") from error

    def _refusal(self, error: ssl.SSLCertVerificationError) -> str:
        if error.verify_code in _HOSTNAME_MISMATCH:
            return f"Certificate does not match the hostname {self.hostname}"
        told = _VERIFY_ERRORS.get(error.verify_code)
        return told or f"Certificate is not good: {error.verify_message}"


def tls_reason(error: OSError) -> str:
    """What happened, without OpenSSL's numbers and lines."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(error)
