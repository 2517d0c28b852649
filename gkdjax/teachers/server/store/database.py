"""The SQLite file of a store: opened, checked, written in transactions, its errors readable."""

import contextlib
import os
import pathlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence

import tenacity

from gkdjax.utils.errors import UserError

_BUSY_SECONDS = 60.0  # another process may write for so long
_APPLICATION = 0x676B646A  # "gkdj", at byte 68 of the file

_ADVICE = {
    sqlite3.SQLITE_FULL: "make room on its disk; what it holds is safe",
    sqlite3.SQLITE_BUSY: "another process holds it for long; stop that one, or wait for it",
    sqlite3.SQLITE_PROTOCOL: "too many processes want it at once; start it again",
    sqlite3.SQLITE_READONLY: "it, or its directory, may not be written; change its permissions",
    sqlite3.SQLITE_PERM: "change its permissions",
    sqlite3.SQLITE_CANTOPEN: "check that it is a file, and its permissions and its directory's",
    sqlite3.SQLITE_IOERR: "check its disk, and that there is room; what it holds is safe",
    sqlite3.SQLITE_NOTADB: "it is no store of answers; name another file",
}
_DAMAGED = "it is damaged; put a copy of it in its place, or name another file"


class Database:
    """A file of one schema; every method may be called from any thread."""

    def __init__(self, path: pathlib.Path, schema: Sequence[str], version: int, *, read_only: bool):
        """Opens it, and makes it with its parent directories if it is not there.

        Args:
          path: beside it, SQLite keeps PATH-wal and PATH-shm while it is open.
          schema: the statements that make its tables.
          version: of the schema.
          read_only: changes nothing, and makes nothing.

        Raises:
          UserError: it cannot be opened, is something else, is damaged, or of another version.
        """
        self.path, self._schema, self._version = path, schema, version
        self._lock = threading.Lock()
        if read_only and not path.exists():
            raise UserError(f"{self.named()}: there is no such file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.named()} cannot be made: {error}") from None
        with self._readable_errors(), contextlib.ExitStack() as after_error:
            self._connection = self._connected(read_only)
            after_error.callback(self._connection.close)
            for attempt in _until_free():
                with attempt:
                    self._prepare(read_only)
            after_error.pop_all()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the disk at its end."""
        with self._readable_errors(), self._lock, self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    def rows(self, query: str, *values) -> list[tuple]:
        """What the query finds."""
        with self._readable_errors(), self._lock:
            return self._connection.execute(query, values).fetchall()

    def num_bytes(self) -> int:
        """Of the file, and of what stands beside it and will be moved into it."""
        files = (self.path, self._beside("-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def named(self) -> str:
        """For errors."""
        return f"{self.path} (config.teacher.store)"

    def close(self) -> None:
        """May be called twice."""
        with self._readable_errors(), self._lock:
            self._connection.close()

    def _connected(self, read_only: bool) -> sqlite3.Connection:
        how = "mode=ro" if read_only else "mode=rwc"
        # A reader, too, needs the files beside it, unless nobody can be writing.
        may_write = os.access(self.path.parent, os.W_OK)
        if read_only and not may_write and not self._beside("-wal").exists():
            how = "immutable=1"
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?{how}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,  # transactions begin where this file says so
            check_same_thread=False,
        )

    def _prepare(self, read_only: bool) -> None:
        empty = self._is_empty()
        if empty and read_only:
            raise UserError(f"{self.named()} is no store of answers: it is empty")
        if not empty:
            self._check_kind()
        if read_only:
            return
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._connection.execute(f"PRAGMA {setting}")
        if empty:
            self._make_tables()

    def _make_tables(self) -> None:
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            if self._is_empty():  # still: no other process was faster
                for statement in self._schema:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id={_APPLICATION}")
                connection.execute(f"PRAGMA user_version={self._version}")

    def _is_empty(self) -> bool:
        return not self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]

    def _check_kind(self) -> None:
        application, version = (
            self._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )
        if application != _APPLICATION:
            raise UserError(f"{self.named()} is a database of something else; name another file")
        if version != self._version:
            raise UserError(
                f"{self.named()} is of version {version}, and this code reads version"
                f" {self._version}: use the code that made it, or name another file"
            )

    def _beside(self, end: str) -> pathlib.Path:
        return self.path.with_name(self.path.name + end)

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise  # the caller's mistake, not the file's
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            # What has no advice of its own is a statement that made sense when it was written.
            advice = _ADVICE.get(_code(error)) or _DAMAGED
            raise UserError(f"{self.named()}: {error}: {advice}") from error


def _code(error: BaseException) -> int:
    """SQLite's, without its details; 0 of what is not SQLite's."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _until_free() -> tenacity.Retrying:
    """SQLite itself does not wait where two processes at once turn a new file to WAL mode."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _code(error) == sqlite3.SQLITE_BUSY),
        stop=tenacity.stop_after_delay(_BUSY_SECONDS),
        wait=tenacity.wait_random(0.01, 0.1),
        reraise=True,
    )
