"""A teacher behind HTTP for tests: a random bigram model that speaks the servers' dialects.

The next token depends on the last one alone, so text is cheap, and what it should say of any text
is known from `LOGPROBS`. `FakeTeacher(**faults)` are the ways in which servers go wrong.
"""

import dataclasses
import threading
from collections.abc import Callable

import factories
import numpy as np
from fake_server import Reply, Request

MODEL = "bigram"
VOCAB = len(factories.SPECIALS) + len(factories.CHARACTERS)  # ids that the tokenizer has
END = factories.SPECIALS.index("<end_of_turn>")


def _logprobs(seed: int) -> np.ndarray:
    logits = 2.0 * np.random.default_rng(seed).standard_normal((VOCAB, VOCAB))
    # Answers come to an end, but not greedy ones, whose text would be empty where it is not shown.
    logits[:, END] = np.minimum(logits[:, END] + 2.0, logits.max(axis=1) - 0.1)
    # As checkpoints have them: ids that no token uses, which a random student writes all the same.
    rest = factories.VOCAB_SIZE - VOCAB
    logits = np.pad(logits, ((0, 0), (0, rest)), constant_values=-30.0)
    logits = np.pad(logits, ((0, rest), (0, 0)), mode="wrap")
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


LOGPROBS = _logprobs(0)  # [last id, next id]


@dataclasses.dataclass
class FakeTeacher:
    """A handler for `fake_server.FakeServer`; /v1/completions as vLLM has it, and chat."""

    seed: int = 0  # of the weights
    most_top_k: int = 64  # more is refused
    ignores: tuple[str, ...] = ()  # fields of requests
    refuses: tuple[str, ...] = ()  # and those that are none of its API
    bos: bool = False  # it puts a token before every prompt
    by_text: bool = False  # tokens are named by their text, as most hosts do,
    extensions: bool = False  # but by id where that is asked for, as at vLLM
    parts: tuple[int, ...] = ()  # ids whose text is shown as "", as vLLM shows parts of characters
    completions: bool = True  # False: there is no such route
    window: int = 512  # tokens that it reads and writes together; answers end there without a word
    entries: list[dict] | None = None  # of /v1/models; None: the model with its window
    tells: bool = False  # /tokenize says the window, too
    proxied: list[dict] | None = None  # of /model/info, as of LiteLLM's proxy; None: no such route
    # Logprobs of the token at a place (teacher, ids, at), p to sample from (p, seen ids), greedy
    # ones too.
    row: Callable[..., np.ndarray] = lambda self, ids, at: self.logprob_table[ids[at - 1]]
    drawn: Callable[..., np.ndarray] = lambda p, seen: p
    greedy: Callable[..., np.ndarray] = lambda p, seen: p

    def __post_init__(self):
        self.logprob_table = _logprobs(self.seed)
        self.tokenizer = factories.tokenizer()
        self.answered = 0  # rows that were scored or written, the preflight's among them
        self.scoring, self.read = False, 0  # of the row under way: its kind, tokens of the prompt
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        entries = self.entries or [{"id": MODEL, "max_model_len": self.window}]
        routes = {
            "/v1/models": lambda _: Reply({"data": entries}),
            "/model/info": self.proxied and (lambda _: Reply({"data": self.proxied})),
            "/tokenize": not self.by_text and self._tokenize,
            "/v1/completions": self.completions and self._completions,
            "/v1/chat/completions": self._chat,
        }
        body = request.body or {}
        unknown = [name for name in self.refuses if name in body]
        k = body.get("prompt_logprobs") or body.get("top_logprobs") or body.get("logprobs") or 0
        if unknown:
            return error(400, f"Unrecognized request argument supplied: {unknown[0]}")
        if k > self.most_top_k:
            return error(400, f"Requested logprobs of {k}, which is greater than max allowed")
        if not routes.get(request.path):
            return error(404, f"no route {request.path}")
        body = {name: value for name, value in body.items() if name not in self.ignores}
        return routes[request.path](body)

    def _tokenize(self, body: dict) -> Reply:
        ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        return Reply({"tokens": ids} | ({"max_model_len": self.window} if self.tells else {}))

    def _completions(self, body: dict) -> Reply:
        prompts = body["prompt"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        prompts = [[factories.SPECIALS.index("<bos>")] * self.bos + p for p in prompts]
        with self._lock:
            self.answered += len(prompts)
        choices = [self._choice(i, ids, body) for i, ids in enumerate(prompts)]
        return Reply({"choices": choices, "usage": {"prompt_tokens": sum(map(len, prompts))}})

    def _choice(self, index: int, ids: list[int], body: dict) -> dict:
        self.scoring, self.read = "prompt_logprobs" in body or "echo" in body, len(ids)
        written, finish_reason = self._write(ids, body)
        by_id = not self.by_text or self.extensions
        if not by_id and finish_reason == "stop":
            written = written[:-1]
        whole, text = ids + written, "".join(map(self._text, written))
        choice = {"index": index, "finish_reason": finish_reason, "text": text}
        if k := body.get("prompt_logprobs"):
            best = [self._best(ids, at, k) for at in range(1, len(ids))]
            rows = [{str(i): {"logprob": p} for i, p in row.items()} for row in best]
            choice["prompt_logprobs"] = [None, *rows]
        elif k := body.get("logprobs"):
            name = self._name(body, self.by_text)
            places = range(0 if body.get("echo") else len(ids), len(whole))
            rows = [self._best(whole, at, k) if at else {} for at in places]
            choice["logprobs"] = {
                "tokens": [name(whole[at]) for at in places],
                "token_logprobs": [
                    row.get(whole[at]) for at, row in zip(places, rows, strict=True)
                ],
                "top_logprobs": [{name(i): p for i, p in row.items()} or None for row in rows],
            }
        if by_id and body.get("return_token_ids"):
            choice |= {"token_ids": written, "prompt_token_ids": ids}
        return choice

    def _chat(self, body: dict) -> Reply:
        ids = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        with self._lock:
            self.answered += 1
        self.scoring, self.read = False, len(ids)
        written, finish_reason = self._write(ids, body)
        hides_end = finish_reason == "stop" and not self.extensions
        shown = written[:-1] if hides_end else written
        name, k = self._name(body, True), body.get("top_logprobs")
        content = []
        for at in range(len(ids), len(ids) + len(shown)) if k else ():
            row = self._best(ids + shown, at, k)
            top = [{"token": name(i), "bytes": None, "logprob": p} for i, p in row.items()]
            content.append(top[0] | {"top_logprobs": top[:k]})
        message = {"role": "assistant", "content": "".join(map(self._text, shown))}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        choice["logprobs"] = {"content": content} if k else None
        if self.extensions and body.get("return_token_ids"):
            choice["token_ids"] = written
        return Reply({"choices": [choice]})

    def _write(self, ids: list[int], body: dict) -> tuple[list[int], str]:
        """(the ids, why they end)."""
        draw, stops = np.random.default_rng(body.get("seed")), body.get("stop_token_ids", [END])
        whole, most = list(ids), min(max(body["max_tokens"], 1), self.window - len(ids))
        while len(whole) < len(ids) + most:
            p = np.exp(self.logprob_table[whole[-1]])
            if body.get("temperature"):
                p = self.drawn(p, whole)
                whole.append(int(draw.choice(len(p), p=p / p.sum())))
            else:
                whole.append(int(self.greedy(p, whole).argmax()))
            if whole[-1] in stops:
                return whole[len(ids) :], "stop"
        return whole[len(ids) :], "length"

    def _best(self, ids: list[int], at: int, k: int) -> dict[int, float]:
        """The token itself and the best K, as vLLM has them."""
        row = self.row(self, ids, at)
        best = np.argsort(-row, kind="stable")[:k].tolist()
        return {i: float(row[i]) for i in [ids[at], *best] if np.isfinite(row[i])}

    def _name(self, body: dict, by_text: bool) -> Callable[[int], str]:
        by_id = not by_text or (self.extensions and body.get("return_tokens_as_token_ids"))
        return "token_id:{}".format if by_id else self._text

    def _text(self, i: int) -> str:
        return "" if i in self.parts else self.tokenizer.decode([i])


def error(status: int, message: str) -> Reply:
    return Reply({"error": {"message": message}}, status=status)
