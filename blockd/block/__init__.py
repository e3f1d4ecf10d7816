"""The device layer: nodes, their drivers, and who uses them."""

from blockd.block.accounting import Accounts, Counts
from blockd.block.allocation import Allocation
from blockd.block.descriptor import Descriptor
from blockd.block.driver import Driver
from blockd.block.drivers.file import SECTOR_BYTES, FileDriver
from blockd.block.drivers.opening import (
    NewFile,
    create_file,
    guess_format,
    is_block_device,
    open_file,
)
from blockd.block.drivers.raw import RawDriver
from blockd.block.graph import Graph
from blockd.block.holds import Follower, Hold
from blockd.block.inflight import Gate
from blockd.block.node import BeforeWrite, Node
from blockd.block.permissions import Access, Claim, Perm, Role

__all__ = [
    "SECTOR_BYTES",
    "Access",
    "Accounts",
    "Allocation",
    "BeforeWrite",
    "Claim",
    "Counts",
    "Descriptor",
    "Driver",
    "FileDriver",
    "Follower",
    "Gate",
    "Graph",
    "Hold",
    "NewFile",
    "Node",
    "Perm",
    "RawDriver",
    "Role",
    "create_file",
    "guess_format",
    "is_block_device",
    "open_file",
]
