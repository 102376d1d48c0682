"""What several modules of tests start from, and that no test reaches a network."""

import signal
import socket

import pytest

from tests.small import save_small

# a shell's background jobs ignore Ctrl-C, and so would all that a test starts and interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LOCAL = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return the folder of a small encoder, random, with as many blocks as the packaged one."""
    return save_small(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse other machines, and fail a test that tried one, whatever it made of the refusal."""
    tried = []

    def guard(place, name):
        real = getattr(place, name)

        def guarded(*args, **more):
            to = args[0] if place is socket else args[-1][0]
            if getattr(args[0], "family", None) == socket.AF_UNIX or to in LOCAL:
                return real(*args, **more)
            tried.append(to)
            raise OSError(f"a test may not reach {to!r}")

        monkeypatch.setattr(place, name, guarded)

    for name in ("connect", "connect_ex", "sendto"):
        guard(socket.socket, name)
    for name in ("getaddrinfo", "gethostbyname"):
        guard(socket, name)
    yield tried
    assert tried == [], "a test tried the network"
