"""The requests during which a server went away, until they are answered: they are sent alone.

They are kept in a file: otherwise each start of a run would send them together again, and never
find out which of them the server does not survive.
"""

import pathlib
import threading
from collections.abc import Iterable

from gkdjax.utils import files


class Suspects:
    """Keys of requests, in a file of a run; may be used by several threads of one process."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        self._keys = set(files.read_object(path)["keys"]) if path.exists() else set()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def update(self, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> None:
        """Adds and removes keys, and writes the file if they have changed."""
        with self._lock:
            keys = (self._keys | set(add)) - set(remove)
            if keys != self._keys:
                self._keys = keys
                files.write_json(self._path, {"keys": sorted(keys)})
            if not keys:
                self._path.unlink(missing_ok=True)
