"""Small runs whose teacher is behind HTTP, what they asked, and servers that fail on the way."""

import json
import threading
from collections.abc import Callable

import factories
from fake_server import Reply, Request
from fake_teacher import FakeTeacher
from small_runs import small

from gkdjax.teachers.server.preflight import PROBE
from gkdjax.teachers.server.store import codec
from gkdjax.teachers.server.store.answers import AnswerStore

MIXED_ROWS = [{"prompt": f"ask {i}"} for i in range(4)]
MIXED_ROWS += [{"prompt": f"tell {i}", "response": f"yes {i}"} for i in range(4)]
# Each is read once in six steps of four rows; with one request at a time, a request is a step.
READ_ROWS = [{"prompt": f"tell {i}", "response": f"yes {i}"} for i in range(24)]
READ_IN_TURN = {"data__train": READ_ROWS, "train__steps": 6, "teacher__concurrency": 1}
_PROBED = factories.tokenizer()(PROBE)["input_ids"][:32]


def config_for(student: str, base: str, **changes):
    """`small_runs.small` with a teacher at a server, whose deadline is near."""
    server = {"backend": "vllm", "api_base": base, "top_k": 8, "deadline_s": 60.0, "max_retries": 8}
    server = {f"teacher__{key}": value for key, value in server.items()}
    return small(student, **(server | {"data__train": MIXED_ROWS} | changes))


def rows_asked(requests: list[Request]) -> list[str]:
    """What was asked, row by row, without what the preflight asks."""
    found = []
    for request in requests:
        if request.path in ("/v1/completions", "/v1/chat/completions"):
            field = "prompt" if "prompt" in request.body else "messages"
            asked = request.body[field]
            for row in asked if isinstance(asked[0], list) else [asked]:
                if row[: len(_PROBED)] != _PROBED and PROBE not in str(row):
                    found.append(json.dumps(request.body | {field: row}, sort_keys=True))
    return found


def answers_in(path) -> dict[str, bytes]:
    """Key -> answer of a store."""
    with AnswerStore(path, read_only=True) as store:
        return {stored.key: codec.encode(stored.answer) for stored in store.all()}


Fault = Callable[[Request], Reply]


class Failing(FakeTeacher):
    """Good but for some of the requests that score rows, by the step that the rows are for.

    A step is what was asked together at first; its rows may come back alone. `faults` are set
    before a run and last, but for those made by `once`.
    """

    def __post_init__(self):
        super().__post_init__()
        self.faults: dict[int, Fault] = {}
        self._steps: dict[tuple[int, ...], int] = {}  # of each row

    def __call__(self, request: Request) -> Reply:
        step = None
        if any("prompt_logprobs" in row for row in rows_asked([request])):
            rows = [tuple(row) for row in request.body["prompt"]]
            with self._lock:
                if rows[0] not in self._steps:
                    self._steps |= dict.fromkeys(rows, len({*self._steps.values()}))
            step = self._steps[rows[0]]
        return self.faults[step](request) if step in self.faults else self.well(request)

    def once(self, fault: Fault) -> Fault:
        """`fault`, and after it what is right."""
        left = [fault]
        return lambda request: left.pop()(request) if left else self.well(request)

    def spoiled(self, spoil: Callable[[Reply], object]) -> Fault:
        """What is right, changed by `spoil`."""

        def fault(request: Request) -> Reply:
            reply = self.well(request)
            spoil(reply)
            return reply

        return fault

    def well(self, request: Request) -> Reply:
        """The answer as it should be."""
        return super().__call__(request)


def restarting(server) -> Fault:
    """The server goes away without an answer, and comes back."""

    def fault(request: Request) -> Reply:
        threading.Thread(target=lambda: (server.stop(), server.start())).start()
        return Reply(delay_s=60.0)  # the end of the server cuts it short

    return fault
