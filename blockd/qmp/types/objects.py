"""Objects that other commands name: secrets, TLS credentials, authorisation, throttle groups."""

from __future__ import annotations

from typing import ClassVar, Literal

from blockd.qmp.types.base import Command, Int64, Object, SecretText


class ObjectOptions(Object, kw_only=True):
    """Make an object: the arguments of ``object-add``.

    ``id``: what other commands call it; a letter, then letters, digits, ``-``, ``.``, ``_``.
    """

    id: str


class SecretOptions(ObjectOptions, tag_field="qom-type", tag="secret", kw_only=True):
    """A password or a key: ``data`` itself, or the content of ``file``, which is read once."""

    format: Literal["raw", "base64"] = "raw"
    data: SecretText | None = None
    file: str | None = None


class TlsCredsOptions(ObjectOptions, kw_only=True):
    """TLS credentials. ``endpoint``: the end of connections that they are for.

    ``dir``: where their files are, which are read once. ``verify-peer``: whether the other end
    must show a certificate that is good.
    """

    verify_peer: bool = True
    dir: str | None = None
    endpoint: Literal["client", "server"] = "client"


class TlsCredsAnonOptions(
    TlsCredsOptions, tag_field="qom-type", tag="tls-creds-anon", kw_only=True
):
    """No credentials: the other end may be anybody."""


class TlsCredsPskOptions(TlsCredsOptions, tag_field="qom-type", tag="tls-creds-psk", kw_only=True):
    """Keys that both ends have, in ``keys.psk``. ``username``: a client's, by default ``qemu``.

    What uses them needs Python 3.13.
    """

    username: str | None = None


class TlsCredsX509Options(
    TlsCredsOptions, tag_field="qom-type", tag="tls-creds-x509", kw_only=True
):
    """Certificates, in ``ca-cert.pem``, ``server-cert.pem``, ``server-key.pem`` and so on.

    ``passwordid``: the secret that opens the key.
    """

    passwordid: str | None = None


class AuthzRule(Object, kw_only=True):
    """What becomes of those who match.

    ``format``: whether ``match`` is the name itself, or a pattern with ``*`` and ``?``.
    """

    match: str
    policy: Literal["deny", "allow"]
    format: Literal["exact", "glob"] = "exact"


class AuthzSimpleOptions(ObjectOptions, tag_field="qom-type", tag="authz-simple", kw_only=True):
    """Allows one alone. ``identity``: its name, of a certificate the distinguished name."""

    identity: str


class AuthzListOptions(ObjectOptions, tag_field="qom-type", tag="authz-list", kw_only=True):
    """The first of the rules that matches decides; ``policy``, where none does."""

    policy: Literal["deny", "allow"] = "deny"
    rules: list[AuthzRule] | None = None


class AuthzListFileOptions(ObjectOptions, tag_field="qom-type", tag="authz-listfile", kw_only=True):
    """An ``authz-list`` in a file, as JSON.

    ``refresh``: whether it is read anew for each client, and nobody is let in while it can't be.
    """

    filename: str
    refresh: bool = True


class ThrottleLimits(Object, kw_only=True):
    """Bytes (``bps``) and requests (``iops``) in a second; 0 for no limit.

    ``…-max``: the same during a burst, of ``…-max-length`` seconds at the most. ``iops-size``: a
    request counts once for so many bytes.
    """

    iops_total: Int64 | None = None
    iops_total_max: Int64 | None = None
    iops_total_max_length: Int64 | None = None
    iops_read: Int64 | None = None
    iops_read_max: Int64 | None = None
    iops_read_max_length: Int64 | None = None
    iops_write: Int64 | None = None
    iops_write_max: Int64 | None = None
    iops_write_max_length: Int64 | None = None
    bps_total: Int64 | None = None
    bps_total_max: Int64 | None = None
    bps_total_max_length: Int64 | None = None
    bps_read: Int64 | None = None
    bps_read_max: Int64 | None = None
    bps_read_max_length: Int64 | None = None
    bps_write: Int64 | None = None
    bps_write_max: Int64 | None = None
    bps_write_max_length: Int64 | None = None
    iops_size: Int64 | None = None


class ThrottleGroupOptions(ObjectOptions, tag_field="qom-type", tag="throttle-group", kw_only=True):
    """Limits that several nodes share. The members ``x-…`` are an older form of ``limits``."""

    limits: ThrottleLimits | None = None
    x_iops_total: Int64 | None = None
    x_iops_total_max: Int64 | None = None
    x_iops_total_max_length: Int64 | None = None
    x_iops_read: Int64 | None = None
    x_iops_read_max: Int64 | None = None
    x_iops_read_max_length: Int64 | None = None
    x_iops_write: Int64 | None = None
    x_iops_write_max: Int64 | None = None
    x_iops_write_max_length: Int64 | None = None
    x_bps_total: Int64 | None = None
    x_bps_total_max: Int64 | None = None
    x_bps_total_max_length: Int64 | None = None
    x_bps_read: Int64 | None = None
    x_bps_read_max: Int64 | None = None
    x_bps_read_max_length: Int64 | None = None
    x_bps_write: Int64 | None = None
    x_bps_write_max: Int64 | None = None
    x_bps_write_max_length: Int64 | None = None
    x_iops_size: Int64 | None = None


class IothreadOptions(ObjectOptions, tag_field="qom-type", tag="iothread", kw_only=True):
    """One of QEMU's threads. Taken for what speaks to QEMU, too, and without any effect."""

    aio_max_batch: Int64 | None = None
    thread_pool_min: Int64 | None = None
    thread_pool_max: Int64 | None = None
    poll_max_ns: Int64 | None = None
    poll_grow: Int64 | None = None
    poll_shrink: Int64 | None = None


#: The arguments of ``object-add``.
ObjectAddOptions = (
    AuthzListFileOptions
    | AuthzListOptions
    | AuthzSimpleOptions
    | IothreadOptions
    | SecretOptions
    | ThrottleGroupOptions
    | TlsCredsAnonOptions
    | TlsCredsPskOptions
    | TlsCredsX509Options
)


class ObjectDel(Command, kw_only=True):
    """Delete an object that no node needs."""

    command: ClassVar[str] = "object-del"

    id: str
