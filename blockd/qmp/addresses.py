"""Sockets' addresses, as clients declare them and as sockets have them."""

from __future__ import annotations

from blockd import listener
from blockd.qmp.types.address import InetData, UnixData, VsockData


def address_of(declared: InetData | UnixData | VsockData) -> listener.RemoteAddress:
    match declared:
        case InetData():
            return listener.InetAddress(
                declared.host,
                declared.port,
                declared.ipv4,
                declared.ipv6,
                to=declared.to,
                numeric=declared.numeric,
                keep_alive=declared.keep_alive,
                mptcp=declared.mptcp,
            )
        case UnixData():
            return listener.UnixAddress(
                declared.path, abstract=declared.abstract, tight=declared.tight
            )
        case VsockData():
            return listener.VsockAddress(declared.cid, declared.port)
