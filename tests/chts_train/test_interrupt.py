"""Signals while the main thread is in Python, and while it is not."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

from chts_train.interrupt import GracefulStop


def send(number: int, after: float = 0.1) -> None:
    timer = threading.Timer(after, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def busy_in_c(seconds: float) -> None:
    """Releases the interpreter's lock and comes back to it late, as a wait for a GPU does."""
    rounds, start = 100_000, time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    each = (time.monotonic() - start) / rounds
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(seconds / each))


def test_who_does_not_come_back_to_python_is_noticed():
    found = []
    with GracefulStop(lambda: found.append(threading.current_thread()), patience=0.2) as stop:
        send(signal.SIGTERM)
        busy_in_c(2.5)
        assert found and found[0] is not threading.main_thread()
        assert stop.signal == signal.SIGTERM  # now it did


def test_who_does_is_left_alone():
    found, before = [], (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1))
    with GracefulStop(lambda: found.append(1), patience=0.2) as stop:
        send(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while stop.signal is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
    assert not found and stop.exit_code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before
