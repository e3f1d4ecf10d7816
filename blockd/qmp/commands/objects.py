"""Objects that other commands name."""

from __future__ import annotations

import trio
from msgspec import structs

from blockd.errors import BlockdError
from blockd.objects import (
    AuthzList,
    AuthzListFile,
    AuthzSimple,
    Bucket,
    Endpoint,
    Format,
    Iothread,
    Policy,
    Rule,
    Secret,
    ThrottleGroup,
    ThrottleLimits,
    TlsAnon,
    TlsPsk,
    TlsX509,
    UserObject,
)
from blockd.qmp.services import Services
from blockd.qmp.types.objects import (
    AuthzListFileOptions,
    AuthzListOptions,
    AuthzSimpleOptions,
    IothreadOptions,
    ObjectAddOptions,
    ObjectDel,
    SecretOptions,
    ThrottleGroupOptions,
    TlsCredsAnonOptions,
    TlsCredsPskOptions,
    TlsCredsX509Options,
)

_INT64_MAX = (1 << 63) - 1
_UINT32_MAX = (1 << 32) - 1
#: QEMU's default of an iothread.
_THREAD_POOL_MAX = 64


async def object_add(services: Services, arguments: ObjectAddOptions) -> None:
    services.objects.check_id(arguments.id)
    services.objects.add(arguments.id, await _make(services, arguments))


def object_del(services: Services, arguments: ObjectDel) -> None:
    services.objects.remove(arguments.id)


async def _make(services: Services, options: ObjectAddOptions) -> UserObject:
    match options:
        case SecretOptions(data=data, file=file):
            return await trio.to_thread.run_sync(
                lambda: Secret.of(data, file, is_base64=options.format == "base64")
            )
        case TlsCredsAnonOptions():
            return TlsAnon.make(Endpoint(options.endpoint))
        case TlsCredsPskOptions(endpoint=end, dir=directory, username=user):
            return await trio.to_thread.run_sync(TlsPsk.load, Endpoint(end), directory, user)
        case TlsCredsX509Options():
            return await _make_x509(services, options)
        case ThrottleGroupOptions():
            return ThrottleGroup(_limits(options))
        case AuthzSimpleOptions(identity=identity):
            return AuthzSimple(identity)
        case AuthzListOptions():
            return _list(options)
        case AuthzListFileOptions(filename=path, refresh=refresh):
            return await trio.to_thread.run_sync(lambda: AuthzListFile.load(path, refresh=refresh))
        case IothreadOptions():
            _check_iothread(options)
            return Iothread()


def _list(options: AuthzListOptions) -> AuthzList:
    rules = options.rules or []
    return AuthzList(
        [Rule(each.match, Policy(each.policy), Format(each.format)) for each in rules],
        Policy(options.policy),
    )


async def _make_x509(services: Services, options: TlsCredsX509Options) -> TlsX509:
    password = None
    if options.passwordid is not None:
        password = services.objects.find(options.passwordid, Secret)
        if password is None and options.passwordid in services.objects:
            raise BlockdError(f"Object with id '{options.passwordid}' is not a secret")
        if password is None:
            raise BlockdError(f"No secret with id '{options.passwordid}'")
    return await trio.to_thread.run_sync(
        lambda: TlsX509.load(
            Endpoint(options.endpoint), options.dir, password, verify_peer=options.verify_peer
        )
    )


def _limits(options: ThrottleGroupOptions) -> ThrottleLimits:
    """Of ``limits`` and the older members, which count where both are given."""

    def sent(name: str) -> int | None:
        older: int | None = getattr(options, f"x_{name}")
        if older is not None and older < 0:
            raise BlockdError("Property values cannot be negative")
        newer: int | None = getattr(options.limits, name, None)
        return newer if older is None else older

    def bucket(name: str) -> Bucket:
        seconds = sent(f"{name}_max_length")
        if seconds is not None and not 0 <= seconds <= _UINT32_MAX:
            raise BlockdError(
                f"{name.replace('_', '-')}-max-length value must be in the range [0, {_UINT32_MAX}]"
            )
        return Bucket(sent(name) or 0, sent(f"{name}_max") or 0, 1 if seconds is None else seconds)

    limits = ThrottleLimits(
        bps_total=bucket("bps_total"),
        bps_read=bucket("bps_read"),
        bps_write=bucket("bps_write"),
        iops_total=bucket("iops_total"),
        iops_read=bucket("iops_read"),
        iops_write=bucket("iops_write"),
        iops_size=sent("iops_size") or 0,
    )
    limits.check()
    return limits


def _check_iothread(options: IothreadOptions) -> None:
    for field in structs.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int) and value < 0:
            raise BlockdError(f"{field.encode_name} value must be in range [0, {_INT64_MAX}]")
    most = _THREAD_POOL_MAX if options.thread_pool_max is None else options.thread_pool_max
    if most == 0 or most < (options.thread_pool_min or 0):
        raise BlockdError("bad thread-pool-min/thread-pool-max values")
