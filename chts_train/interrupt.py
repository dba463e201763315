"""Ctrl-C and SIGTERM during training: note the first signal and let the loop finish its step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class GracefulStop:
    """While entered, the first SIGINT or SIGTERM only sets :attr:`signal`; a second SIGINT interrupts at once.

    In a thread other than the main one, where Python allows no handlers, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by the signal: 130 (SIGINT), 143 (SIGTERM); 0 without one."""
        return 128 + self.signal if self.signal else 0
