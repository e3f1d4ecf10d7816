"""Certificates made by OpenSSL, in directories as ``tls-creds-x509`` wants them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.tools import require_tool

_CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(
        [require_tool("openssl"), *arguments],
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )


class Authority:
    """An authority in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        made = ["-x509", "-nodes", "-subj", "/CN=CA", "-keyout", "ca-key.pem"]
        openssl(directory, "req", *_CURVE, *made, "-out", "ca-cert.pem")

    @property
    def certificate(self) -> Path:
        return self._directory / "ca-cert.pem"

    def trusted_in(self, directory: Path) -> Path:
        """``directory`` with the authority's certificate, made if need be."""
        directory.mkdir(exist_ok=True)
        shutil.copy(self.certificate, directory)
        return directory

    def issue(
        self,
        directory: Path,
        end: str,
        *,
        subject: str = "/O=Test/CN=localhost",
        days: int = 30,
        password: str | None = None,
    ) -> Path:
        """``directory`` with the authority's certificate and one of ``end``, client or server.

        It is for the names that ``subject`` has not: ``localhost`` and ``127.0.0.1``.
        """
        self.trusted_in(directory)
        (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        sealed = ["-nodes"] if password is None else ["-passout", f"pass:{password}"]
        request = ["-utf8", "-multivalue-rdn", "-subj", subject, "-keyout", f"{end}-key.pem"]
        openssl(directory, "req", *_CURVE, *sealed, *request, "-out", "request.pem")
        authority = ["-CA", str(self.certificate), "-CAkey", str(self._directory / "ca-key.pem")]
        signed = ["-in", "request.pem", "-extfile", "names", "-days", str(days)]
        openssl(
            directory, "x509", "-req", *authority, "-CAcreateserial", *signed,
            "-out", f"{end}-cert.pem",
        )  # fmt: skip
        return directory
