"""The NBD server: nodes as disks for guests."""

from blockd.nbd.export import Export
from blockd.nbd.server import NbdServer, Settings, Tls
from blockd.nbd.tls import Certificate

__all__ = ["Certificate", "Export", "NbdServer", "Settings", "Tls"]
