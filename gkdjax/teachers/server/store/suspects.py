"""What a server was asked when it went away, kept until it is answered: asked alone from then on.

Without this file each start of a run would send the same things together again, and none would
learn which of them the server does not survive.
"""

import pathlib
import threading
from collections.abc import Iterable

from gkdjax.utils import files


class Suspects:
    """Keys of requests, in a file of a run; for any number of threads of one process."""

    def __init__(self, path: pathlib.Path | None):
        """Reads what an earlier start left there, if anything; None: nothing is kept."""
        self._path, self._lock = path, threading.Lock()
        self._keys: set[str] = set()
        if path is not None and path.exists():
            self._keys = set(files.read_object(path)["keys"])

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[str]) -> None:
        """Of what was under way when the server went away."""
        with self._lock:
            self._keep(self._keys | set(keys))

    def remove(self, keys: Iterable[str]) -> None:
        """Of what is answered."""
        with self._lock:
            self._keep(self._keys - set(keys))

    def _keep(self, keys: set[str]) -> None:
        if keys == self._keys:
            return
        self._keys = keys
        if self._path is None:
            return
        if not keys:
            self._path.unlink(missing_ok=True)
            return
        files.write_json(self._path, {"keys": sorted(keys)})
