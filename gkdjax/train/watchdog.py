"""Ends a process that hangs: in a step, a collective whose peer is gone, or a save."""

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Hashable, Iterator

from gkdjax.parallel.shutdown import leave
from gkdjax.utils.errors import Preempted

_MEDIANS = 5.0
_POLL_S = 0.5


class Watchdog:
    """Watches blocks of the main thread; one that takes too long ends the process with 75.

    Too long is `floor_s` seconds, or five medians of the blocks before if that is more.
    """

    def __init__(self, floor_s: float | None):
        """Begins to watch.

        Args:
          floor_s: None watches nothing.
        """
        self._floor_s, self._seconds = floor_s, []
        self._seen: set[Hashable] = set()
        self._limit: tuple[float, float] | None = None  # (end, seconds) of the block
        self._closed = threading.Event()
        if floor_s is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def watching(self, program: Hashable) -> Iterator[None]:
        """Watches the block, unless it is the first of its program, which may be compiled."""
        began = time.monotonic()
        if self._floor_s is not None and program in self._seen:
            longest = max(self._floor_s, _MEDIANS * statistics.median(self._seconds or [0.0]))
            self._limit = began + longest, longest
        try:
            yield
        finally:
            if self._limit is not None:
                self._seconds = [*self._seconds[-98:], time.monotonic() - began]
            self._limit = None
            self._seen.add(program)

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            limit = self._limit
            if limit is not None and time.monotonic() > limit[0]:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                print(
                    f"gkdjax: a step has taken longer than {limit[1]:g} s (train.watchdog_s), so"
                    " the process ends; its threads were doing what stands above. Run again",
                    file=sys.stderr,
                )
                leave(Preempted.exit_code)
