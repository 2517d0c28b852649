"""Answers that were paid for, on disk before they are used: none is lost, or bought twice.

One SQLite file in WAL mode, for the threads of a process and for other processes of the same
machine; it does not belong on a network drive. A put returns when its answers are on the disk.

Every row carries a checksum. One that fails it is an error that names its key, and never counts as
missing: it would be bought again, and nobody would learn that the disk loses data. The index by key
has none; where it is damaged, an answer may be missing, but it is never another's.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.store import codec
from gkdjax.teachers.server.store.database import Database
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, same_teacher
from gkdjax.types import Message
from gkdjax.utils.errors import UserError

_VERSION = 1
_SCHEMA = (
    """CREATE TABLE teachers(
      fingerprint TEXT PRIMARY KEY NOT NULL, model TEXT NOT NULL, tokenizer TEXT NOT NULL,
      findings TEXT NOT NULL, checked TEXT NOT NULL, probe BLOB NOT NULL)""",
    # Rows of 1 to 12 kB: WITHOUT ROWID, or larger pages, would take 6 to 100 % more space.
    """CREATE TABLE answers(
      key BLOB PRIMARY KEY NOT NULL, fingerprint TEXT NOT NULL REFERENCES teachers,
      kind TEXT NOT NULL CHECK(kind IN ('score', 'sample')), tokens INTEGER NOT NULL,
      created INTEGER NOT NULL, payload BLOB NOT NULL)""",
)
_COLUMNS = "LOWER(HEX(key)), fingerprint, kind, tokens, created, CAST(payload AS BLOB)"
_AT_ONCE = 256  # rows that `AnswerStore.all` holds


class Stored(NamedTuple):
    """An answer with what the store knows about it."""

    key: str  # hex
    fingerprint: str
    kind: str  # "score" or "sample"
    created: int  # seconds since 1970, UTC
    answer: TeacherAnswer


@dataclasses.dataclass(frozen=True)
class Holding:
    """Answers of one teacher and kind; of a teacher that has none, kind and times are None."""

    model: str
    fingerprint: str
    tokenizer: str
    kind: str | None
    answers: int
    tokens: int
    num_bytes: int  # of the answers, without the file's own
    first: int | None  # seconds since 1970, UTC
    last: int | None


class AnswerStore:
    """Answers by the hash of what was asked; every method may be called from any thread."""

    def __init__(self, path: str | pathlib.Path, *, read_only: bool = False):
        """Opens the store, and makes one with its parent directories if there is none.

        Args:
          path: its file; beside it, SQLite keeps PATH-wal and PATH-shm while it is open.
          read_only: changes nothing, and makes nothing.

        Raises:
          UserError: it cannot be opened, is no such store, is damaged, or of another version. So
            do all methods where the file fails them: no room, no permission, locked for a minute.
        """
        self._file = Database(pathlib.Path(path), _SCHEMA, _VERSION, read_only=read_only)

    def get(self, keys: Sequence[str]) -> dict[str, TeacherAnswer]:
        """Those of these keys (hex) that it has.

        Raises:
          UserError: one of them is damaged.
        """
        query = f"SELECT {_COLUMNS} FROM answers WHERE key = ?"
        found = (self._file.rows(query, bytes.fromhex(key)) for key in keys)
        return {row[0]: self._stored(row).answer for rows in found for row in rows}

    def missing(self, keys: Sequence[str]) -> set[str]:
        """Those of these keys (hex) that it does not have."""
        query = "SELECT 1 FROM answers WHERE key = ?"
        return {key for key in keys if not self._file.rows(query, bytes.fromhex(key))}

    def put(self, fingerprint: str, items: Sequence[tuple[str, str, TeacherAnswer]]) -> None:
        """Keeps all of these answers or, after an error, none; returns when they are on the disk.

        Of two answers to one key the first stays, whoever brought it.

        Args:
          fingerprint: of a teacher that was added before.
          items: (key in hex, "score" or "sample", answer) each.
        """
        now = int(time.time())
        rows = []
        for key, kind, answer in items:
            known = key, fingerprint, kind, len(answer.target_ids), now
            rows.append((bytes.fromhex(key), *known[1:], codec.encode(answer, _about(known))))
        with self._file.transaction() as connection:
            connection.executemany(
                "INSERT INTO answers VALUES(?, ?, ?, ?, ?, ?) ON CONFLICT(key) DO NOTHING", rows
            )

    def teachers(self) -> list[TeacherIdentity]:
        """All that were added, in that order."""
        rows = self._file.rows(
            "SELECT fingerprint, model, tokenizer, findings, checked, CAST(probe AS BLOB)"
            " FROM teachers ORDER BY rowid"
        )
        return [self._known_teacher(row) for row in rows]

    def others(self, model: str, tokenizer: str) -> list[TeacherIdentity]:
        """All of this name and tokenizer, in the order in which they were added."""
        return [t for t in self.teachers() if (t.model, t.tokenizer) == (model, tokenizer)]

    def recognise(self, model: str, tokenizer: str, probe: TeacherAnswer) -> TeacherIdentity | None:
        """The first of this name and tokenizer that answered the probe alike (`same_teacher`).

        Always the first: two processes that found it new at the same time have added it twice.
        """
        alike = (t for t in self.others(model, tokenizer) if same_teacher(t.probe, probe))
        return next(alike, None)

    def add_teacher(self, teacher: TeacherIdentity) -> None:
        """Keeps it. Of one that is known the findings and the time are replaced.

        Its first probe stays: were each compared with the one before, a teacher could drift away.
        """
        # All of the row is under the probe's checksum, so it is written anew.
        before = [known for known in self.teachers() if known.fingerprint == teacher.fingerprint]
        probe = before[0].probe if before else teacher.probe
        names = teacher.fingerprint, teacher.model, teacher.tokenizer
        row = (*names, json.dumps(teacher.findings), teacher.checked)
        with self._file.transaction() as connection:
            connection.execute(
                "INSERT INTO teachers VALUES(?, ?, ?, ?, ?, ?) ON CONFLICT(fingerprint) DO UPDATE"
                " SET (model, tokenizer, findings, checked, probe) = (excluded.model,"
                " excluded.tokenizer, excluded.findings, excluded.checked, excluded.probe)",
                (*row, codec.encode(probe, _about(row))),
            )

    def summary(self) -> list[Holding]:
        """What it holds, by teacher and kind."""
        rows = self._file.rows(
            "SELECT model, fingerprint, tokenizer, kind, COUNT(key), IFNULL(SUM(tokens), 0),"
            " IFNULL(SUM(LENGTH(payload)), 0), MIN(created), MAX(created)"
            " FROM teachers LEFT JOIN answers USING (fingerprint)"
            " GROUP BY fingerprint, kind ORDER BY model, fingerprint, kind"
        )
        return [Holding(*row) for row in rows]

    def num_bytes(self) -> int:
        """Of its files."""
        return self._file.num_bytes()

    def all(self) -> Iterator[Stored]:
        """Every answer, a few at a time, in the order in which they came."""
        query = (
            f"SELECT rowid, {_COLUMNS} FROM answers WHERE rowid > ? ORDER BY rowid LIMIT {_AT_ONCE}"
        )
        after = 0
        while rows := self._file.rows(query, after):
            yield from (self._stored(row) for _, *row in rows)
            after = rows[-1][0]

    def close(self) -> None:
        """Nothing can be asked of it any more; may be called twice."""
        self._file.close()

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _stored(self, row: Sequence) -> Stored:
        *known, data = row
        answer = self._decoded(f"the answer {known[0]}", data, known)
        key, fingerprint, kind, _, created = known
        return Stored(key, fingerprint, kind, created, answer)

    def _known_teacher(self, row: Sequence) -> TeacherIdentity:
        *known, data = row
        probe = self._decoded(f"the probe of teacher {known[0]}", data, known)
        fingerprint, model, tokenizer, findings, checked = known
        return TeacherIdentity(fingerprint, model, tokenizer, probe, json.loads(findings), checked)

    def _decoded(self, what: str, data: bytes | None, known: Sequence) -> TeacherAnswer:
        try:
            return codec.decode(data or b"", _about(known))
        except ValueError as error:
            raise UserError(
                f"{self._file.named()}: {what} is damaged: {error}. Put a copy of the file in"
                " its place; without one, delete that row of its table, and it is asked for again"
            ) from None


def _about(known: Sequence) -> bytes:
    """The other columns of a row, for its checksum."""
    return "\n".join(map(str, known)).encode()


def score_key(teacher: TeacherIdentity, request: ScoreRequest) -> str:
    """SHA-256 in hex of all that the answer depends on: neither the row's name nor an address."""
    asked = {"ids": request.ids.tolist(), "at": request.at.tolist(), "top_k": int(request.top_k)}
    return _key(teacher, "score", asked)


def sample_key(teacher: TeacherIdentity, request: SampleRequest, *, by_messages: bool) -> str:
    """SHA-256 in hex of all that the answer depends on: neither the row's name nor an address.

    Args:
      teacher: who is asked.
      request: what it is asked.
      by_messages: the server reads the messages, not the ids.
    """
    sampling = request.sampling
    asked = {
        "sampling": {
            "max_new_tokens": int(sampling.max_new_tokens),
            "temperature": float(sampling.temperature),  # 1 and 1.0 are the same
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
        },
        "seed": int(request.seed),
        "stop_ids": sorted(map(int, request.stop_ids)),
        "top_k": int(request.top_k),
    }
    if by_messages:
        asked["messages"] = [_told(message) for message in request.messages]
        if request.template_kwargs:
            asked["template_kwargs"] = request.template_kwargs
        if request.tools:
            asked["tools"] = request.tools
    else:
        asked["ids"] = request.ids.tolist()
    return _key(teacher, "sample", asked)


def _told(message: Message) -> list:
    """A message in a key; one of role and content alone has the key that it always had."""
    return [message.role, message.content, *([message.fields] if message.fields else [])]


def _key(teacher: TeacherIdentity, kind: str, asked: dict) -> str:
    whole = asked | {
        "model": teacher.model,
        "fingerprint": teacher.fingerprint,
        "tokenizer": teacher.tokenizer,
        "kind": kind,
    }
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
