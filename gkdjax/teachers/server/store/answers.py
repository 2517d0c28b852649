"""The answers that were paid for, on the disk before they are used: none is bought twice.

One SQLite file in WAL mode, for the threads of a process and for other processes of the same
machine; it does not belong on a network drive. `put` returns when its answers are on the disk.

Every row has a checksum. A row that fails it is an error that names the key, never a missing
answer: it would be bought again, and nobody would learn that the disk loses data. The index by key
has no checksum: where it is damaged an answer may be missing, but another one is never returned.
"""

import contextlib
import json
import os
import pathlib
import random
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gkdjax.teachers.server.answers import TeacherAnswer
from gkdjax.teachers.server.store import codec
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity
from gkdjax.utils.errors import NotWritten, UserError
from gkdjax.utils.files import free_bytes
from gkdjax.utils.text import size

_BUSY_SECONDS = 60.0  # for which another process may write
_PAGE_ROWS = 256  # that `AnswerStore.all` holds in memory
_APPLICATION = 0x676B646A  # "gkdj", at byte 68 of the file
_VERSION = 1
_SCHEMA = (
    """CREATE TABLE teachers(
      fingerprint TEXT PRIMARY KEY NOT NULL, model TEXT NOT NULL, tokenizer TEXT NOT NULL,
      findings TEXT NOT NULL, checked TEXT NOT NULL, probe BLOB NOT NULL)""",
    # Rows have 1 to 12 kB: WITHOUT ROWID, or larger pages, would take 6 to 100 % more space.
    """CREATE TABLE answers(
      key BLOB PRIMARY KEY NOT NULL, fingerprint TEXT NOT NULL REFERENCES teachers,
      kind TEXT NOT NULL CHECK(kind IN ('score', 'sample')), tokens INTEGER NOT NULL,
      created INTEGER NOT NULL, payload BLOB NOT NULL)""",
    f"PRAGMA application_id={_APPLICATION}",
    f"PRAGMA user_version={_VERSION}",
)
_COLUMNS = "LOWER(HEX(key)), fingerprint, kind, tokens, created, CAST(payload AS BLOB)"
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
_DISK = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}
# Any other error: the statement made sense when it was written.
_DAMAGED = "it is damaged; put a copy of it in its place, or name another file"


class Stored(NamedTuple):
    """An answer with what the store knows about it."""

    key: str  # hex
    fingerprint: str
    kind: str  # "score" or "sample"
    created: int  # seconds since 1970, UTC
    answer: TeacherAnswer


class Holding(NamedTuple):
    """The answers of one teacher and kind; kind and times are None for a teacher without any."""

    model: str
    fingerprint: str
    tokenizer: str
    kind: str | None
    answers: int
    tokens: int
    num_bytes: int  # of the answers, without the file's own
    first: int | None  # seconds since 1970, UTC
    last: int | None


class AnswerStore(contextlib.AbstractContextManager):
    """Answers by the keys of their requests; every method may be called from any thread."""

    def __init__(self, path: str | pathlib.Path, *, read_only: bool = False):
        """Opens the store, and creates it and its parent directories where it is missing.

        Args:
          path: its file; SQLite has PATH-wal and PATH-shm beside it while it is open.
          read_only: change nothing, create nothing.

        Raises:
          UserError: it cannot be opened, is something else, is damaged, or of another version. All
            methods raise it: an answer is damaged, no space, no permission, locked for a minute.
        """
        self._path, self._read_only = pathlib.Path(path), read_only
        self._name, self._lock = f"{path} (config.teacher.store)", threading.Lock()
        if read_only and not self._path.exists():
            raise UserError(f"{self._name}: there is no such file")
        if self._path.is_dir():
            raise UserError(f"{self._name} is a directory; name a file")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._name} cannot be made: {error}") from None
        with self._readable_errors(), contextlib.ExitStack() as after_error:
            self._connection = self._connect()
            after_error.callback(self._connection.close)
            # SQLite itself does not wait where two processes turn a new file to WAL mode at once.
            deadline = time.monotonic() + _BUSY_SECONDS
            while not self._prepare(deadline):
                time.sleep(random.uniform(0.01, 0.1))
            after_error.pop_all()

    def get(self, keys: Sequence[str]) -> dict[str, TeacherAnswer]:
        """The answers to those of these keys (hex) that it has."""
        query = f"SELECT {_COLUMNS} FROM answers WHERE key = ?"
        found = (self._rows(query, bytes.fromhex(key)) for key in keys)
        return {row[0]: self._stored(row).answer for rows in found for row in rows}

    def put(self, fingerprint: str, items: Sequence[tuple[str, str, TeacherAnswer]]) -> None:
        """Writes all of these answers to the disk or, after an error, none.

        The first answer to a key stays, even if another process wrote it.

        Args:
          fingerprint: of a teacher that was added before.
          items: (key in hex, "score" or "sample", answer) each.
        """
        now, rows = int(time.time()), []
        for key, kind, answer in items:
            columns = fingerprint, kind, len(answer.target_ids), now
            payload = codec.encode(answer, _context(key, *columns))
            rows.append((bytes.fromhex(key), *columns, payload))
        with self._transaction() as connection:
            connection.executemany(
                "INSERT INTO answers VALUES(?, ?, ?, ?, ?, ?) ON CONFLICT(key) DO NOTHING", rows
            )

    def teachers(self) -> list[TeacherIdentity]:
        """All teachers, in the order in which they were added."""
        found = []
        for *columns, payload in self._rows(
            "SELECT fingerprint, model, tokenizer, findings, checked, CAST(probe AS BLOB)"
            " FROM teachers ORDER BY rowid"
        ):
            probe = self._decode(f"the probe of teacher {columns[0]}", payload, columns)
            *names, findings, checked = columns
            found.append(TeacherIdentity(*names, probe, json.loads(findings), checked))
        return found

    def add_teacher(self, teacher: TeacherIdentity) -> None:
        """Adds a teacher, or replaces the findings and the time of a known one.

        The first probe stays: if each was compared with the one before, a teacher could drift away.
        """
        first = (t.probe for t in self.teachers() if t.fingerprint == teacher.fingerprint)
        probe = next(first, teacher.probe)
        names = teacher.fingerprint, teacher.model, teacher.tokenizer
        columns = (*names, json.dumps(teacher.findings), teacher.checked)
        with self._transaction() as connection:
            # The checksum beside the probe covers the whole row, so all of it is written again.
            connection.execute(
                "INSERT INTO teachers VALUES(?, ?, ?, ?, ?, ?) ON CONFLICT(fingerprint) DO UPDATE"
                " SET (model, tokenizer, findings, checked, probe) = (excluded.model,"
                " excluded.tokenizer, excluded.findings, excluded.checked, excluded.probe)",
                (*columns, codec.encode(probe, _context(*columns))),
            )

    def summary(self) -> list[Holding]:
        """What it holds, by teacher and kind."""
        rows = self._rows(
            "SELECT model, fingerprint, tokenizer, kind, COUNT(key), IFNULL(SUM(tokens), 0),"
            " IFNULL(SUM(LENGTH(payload)), 0), MIN(created), MAX(created)"
            " FROM teachers LEFT JOIN answers USING (fingerprint)"
            " GROUP BY fingerprint, kind ORDER BY model, fingerprint, kind"
        )
        return [Holding(*row) for row in rows]

    def num_bytes(self) -> int:
        """Size of the file and of the log beside it, which will be moved into it."""
        files = self._path, self._wal_path()
        return sum(file.stat().st_size for file in files if file.exists())

    def all(self) -> Iterator[Stored]:
        """Every answer, a page at a time, in the order in which they came."""
        query = f"SELECT rowid, {_COLUMNS} FROM answers WHERE rowid > ? ORDER BY rowid LIMIT ?"
        last = 0
        while rows := self._rows(query, last, _PAGE_ROWS):
            yield from (self._stored(row) for _, *row in rows)
            last = rows[-1][0]

    def close(self, *_) -> None:
        """May be called twice."""
        with self._readable_errors(), self._lock:
            self._connection.close()

    __exit__ = close

    def _stored(self, row: Sequence) -> Stored:
        *columns, payload = row
        key, fingerprint, kind, _, created = columns
        answer = self._decode(f"the answer {key}", payload, columns)
        return Stored(key, fingerprint, kind, created, answer)

    def _decode(self, name: str, payload: bytes | None, columns: Sequence) -> TeacherAnswer:
        try:
            return codec.decode(payload or b"", _context(*columns))
        except ValueError as error:
            raise UserError(
                f"{self._name}: {name} is damaged: {error}. Put a copy of the file in its place;"
                " without one, delete that row of its table, and it is asked for again"
            ) from None

    def _rows(self, query: str, *values) -> list[tuple]:
        with self._readable_errors(), self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements or none, on the disk at its end."""
        with self._readable_errors(), self._lock, self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    def _connect(self) -> sqlite3.Connection:
        mode = "mode=ro" if self._read_only else "mode=rwc"
        # A reader needs the files beside it as well, unless no process can be writing.
        can_write = os.access(self._path.parent, os.W_OK)
        if self._read_only and not can_write and not self._wal_path().exists():
            mode = "immutable=1"
        return sqlite3.connect(
            f"{self._path.absolute().as_uri()}?{mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,  # transactions begin where this file says so
            check_same_thread=False,
        )

    def _prepare(self, deadline: float) -> bool:
        """Checks the file or makes its tables; False if it is locked at the moment."""
        try:
            if not (empty := self._is_empty()):
                self._check_kind()
            elif self._read_only:
                raise UserError(f"{self._name} is no store of answers: it is empty")
            if not self._read_only:
                for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                    self._connection.execute(f"PRAGMA {setting}")
            if empty:
                with self._connection as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    # Unless another process was faster.
                    for statement in _SCHEMA if self._is_empty() else ():
                        connection.execute(statement)
            return True
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            return False

    def _is_empty(self) -> bool:
        return not self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]

    def _check_kind(self) -> None:
        query = "SELECT * FROM pragma_application_id, pragma_user_version"
        application, version = self._connection.execute(query).fetchone()
        if application != _APPLICATION:
            raise UserError(f"{self._name} is a database of something else; name another file")
        if version != _VERSION:
            raise UserError(
                f"{self._name} is of version {version}, and this code reads version {_VERSION}: use"
                " the code that made it, or name another file"
            )

    def _wal_path(self) -> pathlib.Path:
        return self._path.with_name(self._path.name + "-wal")

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise  # the caller's mistake, not the file's
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            advice = _ADVICE.get(_code(error)) or _DAMAGED
            if _code(error) not in _DISK:
                raise UserError(f"{self._name}: {error}: {advice}") from error
            if _code(error) != sqlite3.SQLITE_READONLY:
                advice += f"; {size(free_bytes(self._path))} are free there"
            raise NotWritten(f"{self._name}: {error}: {advice}") from error


def _context(*columns) -> bytes:
    """The other columns of a row, for its checksum."""
    return "\n".join(map(str, columns)).encode()


def _code(error: BaseException) -> int:
    """SQLite's primary error code; 0 if the error is not SQLite's."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
