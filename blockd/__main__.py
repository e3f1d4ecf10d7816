"""The command line: ``blockd --qmp unix:PATH``. Its options are a contract with other tools."""

from __future__ import annotations

import argparse
import grp
import logging
import pwd
import sys
from collections.abc import Sequence

import trio

from blockd import __version__, daemon
from blockd.errors import BlockdError
from blockd.qmp import AccessList, Holders

_log = logging.getLogger(__name__)


def _unix_path(address: str) -> str:
    kind, _, path = address.partition(":")
    if kind != "unix" or not path:
        raise argparse.ArgumentTypeError(f"'{address}' is not of the form unix:PATH")
    return path


def _uid(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no user '{user}'") from None


def _gid(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group '{group}'") from None


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
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="keep persistent bitmaps in this directory, which is created where it is missing; "
        "one daemon uses it at a time",
    )
    _add_access_options(parser)
    parser.add_argument("--version", action="version", version=f"blockd {__version__}")
    return parser


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "access to the QMP socket",
        "Without these options the socket's mode says who may use it. With any of them the mode "
        "is 0666, and only these may, by the credentials of the process that connects: root and "
        "blockd's own user always, and whoever is named here, by number or name. Each option may "
        "be given again.",
    )
    for name, what in (("", "may do everything"), ("read-", "may query and hear events, no more")):
        for kind, parse in (("uid", _uid), ("gid", _gid)):
            group.add_argument(
                f"--qmp-allow-{name}{kind}",
                metavar=kind.upper(),
                type=parse,
                action="append",
                default=[],
                help=f"this {'user' if kind == 'uid' else 'group'} {what}",
            )


def _access_list(options: argparse.Namespace) -> AccessList | None:
    full = Holders(frozenset(options.qmp_allow_uid), frozenset(options.qmp_allow_gid))
    read_only = Holders(
        frozenset(options.qmp_allow_read_uid), frozenset(options.qmp_allow_read_gid)
    )
    nobody = Holders()
    return None if full == read_only == nobody else AccessList.of(full, read_only)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until ``quit``, SIGTERM or SIGINT; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="blockd: %(levelname)s: %(message)s"
    )
    status = 0
    try:
        trio.run(daemon.run, options.qmp, _access_list(options), options.state_dir)
    except* BlockdError as refusals:
        _log.error("%s", refusals.exceptions[0])
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
