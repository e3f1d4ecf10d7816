"""The device layer: nodes, their drivers, and who uses them."""

from blockd.block.accounting import Accounts, Counts
from blockd.block.allocation import Allocation
from blockd.block.archive import Archive, Coming, NoArchive
from blockd.block.descriptor import Descriptor, WriteBy
from blockd.block.driver import Driver
from blockd.block.drivers.blkdebug import BlkdebugDriver, InjectError, SetState
from blockd.block.drivers.copy_on_read import CopyOnReadDriver
from blockd.block.drivers.file import SECTOR_BYTES, FileDriver
from blockd.block.drivers.filter import Filter
from blockd.block.drivers.null import NullDriver
from blockd.block.drivers.opening import (
    NewFile,
    create_file,
    guess_format,
    is_block_device,
    open_file,
    rehearse_file,
    reopen_file,
)
from blockd.block.drivers.raw import RawDriver
from blockd.block.drivers.throttle import ThrottleDriver
from blockd.block.graph import Graph
from blockd.block.holds import Hold
from blockd.block.inflight import Gate, Reservations
from blockd.block.journal import Journal
from blockd.block.node import Node
from blockd.block.permissions import Access, Claim, Perm, Role, of_image_file
from blockd.block.recovered import tell_recovered
from blockd.block.reopening import Reopening
from blockd.block.views import BeforeWrite, ReadView

__all__ = [
    "SECTOR_BYTES",
    "Access",
    "Accounts",
    "Allocation",
    "Archive",
    "BeforeWrite",
    "BlkdebugDriver",
    "Claim",
    "Coming",
    "CopyOnReadDriver",
    "Counts",
    "Descriptor",
    "Driver",
    "FileDriver",
    "Filter",
    "Gate",
    "Graph",
    "Hold",
    "InjectError",
    "Journal",
    "NewFile",
    "NoArchive",
    "Node",
    "NullDriver",
    "Perm",
    "RawDriver",
    "ReadView",
    "Reopening",
    "Reservations",
    "Role",
    "SetState",
    "ThrottleDriver",
    "WriteBy",
    "create_file",
    "guess_format",
    "is_block_device",
    "of_image_file",
    "open_file",
    "rehearse_file",
    "reopen_file",
    "tell_recovered",
]
