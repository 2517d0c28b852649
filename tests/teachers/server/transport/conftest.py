"""Transports to servers that answer from a script."""

import contextlib

import pytest
from fake_server import FakeServer, Reply, script

from gkdjax.teachers.server.transport import client
from gkdjax.teachers.server.transport.client import Limits, Transport


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits between attempts, none of which is made."""
    waits = []
    monkeypatch.setattr(client, "pause", lambda closed, seconds: waits.append(seconds))
    return waits


@pytest.fixture
def connect(waits):
    """(transport, its server) with replies in order, the last one again and again."""
    with contextlib.ExitStack() as stack:

        def connect(
            *replies: Reply,
            limits=(10.0, 1000.0, 3),
            path="",
            key_env="",
            tls=None,
            trust_env=False,
        ) -> tuple[Transport, FakeServer]:
            server = stack.enter_context(FakeServer(script(*replies), tls=tls))
            transport = Transport(server.base + path, key_env, Limits(*limits), trust_env=trust_env)
            return stack.enter_context(contextlib.closing(transport)), server

        yield connect
