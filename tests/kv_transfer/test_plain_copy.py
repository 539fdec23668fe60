from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from kv_transfer import plain_copy
from kv_transfer.plain_copy import PlainListener, peer_copy_rate, send_plain

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_copy, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(plain_copy, "CALL_BYTES", 1 << 18)


class Taking:
    """A listener at work on a thread, and how its work ended."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.listener = PlainListener(host)
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.listener.take()
        except OSError as error:
            self.error = error

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.listener.port))

    def end(self) -> None:
        self._thread.join(30)
        self.listener.close()


@pytest.fixture
def taking() -> Iterator[Taking]:
    taking = Taking()
    yield taking
    taking.end()


def test_all_copies_are_answered_and_give_a_rate(taking: Taking) -> None:
    assert send_plain("127.0.0.1", taking.listener.port, taking.listener.nonce) > 0
    taking.end()
    assert taking.error is None


def test_who_does_not_know_the_nonce_is_sent_away_and_the_next_is_taken(taking: Taking) -> None:
    with taking.connect() as stranger:
        stranger.sendall(bytes(16))
        assert stranger.recv(1) == b""
    assert send_plain("127.0.0.1", taking.listener.port, taking.listener.nonce) > 0


def test_a_sender_that_stops_half_way_is_an_error(taking: Taking) -> None:
    with taking.connect() as sender:
        sender.sendall(taking.listener.nonce + bytes(100))
    taking.end()
    assert isinstance(taking.error, ConnectionError)


def test_a_sender_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_copy, "ANSWER_SECONDS", 0.05)
    taking = Taking()
    taking.end()
    assert isinstance(taking.error, TimeoutError)


def test_a_sender_that_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_copy, "ANSWER_SECONDS", 1.0)
    taking = Taking()
    with taking.connect():
        taking.end()
    assert isinstance(taking.error, OSError)


def test_a_listener_that_is_not_there_is_an_error_of_the_sender() -> None:
    listener = PlainListener("127.0.0.1")
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        send_plain("127.0.0.1", listener.port, listener.nonce)


@pytest.mark.gpu
def test_a_slot_of_a_gpu_is_copied_as_far_as_both_reach() -> None:
    source = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device="cuda")
    target = torch.zeros((1 << 20) + 512, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()  # the copy is on a stream of its own
    assert peer_copy_rate(source, target) > 0
    assert torch.equal(target[: 1 << 20], source)
    assert not target[1 << 20 :].any()
