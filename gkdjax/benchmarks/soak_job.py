"""The job of `soak`: the config of its runs, and the teacher's process, which can fail on purpose.

    python -m gkdjax.main --config=gkdjax/benchmarks/soak_job.py:ADDRESS,STEPS
    python -m gkdjax.benchmarks.soak_job --port=8000 --log=FILE [--faults=0.02] [--seed=0]

The teacher answers as vLLM does: a random bigram model over the quickstart's tokenizer, so that an
answer follows from what is asked, in every process. The log has a line for each row of a request
whose whole answer was taken: when it was asked and answered, and the row; and one for each fault.

This module imports no jax: a config file is read before jax may be loaded.
"""

import argparse
import http.server
import itertools
import json
import os
import pathlib
import random
import select
import socket
import struct
import time
from typing import NamedTuple

import numpy as np
import tokenizers

from gkdjax import config

QUICKSTART = config.ASSETS / "quickstart"
TOP_K, MOST_TOKENS = 8, 8  # of a response
TIMEOUT_S, DEADLINE_S = 2.0, 10.0  # of the trainer's requests
WINDOW = 512  # tokens
_ROWS = 96
_MODEL = "bigram"
_END = 5  # <end_of_turn>
_VOCAB = 105


def get_config(argument: str):
    """Half of the steps are the student's own text; the teacher writes the rest, anew at times."""
    address, steps = argument.split(",")
    c = config.default()
    c.student.model = str(QUICKSTART / "student")
    c.student.lora.rank = 4
    c.teacher.backend, c.teacher.api_base, c.teacher.top_k = "vllm", address, TOP_K
    c.teacher.timeout_s, c.teacher.deadline_s = TIMEOUT_S, DEADLINE_S
    c.context.prefix_messages = json.loads((QUICKSTART / "prefix.json").read_text())
    with (QUICKSTART / "train.jsonl").open() as lines:
        c.data.train = [json.loads(line) for line, _ in zip(lines, range(_ROWS), strict=False)]
    c.data.max_length = 64
    c.data.bucket_lengths = (64,)
    c.rollout.per_prompt = 1
    c.rollout.max_new_tokens = MOST_TOKENS
    c.rollout.temperature = c.rollout.top_p = 1.0
    c.rollout.refresh_every_steps = 50
    c.gkd.on_policy_fraction = 0.5
    c.gkd.on_policy_buffer_steps = 3
    c.optim.learning_rate = 1e-3
    c.train.batch_size = 4
    c.train.epochs, c.train.steps = None, int(steps)
    c.train.export = "adapter"
    c.checkpoint.every_steps = 10
    c.checkpoint.max_to_keep = 3
    c.eval.max_new_tokens = MOST_TOKENS
    c.log.tensorboard = c.log.progress_bar = False
    return c


class Fault(NamedTuple):
    """How an answer goes wrong on its way."""

    status: int = 200
    headers: tuple[str, ...] = ()
    body: bytes | None = None  # in place of what is right
    cut: bool = False  # the connection ends in the middle of the body
    reset: bool = False  # with a reset, before any byte unless it is cut
    seconds: float = 0.0  # before the first byte
    nan: bool = False  # one number is none


_PAGE = b"<html><h1>Bad gateway</h1></html>"
FAULTS = {
    "reset": Fault(reset=True),
    "cut": Fault(cut=True),
    "cut and reset": Fault(cut=True, reset=True),
    "late": Fault(seconds=1.5 * TIMEOUT_S),
    "slow": Fault(seconds=0.5 * TIMEOUT_S),
    "500": Fault(500, body=b'{"error": {"message": "out of memory"}}'),
    "502": Fault(502, ("Content-Type: text/html",), _PAGE),
    "503": Fault(503, ("Retry-After: 1",), b""),
    "429": Fault(429, ("Retry-After: nan",), b'{"error": "busy"}'),
    "HTML": Fault(body=_PAGE),
    "nothing": Fault(body=b""),
    "error": Fault(body=b'{"object": "error", "message": "engine is restarting", "code": 503}'),
    "NaN": Fault(nan=True),
}


class Teacher:
    """A random bigram model: the next token depends on the last one alone."""

    def __init__(self):
        logits = 2.0 * np.random.default_rng(0).standard_normal((_VOCAB, _VOCAB))
        # Answers come to an end, but greedy ones are not empty.
        logits[:, _END] = np.minimum(logits[:, _END] + 2.0, logits.max(axis=1) - 0.1)
        self._logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        file = QUICKSTART / "student" / "tokenizer.json"
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def answer(self, path: str, body: dict) -> dict:
        """The JSON of a good answer."""
        if path == "/v1/models":
            return {"data": [{"id": _MODEL, "max_model_len": WINDOW}]}
        if path == "/tokenize":
            ids = self._tokenizer.encode(body["prompt"], add_special_tokens=False).ids
            return {"tokens": ids}
        prompts = rows_of(body)
        choices = [self._choice(i, ids, body) for i, ids in enumerate(prompts)]
        return {"choices": choices, "usage": {"prompt_tokens": sum(map(len, prompts))}}

    def _choice(self, index: int, ids: list[int], body: dict) -> dict:
        written, reason = self._write(ids, body)
        choice = {"index": index, "finish_reason": reason, "text": ""}
        if k := body.get("prompt_logprobs"):
            best = [self._best(before, own, k) for before, own in itertools.pairwise(ids)]
            rows = [{str(i): {"logprob": p} for i, p in row.items()} for row in best]
            return choice | {"prompt_logprobs": [None, *rows]}
        pairs = zip([ids[-1], *written], written, strict=False)
        best = [self._best(before, own, body["logprobs"]) for before, own in pairs]
        named = [{f"token_id:{i}": p for i, p in row.items()} for row in best]
        return choice | {
            "token_ids": written,
            "prompt_token_ids": ids,
            "logprobs": {
                "tokens": [f"token_id:{i}" for i in written],
                "token_logprobs": [row[i] for row, i in zip(best, written, strict=True)],
                "top_logprobs": named,
            },
        }

    def _write(self, ids: list[int], body: dict) -> tuple[list[int], str]:
        draw, written = np.random.default_rng(body.get("seed")), []
        while len(written) < body["max_tokens"]:
            p = np.exp(self._logprobs[written[-1] if written else ids[-1]])
            drawn = draw.choice(_VOCAB, p=p / p.sum()) if body["temperature"] else p.argmax()
            written.append(int(drawn))
            if written[-1] == _END:
                return written, "stop"
        return written, "length"

    def _best(self, before: int, own: int, k: int) -> dict[int, float]:
        """The token itself and the best K, as vLLM has them."""
        row = self._logprobs[before]
        best = np.argsort(-row, kind="stable")[:k].tolist()
        return {i: float(row[i]) for i in [own, *best]}


def rows_of(body: dict) -> list[list[int]]:
    """The prompts of a request, which may have one or a list of them."""
    prompts = body["prompt"]
    return prompts if isinstance(prompts[0], list) else [prompts]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        asked = time.time()
        received = self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = json.loads(received) if received else {}
        name, fault = self.server.next_fault()
        answer = json.dumps(self.server.teacher.answer(self.path, body)).encode()
        if name:
            self.server.log({"fault": name, "at": asked})
            self._fail(fault, answer)
        else:
            self._send(200, (), answer)
        # A client that does not wait any longer has closed its side: it did not take the answer.
        gone = select.select([self.connection], [], [], 0)[0] and self._is_closed()
        if "prompt" in body and self.path != "/tokenize" and name in ("", "slow") and not gone:
            for ids in rows_of(body):
                row = json.dumps(body | {"prompt": ids}, sort_keys=True)
                self.server.log({"asked": asked, "answered": time.time(), "row": row})

    do_POST = do_GET

    def _fail(self, fault: Fault, answer: bytes) -> None:
        time.sleep(fault.seconds)
        if fault.nan:
            head, found, rest = answer.partition(b'"logprob": ')
            answer = head + found + b"NaN" + rest[rest.find(b"}") :] if found else answer[:-1]
        if fault.cut:
            self._head(200, (), len(answer))
            self.wfile.write(answer[: len(answer) // 2])
        elif not fault.reset:
            self._send(fault.status, fault.headers, answer if fault.body is None else fault.body)
        if fault.cut or fault.reset:
            self.close_connection = True
        if fault.reset:  # to close with nothing left to linger for sends one
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _is_closed(self) -> bool:
        return self.connection.recv(1, socket.MSG_PEEK) == b""

    def _head(self, status: int, headers: tuple[str, ...], length: int) -> None:
        lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {length}", *headers]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode())

    def _send(self, status: int, headers: tuple[str, ...], body: bytes) -> None:
        self._head(status, headers, len(body))
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, log: pathlib.Path, faults: float, seed: str):
        self.teacher, self._faults, self._draw = Teacher(), faults, random.Random(seed)
        self._log = log.open("a")
        super().__init__(("127.0.0.1", port), _Handler)

    def next_fault(self) -> tuple[str, Fault]:
        """The name of a fault and what it is; "" in most cases."""
        name = self._draw.choice([*FAULTS]) if self._draw.random() < self._faults else ""
        return name, FAULTS.get(name) or Fault()

    def log(self, line: dict) -> None:
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def handle_error(self, request, client_address):
        """Silent: the other side went away, killed or out of patience."""


def main() -> None:
    parser = argparse.ArgumentParser("soak_job", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", type=pathlib.Path, required=True)
    parser.add_argument("--faults", type=float, default=0.0, help="Share of the answers.")
    parser.add_argument("--seed", default="0", help="Of the faults.")
    a = parser.parse_args()
    _Server(a.port, a.log, a.faults, a.seed).serve_forever(0.05)


if __name__ == "__main__":
    main()
