"""Ends a process that hangs: in a step, a collective whose peer is gone, or a save."""

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Hashable, Iterator

import jax

from gkdjax.parallel import multihost
from gkdjax.parallel.shutdown import leave
from gkdjax.utils.errors import Preempted

_MEDIANS = 5.0
_POLL_S = 0.5
_LEADER_STAYS_S = 5.0  # JAX aborts processes that lose it, and they are about to leave as well


class Watchdog:
    """Watches blocks of the main thread; one that takes too long ends the process with 75.

    Too long is `floor_s` seconds, or five medians of the blocks before if that is more. Time in
    which the process itself was stopped does not count.
    """

    def __init__(self, floor_s: float | None):
        """Begins to watch.

        Args:
          floor_s: None watches nothing.
        """
        self._floor_s, self._seconds = floor_s, []
        self._seen: set[Hashable] = set()
        self._block: tuple[float, float] | None = None  # when it began, seconds that it may take
        self._closed = threading.Event()
        if floor_s is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def watching(self, program: Hashable | None) -> Iterator[None]:
        """Watches the block, unless it is the first of its program, which may be compiled.

        `program`: None for a block that compiles nothing.
        """
        began = time.monotonic()
        if self._floor_s is not None and (program is None or program in self._seen):
            longest = max(self._floor_s, _MEDIANS * statistics.median(self._seconds or [0.0]))
            self._block = began, longest
        try:
            yield
        finally:
            if self._block is not None:
                self._seconds = [*self._seconds[-98:], time.monotonic() - began]
            self._block = None
            self._seen.add(program)

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        watched, seconds, before = None, 0.0, time.monotonic()
        while not self._closed.wait(_POLL_S):
            block, now = self._block, time.monotonic()
            seconds = (seconds if block is watched else 0.0) + min(now - before, 2 * _POLL_S)
            watched, before = block, now
            if block is not None and seconds > block[1]:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                print(
                    f"gkdjax: a step has taken longer than {block[1]:g} s (train.watchdog_s), so"
                    " the process ends; its threads were doing what stands above. Run again, with a"
                    " larger train.watchdog_s if nothing hung",
                    file=sys.stderr,
                )
                if multihost.leads() and jax.process_count() > 1:
                    self._closed.wait(_LEADER_STAYS_S)
                leave(Preempted.exit_code)
