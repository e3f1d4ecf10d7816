"""The command line: ``blockd --qmp unix:PATH``. Its options are a contract with other tools."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import trio

from blockd import __version__, daemon
from blockd.errors import BlockdError


def _unix_path(address: str) -> str:
    kind, _, path = address.partition(":")
    if kind != "unix" or not path:
        raise argparse.ArgumentTypeError(f"'{address}' is not of the form unix:PATH")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blockd",
        description="Backup daemon for block devices. It runs in the foreground, is controlled "
        "by QMP commands on a Unix socket, and logs to standard error.",
    )
    parser.add_argument(
        "--qmp",
        metavar="unix:PATH",
        type=_unix_path,
        required=True,
        help="take QMP clients on this socket, which is created with mode 0600",
    )
    parser.add_argument("--version", action="version", version=f"blockd {__version__}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until ``quit``, SIGTERM or SIGINT; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="blockd: %(levelname)s: %(message)s"
    )
    status = 0
    try:
        trio.run(daemon.run, options.qmp)
    except* BlockdError as refusals:
        logging.getLogger(__name__).error("%s", refusals.exceptions[0])
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
