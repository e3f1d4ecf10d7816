"""The database of a state directory: what must be atomic.

All of it blocks, and belongs into one worker thread at a time. Damage that SQLite finds is an
``OSError`` with EUCLEAN; what it can't find is found by the sums of records and pieces, by the
image's list of its bitmaps and its count of armed rows, and by each bitmap's list of its pieces.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blockd import limits
from blockd.errors import BlockdError

#: The tables, and what is in them.
SCHEMA_VERSION = 2
_APPLICATION_ID = 0x626C6B64  # "blkd"
_SCHEMA = """
CREATE TABLE image (id INTEGER PRIMARY KEY, body BLOB NOT NULL, armed_rows INTEGER NOT NULL);
CREATE TABLE bitmap (id INTEGER PRIMARY KEY, image INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX bitmap_of_image ON bitmap (image);
CREATE TABLE piece (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE armed (
    image INTEGER NOT NULL, id INTEGER NOT NULL, epoch INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (image, id)
) WITHOUT ROWID;
CREATE TABLE job (id TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
"""

_ERRNOS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_CORRUPT: errno.EUCLEAN,
    sqlite3.SQLITE_NOTADB: errno.EUCLEAN,
    sqlite3.SQLITE_READONLY: errno.EROFS,
}


class Change(Protocol):
    """Something to be done in a transaction."""

    def apply(self, connection: sqlite3.Connection) -> None: ...


@dataclass(frozen=True, slots=True)
class ImageRow:
    row: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Details:
    """All that is kept of an image beside its own record; bodies and pieces as they are stored."""

    bitmaps: Sequence[tuple[int, bytes]]
    armed: Sequence[tuple[int, bytes]]
    armed_rows: int


class Database:
    """One connection. All calls raise ``OSError``."""

    def __init__(self, path: str) -> None:
        """Open it, or make it. ``BlockdError`` where another version of blockd made it."""
        self._suspect_path = f"{path}.suspect"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with _as_os_errors():
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            with self._watched():
                self._prepare(path)
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self, path: str) -> None:
        execute = self._connection.execute
        # The lock of the directory keeps others out. So nothing is shared, and no file is mapped:
        # an I/O error in a mapping would be the daemon's end.
        execute("PRAGMA locking_mode = EXCLUSIVE")
        (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            # Of no use later; and where the disk is full it would keep the daemon from starting.
            execute("PRAGMA auto_vacuum = INCREMENTAL")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA cell_size_check = ON")
        # Some distributions build it to overwrite what is deleted, which is as much to write as
        # storing it was.
        execute("PRAGMA secure_delete = OFF")
        execute(f"PRAGMA journal_size_limit = {limits.STATE_LOG_BYTES}")
        (version,) = execute("PRAGMA user_version").fetchone()
        (application,) = execute("PRAGMA application_id").fetchone()
        if (tables > 0) != (application == _APPLICATION_ID and version > 0):
            raise OSError(errno.EUCLEAN, f"'{path}' is not a database of blockd")
        if tables and version != SCHEMA_VERSION:
            raise BlockdError(
                f"'{path}' was made by another version of blockd (its schema is {version}, this "
                f"one knows {SCHEMA_VERSION}): use that one, or another state directory"
            )
        if not tables:
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION};"
                f"PRAGMA application_id = {_APPLICATION_ID}; COMMIT"
            )

    def close(self) -> None:
        """What was committed is there; that the log can't be put away does no harm."""
        with suppress(sqlite3.Error):
            self._connection.close()

    # -- reading -----------------------------------------------------------------------------

    def images(self) -> Sequence[ImageRow]:
        return [ImageRow(*row) for row in self._rows("SELECT id, body FROM image")]

    def jobs(self) -> Sequence[tuple[str, bytes]]:
        return self._rows("SELECT id, body FROM job ORDER BY id")

    def last_row(self) -> int:
        """A number that no row exceeds."""
        numbers = [
            self._rows(f"SELECT max(id) FROM {table}")[0][0]  # noqa: S608 - names of our own
            for table in ("image", "bitmap", "piece", "armed")
        ]
        return max(number or 0 for number in numbers)

    def details(self, image: int) -> Details:
        of_image = (image,)
        rows = self._rows("SELECT armed_rows FROM image WHERE id = ?", of_image)
        return Details(
            self._rows("SELECT id, body FROM bitmap WHERE image = ?", of_image),
            self._rows("SELECT epoch, body FROM armed WHERE image = ? ORDER BY id", of_image),
            rows[0][0] if rows else -1,
        )

    def bitmaps(self) -> Sequence[bytes]:
        return [body for (body,) in self._rows("SELECT body FROM bitmap")]

    def piece_rows(self) -> Sequence[int]:
        return [row for (row,) in self._rows("SELECT id FROM piece")]

    def pieces(self, rows: Sequence[int]) -> Iterator[object]:
        """Pieces by number, each as it is stored, so it may be anything; None: it is not there."""
        with self._watched():
            for row in rows:
                # One at a time: it is still in the processor's cache when it is looked at.
                query = self._connection.execute("SELECT data FROM piece WHERE id = ?", (row,))
                found = query.fetchall()
                yield found[0][0] if found else None

    def _rows(self, query: str, values: tuple[int, ...] = ()) -> list[tuple]:  # type: ignore[type-arg]  # as the database has them
        with self._watched():
            return self._connection.execute(query, values).fetchall()

    # -- writing -----------------------------------------------------------------------------

    def commit(self, changes: Sequence[Change]) -> None:
        """All changes in one transaction, or none of them."""
        with self._watched():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                for change in changes:
                    change.apply(self._connection)
                self._connection.execute("COMMIT")
            except BaseException:
                # After some errors SQLite has rolled back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def shorten(self) -> bool:
        """Give back some of what is free in the file; false where there is nothing to give back.

        As much as is in use may stay free: all bitmaps may have to be stored anew beside what is
        stored of them.
        """
        with self._watched():
            (free,) = self._connection.execute("PRAGMA freelist_count").fetchone()
            (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
            spare = min(free - (pages - free), limits.STATE_SHORTEN_PAGES)
            if spare > 0:
                # ``execute`` would stop after the first page. The file gets shorter as it is
                # brought up to the log.
                self._connection.executescript(
                    f"PRAGMA incremental_vacuum({spare}); PRAGMA wal_checkpoint"
                )
            return bool(spare > 0)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            with _as_os_errors():
                yield
        except OSError as error:
            if error.errno == errno.EUCLEAN:
                # The next opening starts anew: damage would stay for ever otherwise.
                with suppress(OSError):
                    Path(self._suspect_path).touch(mode=0o600)
            raise


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        # The name of a damaged table, in the text of the error.
        raise OSError(errno.EUCLEAN, "the database is damaged") from error
    except sqlite3.Error as error:
        # Only a value that is no text is an error of running, but not one of SQLite's.
        no_text = isinstance(error, sqlite3.OperationalError)
        unknown = sqlite3.SQLITE_CORRUPT if no_text else 0
        code = getattr(error, "sqlite_errorcode", unknown) & 0xFF
        raise OSError(_ERRNOS.get(code, errno.EIO), str(error)) from error


def open_database(path: str) -> tuple[Database, bool]:
    """Open or make it; one that is damaged is put aside, and a new one made: then True.

    Raises ``OSError`` where neither can be done, and ``BlockdError`` for one that is too new.
    """
    if not os.path.exists(f"{path}.suspect"):
        try:
            return _usable(path), False
        except OSError as error:
            if error.errno != errno.EUCLEAN:
                raise
    _put_aside(path)
    return _usable(path), True


def _usable(path: str) -> Database:
    database = Database(path)
    try:
        database.last_row()
        database.images()
        database.jobs()
    except BaseException:
        database.close()
        raise
    return database


def _put_aside(path: str) -> None:
    """The damaged one stays, for those who want to look into it; one before it goes."""
    for suffix in ("-wal", ""):
        with suppress(FileNotFoundError):
            os.replace(path + suffix, f"{path}.damaged{suffix}")
    with suppress(FileNotFoundError):
        os.unlink(f"{path}.suspect")
