"""blockd: a backup daemon for block devices."""

__version__ = "0.1.0"
