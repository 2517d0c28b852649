"""Who may ask at the same time as others, and who has the server to himself."""

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Any number of threads together, or one alone; whoever waits to be alone comes first."""

    def __init__(self):
        self._changed = threading.Condition()
        self._together = self._waiting = 0
        self._alone = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Waits until nobody is alone, or waits to be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until nobody else has a turn."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._together)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
