"""The published transcripts, played on the package as it is installed, over a real socket."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.daemon import Daemon
from tests.helpers.qmp_lines import Lines
from tests.helpers.transcript import Line, Player, fits, read, text_of

ROOT = Path(__file__).parents[2]
TRANSCRIPTS = sorted((ROOT / "protocol" / "transcripts").glob("*.txt"))
MAX_LINES = 60

each_transcript = pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``blockd`` in an environment of its own, into which nothing but the package was installed."""
    environment = tmp_path_factory.mktemp("installed")
    python = environment / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", str(environment)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(ROOT)],
    ):
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert made.returncode == 0, made.stderr
    return environment / "bin" / "blockd"


class Installed:
    """A run of the installed daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.wait = daemon.wait

    @property
    def pid(self) -> int:
        return self._daemon.pid

    def connect(self) -> Lines:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._daemon.qmp_path))
        return Lines(connection)


@pytest.fixture
def program(installed: Path, tmp_path: Path) -> Iterator[Installed]:
    daemon = Daemon(tmp_path, [str(installed)])
    daemon.start()
    yield Installed(daemon)
    status = daemon.terminate() if daemon.running else 0
    assert status == 0, daemon.log()
    assert "Traceback" not in daemon.log()


@each_transcript
def test_it_comes_true(path: Path, program: Installed, tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    with closing(Player(program, directory)) as player:
        played = text_of(player.play(read(path)))
    came = tmp_path / path.name
    came.write_text(played, encoding="utf-8")
    # Compared without pytest's help, which would hide the way out.
    same = played == path.read_text(encoding="utf-8")
    assert same, (
        f"protocol/transcripts/{path.name} is not what happens. To see the difference, and to "
        f"publish the change if it is meant:\n"
        f"  diff {path} {came}\n  cp {came} {path}"
    )


@each_transcript
def test_it_is_one_short_story(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) < MAX_LINES
    assert max(map(len, lines)) <= 101


# -- what the comparison is worth ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "came"),
    [
        ({"a": 1}, {"a": 1}),
        ("$DIR/x", "/d/x"),
        ("$TIME", {"seconds": 5, "microseconds": 7}),
        (["$INT", "$TEXT", "..."], [5, "x", "..."]),
        ({"a": 1, "...": "..."}, {"a": 1, "b": 2}),
    ],
)
def test_what_fits(told: object, came: object) -> None:
    assert fits(told, came, "/d")


@pytest.mark.parametrize(
    ("told", "came"),
    [
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": 1}),
        ({"a": 1, "...": "..."}, {"b": 2}),
        ({"a": 1, "...": "..."}, {"a": 1}),
        ({"a": True}, {"a": 1}),
        ({"a": 0}, {"a": False}),
        ([1], [1, 1]),
        ([1, 2], [2, 1]),
        ("$DIR/x", "/e/x"),
        ("$TIME", {"seconds": 5}),
        ("$INT", True),
        ("$TEXT", None),
        ("x", 5),
    ],
)
def test_what_does_not_fit(told: object, came: object) -> None:
    assert not fits(told, came, "/d")


def test_a_message_over_several_lines_is_one(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text('# A\n-> {"a":\n     [1, 2]}\n\nB<- {}\n')
    lines = read(path)
    assert [(line.client, line.sent, line.body) for line in lines] == [
        ("", False, ""),
        ("A", True, '{"a": [1, 2]}'),
        ("", False, ""),
        ("B", False, "{}"),
    ]
    assert text_of(lines) == path.read_text()
    long = {"desc": "word " * 50, "list": list(range(100))}
    assert json.loads(Line.of("<- {}").with_message(long).body) == long
