"""A run that is asked to stop: by SIGTERM, SIGHUP, Ctrl-C, or the end of `train.max_seconds`."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import jax
from absl import logging

from gkdjax.parallel.shutdown import leave
from gkdjax.utils.errors import Interrupted, Preempted

_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_LATEST_S = 5.0  # a run that has no state to save ends so soon


class _Stop(BaseException):
    """Raised by a signal, past all that handles errors."""


class StopRequest:
    """Set by the first signal. It raises at once, but in a `deferred` block, which looks itself."""

    def __init__(self):
        self.event = threading.Event()
        self._reason, self._kind = "", Preempted
        self._deferred, self._alone = False, True

    def error(self, what: str) -> Preempted:
        """The exception of the request, with what became of the run."""
        return self._kind(f"stopped by {self._reason}, {what}; run again")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets no request raise in the block."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Lets a request raise Preempted in the block, inside of a deferred one.

        Not with several processes: the others would wait for this one in a computation.
        """
        before, self._deferred = self._deferred, not self._alone
        try:
            if self.event.is_set() and self._alone:
                raise _Stop
            yield
        except _Stop:
            raise self.error("not in a step") from None
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def listening(self, max_seconds: float | None) -> Iterator[None]:
        """Takes the signals while the block runs; the old handlers are back afterwards.

        Args:
          max_seconds: the block is asked to stop by itself after so long.

        Raises:
          Preempted: a request came outside of a deferred block.
        """
        self._alone = jax.process_count() == 1
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone
            return
        with contextlib.ExitStack() as undo:
            # Python's own handlers wait for the end of a compilation; the pipe is written at once.
            ours, theirs = socket.socketpair()
            undo.callback(theirs.close)
            theirs.setblocking(False)
            undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno()))
            threading.Thread(target=self._watch, args=(ours,), daemon=True).start()
            for number in _ENDS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # as nohup wants it
                undo.callback(signal.signal, number, signal.signal(number, self._handle))
            if max_seconds is not None:
                within = min(max_seconds, threading.TIMEOUT_MAX)  # 292 years
                timer = threading.Timer(within, self._time_is_over, (max_seconds,))
                timer.daemon = True
                timer.start()
                undo.callback(timer.join)  # it may just have begun to send its signal
                undo.callback(timer.cancel)
            try:
                yield
            except _Stop:
                raise self.error("and what was computed is kept") from None

    def _time_is_over(self, max_seconds: float) -> None:
        if not self.event.is_set():
            self._reason = f"train.max_seconds = {max_seconds:g}"
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame) -> None:
        del frame
        if self.event.is_set():
            return
        self._reason = self._reason or signal.Signals(number).name
        self._kind = Interrupted if number == signal.SIGINT else Preempted
        self.event.set()
        if not self._deferred:
            raise _Stop

    def _watch(self, signals: socket.socket) -> None:
        """Ends the process for a second Ctrl-C, or where the main thread has nothing to save and is
        in a computation that does not end."""
        interrupted = False
        with signals:
            while number := signals.recv(1):
                if number[0] == signal.SIGINT:
                    if interrupted:
                        leave(Interrupted.exit_code)
                    interrupted = True
                elif self._alone and not self._deferred:
                    signals.settimeout(_LATEST_S)
                    with contextlib.suppress(TimeoutError):
                        if not signals.recv(1):
                            return  # the main thread is out
                    if not self._deferred:
                        logging.warning("stopped in a long computation; run again")
                        leave(Preempted.exit_code)
                    signals.settimeout(None)
