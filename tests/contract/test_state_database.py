"""A state directory's database: the space that it takes, and damage that SQLite words badly."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from blockd import limits
from blockd.state import changes
from blockd.state.commits import Pending
from blockd.state.database import Database, open_database
from blockd.state.records import JobRecord
from tests.helpers.state_rig import daemon, make_image

PIECE = bytes(128 * 1024)


@pytest.fixture
def path(memory_path: Path) -> Path:
    return memory_path / "state.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(str(path))
    yield database
    database.close()


def store(database: Database, rows: range) -> None:
    database.commit([Pending(changes.put_pieces([(row, PIECE) for row in rows]))])


def shorten(database: Database, path: Path) -> int:
    """The size of the file after all that is given back."""
    while database.shorten():
        pass
    return path.stat().st_size


def log_bytes(path: Path) -> int:
    return path.with_name("state.db-wal").stat().st_size


def test_a_long_log_is_cut(database: Database, path: Path) -> None:
    store(database, range(1, 2 + limits.STATE_LOG_BYTES // len(PIECE)))
    assert log_bytes(path) > limits.STATE_LOG_BYTES
    store(database, range(1, 2))
    assert log_bytes(path) <= limits.STATE_LOG_BYTES


def test_deleting_writes_little(database: Database, path: Path) -> None:
    rows = range(1, 65)
    store(database, rows)
    database.close()
    again = Database(str(path))
    again.commit([Pending(changes.delete_pieces(rows))])
    assert log_bytes(path) < len(rows) * len(PIECE) / 32
    again.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE sqlite_master SET name = CAST(x'dd20' AS TEXT), sql = 'x' WHERE name = 'job'",
        "UPDATE job SET id = CAST(x'dd20' AS TEXT)",
    ],
    ids=["a table's name", "a value"],
)
def test_text_that_is_no_text_is_damage(database: Database, path: Path, damage: str) -> None:
    database.commit([Pending(changes.put_job("job", JobRecord({})))])
    database.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(damage)
    again, damaged = open_database(str(path))
    again.close()
    assert damaged


def test_what_was_deleted_is_given_back(database: Database, path: Path) -> None:
    store(database, range(1, 101))
    assert path.stat().st_size > 100 * len(PIECE)
    kept = {10: b"a" * 100_000, 95: b"b" * 100_000}
    database.commit([Pending(changes.put_pieces(list(kept.items())))])
    gone = [row for row in range(1, 101) if row not in kept]
    database.commit([Pending(changes.delete_pieces(gone))])
    assert shorten(database, path) < 6 * len(PIECE)
    assert list(database.pieces(list(kept))) == list(kept.values())


def test_as_much_as_is_in_use_stays_free(database: Database, path: Path) -> None:
    store(database, range(1, 61))
    database.commit([Pending(changes.delete_pieces(range(1, 41)))])
    assert 40 * len(PIECE) < shorten(database, path) < 42 * len(PIECE)


async def test_the_daemon_gives_back_what_was_deleted(
    memory_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten, told, ended = Database.shorten, [], trio.Event()

    def watched(database: Database) -> bool:
        told.append(shorten(database))
        if told[-2:] == [True, False]:
            trio.from_thread.run_sync(ended.set)
        return told[-1]

    monkeypatch.setattr(Database, "shorten", watched)
    async with daemon(memory_path / "state", make_image(memory_path / "disk.img")) as one:
        rows = range(1, 65)
        put = changes.put_pieces([(row, PIECE) for row in rows])
        await one.state.commits.commit(Pending(put))
        await one.state.commits.commit(Pending(changes.delete_pieces(rows)))
        path = memory_path / "state/state.db"
        await ended.wait()
        assert path.stat().st_size < len(PIECE)
