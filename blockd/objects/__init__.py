"""What commands make for other commands to name: secrets, TLS credentials, throttle groups."""

from blockd.objects.authorization import (
    AuthzList,
    AuthzListFile,
    AuthzSimple,
    Format,
    Policy,
    Rule,
    authorize,
)
from blockd.objects.iothread import Iothread
from blockd.objects.limits import Bucket, ThrottleLimits
from blockd.objects.registry import Objects, UserObject
from blockd.objects.secret import Secret
from blockd.objects.throttle_group import ThrottleGroup
from blockd.objects.tls import Endpoint, TlsAnon, TlsPsk, TlsX509, find_tls

__all__ = [
    "AuthzList",
    "AuthzListFile",
    "AuthzSimple",
    "Bucket",
    "Endpoint",
    "Format",
    "Iothread",
    "Objects",
    "Policy",
    "Rule",
    "Secret",
    "ThrottleGroup",
    "ThrottleLimits",
    "TlsAnon",
    "TlsPsk",
    "TlsX509",
    "UserObject",
    "authorize",
    "find_tls",
]
