"""Bitmaps that outlive the daemon: what a state directory keeps, and how it gives that back.

What reaches the disk of a node with persistent bitmaps is noted here first (``Journal``), so that
after a kill or a power cut the bitmaps come back with every bit that they need.
"""

from blockd.state.directory import StateDirectory
from blockd.state.events import StateEvents, tell_of_unfinished

__all__ = ["StateDirectory", "StateEvents", "tell_of_unfinished"]
