"""``quit`` to a real daemon, from more than one client: all are answered, and it ends well."""

from __future__ import annotations

import json
import socket
from typing import Any

from tests.helpers.daemon import Daemon
from tests.helpers.qmp_client import QmpClient

QUIT = json.dumps({"execute": "quit"}).encode()
DONE: dict[str, Any] = {"return": {}}


def send(client: QmpClient, data: bytes) -> None:
    client._socket.sendall(data)


def rest(client: QmpClient) -> list[Any]:
    """All that comes up to the connection's end."""
    return [message for message in client.events_to_the_end() if "event" not in message]


def test_two_clients_quit_at_once(daemon: Daemon) -> None:
    with QmpClient(daemon.qmp_path) as first, QmpClient(daemon.qmp_path) as second:
        for client in (first, second):
            send(client, QUIT)
        answers = [rest(client) for client in (first, second)]
    assert daemon.wait() == 0
    assert [DONE] in answers
    assert all(answer in ([DONE], []) for answer in answers)
    assert not daemon.qmp_path.exists()


def test_a_client_that_quits_over_and_over(daemon: Daemon) -> None:
    with QmpClient(daemon.qmp_path) as client:
        send(client, QUIT * 3)
        answers = rest(client)
    assert daemon.wait() == 0
    assert answers[0] == DONE
    assert all(answer == DONE or "error" in answer for answer in answers)


def test_a_client_that_says_nothing_does_not_keep_the_daemon(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as silent, QmpClient(daemon.qmp_path) as qmp:
        silent.connect(str(daemon.qmp_path))
        qmp.execute("quit")
        assert daemon.wait() == 0
