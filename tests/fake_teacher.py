"""A teacher behind HTTP for tests: a random bigram model that speaks the servers' dialects.

The next token depends on the last one alone, so text is cheap, and what it should say of any text
is known from `LOGPROBS`. `FakeTeacher(**lies)` are the ways in which servers go wrong.
"""

import dataclasses
import math
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
    """A handler for `fake_server.FakeServer`; /v1/completions as vLLM has it, and chat.

    Attributes:
      seed: of the weights.
      most_top_k: more is refused.
      prompt_logprobs, echo, logprobs: False: it ignores that they are asked for.
      shift: scored positions are off by so many.
      bos: it puts a token before every prompt.
      by_text: tokens are named by their text, as most hosts do.
      extensions: then it gives ids where they are asked for, as vLLM does; else it ignores that.
      refuses: names of fields that are none of its API.
      parts: ids whose text is shown as "", as vLLM shows the parts of a character.
      completions: False: there is no such route.
      window: tokens that it reads and writes together; answers end there without a word.
      entries: what /v1/models lists; None: the model with its window.
      tells: /tokenize says the window, too.
      proxied: what /model/info says, as LiteLLM's proxy does; None: there is no such route.
      delay_s: of every answer.
    """

    seed: int = 0
    most_top_k: int = 64
    prompt_logprobs: bool = True
    echo: bool = True
    logprobs: bool = True
    shift: int = 0
    bos: bool = False
    by_text: bool = False
    extensions: bool = False
    refuses: tuple[str, ...] = ()
    parts: tuple[int, ...] = ()
    completions: bool = True
    window: int = 512
    entries: list[dict] | None = None
    tells: bool = False
    proxied: list[dict] | None = None
    delay_s: float = 0.0

    def __post_init__(self):
        self.logprob_table = _logprobs(self.seed)
        self.tokenizer = factories.tokenizer()
        self.answered = 0  # rows that were scored or written, the preflight's among them
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply({"data": self.entries or [{"id": MODEL, "max_model_len": self.window}]})
        if request.path == "/model/info" and self.proxied is not None:
            return Reply({"data": self.proxied})
        if request.path == "/tokenize":
            return self._tokenize(request.body)
        unknown = [name for name in self.refuses if name in (request.body or ())]
        if unknown:
            message = f"Unrecognized request argument supplied: {unknown[0]}"
            return Reply({"error": {"message": message}}, status=400)
        if request.path == "/v1/completions" and self.completions:
            return self._completions(request.body)
        if request.path == "/v1/chat/completions":
            return self._chat(request.body)
        return Reply({"error": {"message": f"no route {request.path}"}}, status=404)

    def _tokenize(self, body: dict) -> Reply:
        if self.by_text:
            return Reply({"error": {"message": "no such route"}}, status=404)
        ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        return Reply({"tokens": ids} | ({"max_model_len": self.window} if self.tells else {}))

    def _completions(self, body: dict) -> Reply:
        prompts = body["prompt"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        k = body.get("prompt_logprobs") or body.get("logprobs") or 0
        if k > self.most_top_k:
            message = f"Requested logprobs of {k}, which is greater than max allowed"
            return Reply({"error": {"message": message}}, status=400)
        prompts = [([factories.SPECIALS.index("<bos>")] if self.bos else []) + p for p in prompts]
        choices = [self._choice(i, ids, body) for i, ids in enumerate(prompts)]
        with self._lock:
            self.answered += len(prompts)
        usage = {"prompt_tokens": sum(map(len, prompts))}
        return Reply({"choices": choices, "usage": usage}, delay_s=self.delay_s)

    def _choice(self, index: int, ids: list[int], body: dict) -> dict:
        written = self._write(ids, body)
        stopped = written[-1] in body.get("stop_token_ids", (END,))
        choice = {"index": index, "finish_reason": "stop" if stopped else "length"}
        asked = not self.by_text or self.extensions
        if not asked and stopped:
            written = written[:-1]
        choice["text"] = "".join(map(self._text, written))
        if "prompt_logprobs" in body and self.prompt_logprobs:
            choice["prompt_logprobs"] = [None] + [
                {str(i): {"logprob": p} for i, p in self._best(ids, at, body["prompt_logprobs"])}
                for at in range(1, len(ids))
            ]
        elif "logprobs" in body and self.logprobs:
            echoed = body.get("echo") and self.echo
            whole, first = (ids + written, 0) if echoed else (ids + written, len(ids))
            choice["logprobs"] = self._classic(whole, first, body)
        if asked and body.get("return_token_ids"):
            choice |= {"token_ids": written, "prompt_token_ids": ids}
        return choice

    def _name(self, body: dict) -> Callable[[int], str]:
        by_id = not self.by_text or (self.extensions and body.get("return_tokens_as_token_ids"))
        return "token_id:{}".format if by_id else self._text

    def _classic(self, ids: list[int], first: int, body: dict) -> dict:
        name, k = self._name(body), body["logprobs"]
        places = range(first, len(ids))
        own = [None if at == 0 else self._logprob(ids, at) for at in places]
        best = [(at and {name(i): p for i, p in self._best(ids, at, k)}) or None for at in places]
        names = [name(ids[at]) for at in places]
        return {"tokens": names, "token_logprobs": own, "top_logprobs": best}

    def _chat(self, body: dict) -> Reply:
        messages = body["messages"]
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        written = self._write(ids, body)
        stopped = written[-1] in body.get("stop_token_ids", (END,))
        shown = written[:-1] if stopped and not self.extensions else written
        name = self._name(body) if self.extensions else self._text
        content, so_far = [], list(ids)
        for i in shown:
            so_far.append(i)
            best = self._best(so_far, len(so_far) - 1, body["top_logprobs"])
            own = self._logprob(so_far, len(so_far) - 1)
            top = [{"token": name(j), "bytes": None, "logprob": p} for j, p in best]
            content.append({"token": name(i), "bytes": None, "logprob": own})
            content[-1]["top_logprobs"] = top[: body["top_logprobs"]]
        with self._lock:
            self.answered += 1
        message = {"role": "assistant", "content": "".join(map(self._text, shown))}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if stopped else "length"}
        choice["logprobs"] = {"content": content} if self.logprobs else None
        if self.extensions and body.get("return_token_ids"):
            choice["token_ids"] = written
        return Reply({"choices": [choice]}, delay_s=self.delay_s)

    def _write(self, ids: list[int], body: dict) -> list[int]:
        most = body.get("max_tokens")
        draw = np.random.default_rng(body.get("seed")) if body.get("temperature") else None
        stops, written, last = body.get("stop_token_ids", [END]), [], ids[-1]
        while len(written) < min(max(most, 1), self.window - len(ids)):
            p = np.exp(self.logprob_table[last])
            last = int(p.argmax() if draw is None else draw.choice(len(p), p=p / p.sum()))
            written.append(last)
            if last in stops:
                break
        return written

    def _row(self, ids: list[int], at: int) -> np.ndarray:
        return self.logprob_table[ids[max(at - 1 - self.shift, 0)]]

    def _logprob(self, ids: list[int], at: int) -> float:
        return float(self._row(ids, at)[ids[at]])

    def _best(self, ids: list[int], at: int, k: int) -> list[tuple[int, float]]:
        """The best K and the token itself, as vLLM has them."""
        row = self._row(ids, at)
        best = np.argsort(-row, kind="stable")[:k]
        ids_there = dict.fromkeys([ids[at], *best.tolist()])
        return [(i, float(row[i])) for i in ids_there if math.isfinite(row[i])]

    def _text(self, i: int) -> str:
        return "" if i in self.parts else self.tokenizer.decode([i])
