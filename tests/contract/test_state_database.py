"""The space that a state directory's database takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd import limits
from blockd.state import changes
from blockd.state.commits import Pending
from blockd.state.database import Database

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
