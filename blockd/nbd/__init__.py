"""The NBD server: nodes as disks for guests."""

from blockd.nbd.export import Export
from blockd.nbd.server import NbdServer, Settings

__all__ = ["Export", "NbdServer", "Settings"]
