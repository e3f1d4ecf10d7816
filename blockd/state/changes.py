"""What is done to the database, as functions of a connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Sequence

from blockd.state.records import ArmedRow, BitmapRecord, ImageRecord, JobRecord, seal

Apply = Callable[[sqlite3.Connection], None]


def put_image(image: ImageRecord) -> Apply:
    """Keep the image's record; how many armed rows it has stays."""
    body = seal(image)

    def apply(connection: sqlite3.Connection) -> None:
        connection.execute(
            "INSERT INTO image (id, body, armed_rows) VALUES (?, ?, 0)"
            " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
            (image.row, body),
        )

    return apply


def put_armed(image: int, row: int, armed: ArmedRow) -> Apply:
    values = (image, row, armed.epoch, seal(armed))

    def apply(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO armed VALUES (?, ?, ?, ?)", values)
        connection.execute("UPDATE image SET armed_rows = armed_rows + 1 WHERE id = ?", (image,))

    return apply


def disarm(image: int, epoch: int) -> Apply:
    """Forget what was armed before the epoch."""

    def apply(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM armed WHERE image = ? AND epoch < ?", (image, epoch))
        connection.execute(
            "UPDATE image SET armed_rows = (SELECT count(*) FROM armed WHERE image = image.id)"
            " WHERE id = ?",
            (image,),
        )

    return apply


def put_pieces(pieces: Sequence[tuple[int, bytes]]) -> Apply:
    def apply(connection: sqlite3.Connection) -> None:
        # One statement: each one gives the interpreter up, and where the loop is busy it takes
        # milliseconds to have it back.
        rows = ", ".join(["(?, ?)"] * len(pieces))
        values = [value for piece in pieces for value in piece]
        query = f"INSERT OR REPLACE INTO piece VALUES {rows}"  # noqa: S608 - question marks
        connection.execute(query, values)

    return apply


def delete_pieces(rows: Sequence[int]) -> Apply:
    def apply(connection: sqlite3.Connection) -> None:
        marks = ", ".join("?" * len(rows))
        query = f"DELETE FROM piece WHERE id IN ({marks})"  # noqa: S608 - question marks
        connection.execute(query, rows)

    return apply


def put_bitmaps(image: int, bitmaps: Sequence[BitmapRecord], rows: Collection[int]) -> Apply:
    """Keep these records, and forget all of the image's that are not in ``rows``.

    Among those are such as were of no use when the image was opened.
    """

    def apply(connection: sqlite3.Connection) -> None:
        # Made here and not before, since it takes the loop milliseconds.
        new = [(bitmap.title.row, image, seal(bitmap)) for bitmap in bitmaps]
        connection.executemany("INSERT OR REPLACE INTO bitmap VALUES (?, ?, ?)", new)
        there = connection.execute("SELECT id FROM bitmap WHERE image = ?", (image,)).fetchall()
        forgotten = [(row,) for (row,) in there if row not in rows]
        connection.executemany("DELETE FROM bitmap WHERE id = ?", forgotten)

    return apply


def forget_image(image: int) -> Apply:
    def apply(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM armed WHERE image = ?", (image,))
        connection.execute("DELETE FROM bitmap WHERE image = ?", (image,))
        connection.execute("DELETE FROM image WHERE id = ?", (image,))

    return apply


def put_job(job_id: str, job: JobRecord) -> Apply:
    body = seal(job)

    def apply(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT OR REPLACE INTO job VALUES (?, ?)", (job_id, body))

    return apply


def forget_jobs(job_ids: Sequence[str]) -> Apply:
    def apply(connection: sqlite3.Connection) -> None:
        connection.executemany("DELETE FROM job WHERE id = ?", [(each,) for each in job_ids])

    return apply


def all_of(*changes: Apply) -> Apply:
    """One after the other, in one transaction."""

    def apply(connection: sqlite3.Connection) -> None:
        for change in changes:
            change(connection)

    return apply
