"""The NBD server: nodes as disks for guests."""

from blockd.nbd.export import Export
from blockd.nbd.listener import InetAddress, UnixAddress
from blockd.nbd.server import NbdServer, Settings

__all__ = ["Export", "InetAddress", "NbdServer", "Settings", "UnixAddress"]
