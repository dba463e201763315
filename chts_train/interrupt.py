"""Ctrl-C and SIGTERM during training: note the first signal and let the loop finish its step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class GracefulStop:
    """While entered, the first SIGINT or SIGTERM only sets :attr:`signal`; a second SIGINT interrupts at once.

    In a thread other than the main one, where Python allows no handlers, it does nothing.

    Args:
        stuck: called in another thread when the main one has not come back to Python ``patience`` seconds after a signal, and so
            will not note it: it waits inside a library, as for a collective of a process that is gone. None: nobody watches.
        patience: in seconds; torchrun's is 30.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, stuck: Callable[[], None] | None = None, patience: float = 20.0) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}
        self._stuck, self._patience = stuck, patience
        self._noted = threading.Event()
        self._pipe: tuple[int, int, int] | None = None  # read end, write end, and who was woken up before

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
            if self._stuck is not None:
                ends = os.pipe()
                os.set_blocking(ends[1], False)
                # Written to by the handler in C, which runs also while the main thread is not in Python.
                self._pipe = *ends, signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
                threading.Thread(target=self._watch, args=(ends[0],), name="chts-stuck", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._noted.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            _, write, before = self._pipe
            signal.set_wakeup_fd(before)
            os.close(write)  # ends the thread, which closes the other end

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.set()
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def _watch(self, read: int) -> None:
        while numbers := os.read(read, 64):
            if any(number in self.SIGNALS for number in numbers) and not self._noted.wait(self._patience):
                self._stuck()
        os.close(read)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by the signal: 130 (SIGINT), 143 (SIGTERM); 0 without one."""
        return 128 + self.signal if self.signal else 0
