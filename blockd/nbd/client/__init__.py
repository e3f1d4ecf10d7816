"""The client's side of NBD: the ``nbd`` driver."""

from blockd.nbd.client.connecting import Target
from blockd.nbd.client.driver import NbdDriver

__all__ = ["NbdDriver", "Target"]
