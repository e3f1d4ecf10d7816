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
from blockd.block.graph import Graph, Hold
from blockd.block.node import BeforeWrite, Node
from blockd.block.permissions import Claim, Role, Users

__all__ = [
    "SECTOR_BYTES",
    "Accounts",
    "Allocation",
    "BeforeWrite",
    "Claim",
    "Counts",
    "Descriptor",
    "Driver",
    "FileDriver",
    "Graph",
    "Hold",
    "NewFile",
    "Node",
    "RawDriver",
    "Role",
    "Users",
    "create_file",
    "guess_format",
    "is_block_device",
    "open_file",
]
