"""Tries the server of a config: its abilities, its limits, its speed.

    python -m gkdjax.tools.check_teacher --config=configs/vllm_teacher.py [--local=MODEL]

Nothing is trained or stored. With --local, a directory or hub id of the same weights, the server's
answers are compared with those computed here.
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import flags

from gkdjax.config import Config, cli
from gkdjax.data.chat_template import Chat
from gkdjax.losses import TopKLogprobs, topk_forward_kl
from gkdjax.models import sampler
from gkdjax.models.hf import hub, load, model_config
from gkdjax.parallel.mesh import make_mesh
from gkdjax.teachers.server import connect, preflight
from gkdjax.teachers.server.answers import TeacherAnswer
from gkdjax.teachers.server.preflight import Server
from gkdjax.teachers.server.scheduler import exchange
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.train import models
from gkdjax.types import Message
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import table

flags.adopt_module_key_flags(cli)
_LOCAL = flags.DEFINE_string("local", None, "A directory or hub id of the teacher's own weights.")

_ROUNDS = 5  # requests one after the other, for the latency
_WRITTEN_TOKENS = 32  # of each request, for the speed of writing

Row = tuple[str, str]  # name, value


def main(config: Config, workdir: str) -> None:
    del workdir  # it may be the directory of a run, and nothing of this belongs there
    print(table(["teacher", "found"], list(rows(config, _LOCAL.value)), widest=90))


def rows(config: Config, local: str | None) -> Iterator[Row]:
    """Yields the rows of the table; `local` is a directory or hub id of the same weights.

    Raises:
      UserError: the server cannot be used; why.
      TeacherUnreachable: it does not answer.
    """
    c = config.teacher
    if not c.is_server:
        raise UserError(
            f"config.teacher.backend = {c.backend!r} is in this process; there is no server to try"
        )
    with tempfile.TemporaryDirectory() as aside:
        sources = models.resolve_models(config, pathlib.Path(aside), None)
    chat, size = sources.teacher_chat, model_config.load_spec(sources.student).vocab_size
    vocab_size = models.ids_of_server(sources, size)
    limits = Limits(c.timeout_s, c.deadline_s, c.max_retries)
    transport = Transport(c.api_base, c.api_key_env, limits, trust_env=c.trust_env)
    with contextlib.closing(transport):
        sampling = sampler.sampling(config)
        server = connect.try_server(c, transport, chat, vocab_size, sampling)
        yield "address", transport.root
        yield from _abilities(server, c.backend)
        yield from _speed(transport, server, chat, c.concurrency)
        if local is not None:
            yield from _beside_local(server, chat, local)


def _abilities(server: Server, backend: str) -> Iterator[Row]:
    found = server.findings
    yield "model", found.model
    yield "dialect", f"{backend}, {found.dialect}"
    yield "tokenizer", found.tokenizer
    length = found.context_length
    known = f"{length:,} tokens ({found.context_source})" if length else "it does not tell"
    yield "longest view", known
    yield "writes, with logprobs", "yes"
    if found.scores:
        yield "scores given ids", f"yes, as when it writes: {found.difference:.1e} nats apart"
        yield "on-policy, rows with a response", "yes"
    else:
        yield "scores given ids", f"no: {found.limits}"
        yield "on-policy, rows with a response", "no: only its own text can be learnt"
    yield "logprobs of a token", f"{found.top_k}"
    yield "whole vocabulary (teacher.top_k=None)", "no"
    yield "gkd.temperature other than 1", "with gkd.tail='renormalize' only"


def _speed(transport: Transport, server: Server, chat: Chat, concurrency: int) -> Iterator[Row]:
    ids, k = preflight.probe_ids(chat), server.findings.top_k

    def tokens(kind: str, number: int) -> int:
        """Asks about another text each time, which no cache has -> tokens of the answer."""
        mixed = np.random.default_rng(number).permutation(ids)
        if kind == "writing":
            request = preflight.sample_request(chat, mixed, k, _WRITTEN_TOKENS)
            text = chat.tokenizer.decode(mixed)
            request = dataclasses.replace(request, messages=(Message("user", text),))
        else:
            request = preflight.score_request(mixed, k)
        (answer,) = exchange(transport, server.dialect, [request])
        return len(answer.target_ids)

    for kind in ("writing", "scoring") if server.findings.scores else ("writing",):
        seconds = []
        for number in range(1, _ROUNDS + 1):
            began = time.monotonic()
            tokens(kind, number)
            seconds.append(time.monotonic() - began)
        median = 1000 * statistics.median(seconds)
        yield f"{kind}, one request", f"{median:.0f} ms (median of {_ROUNDS})"
        began = time.monotonic()
        numbers = range(_ROUNDS + 1, _ROUNDS + 1 + 2 * concurrency)
        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            total = sum(pool.map(lambda number, kind=kind: tokens(kind, number), numbers))
        speed = total / (time.monotonic() - began)
        yield f"{kind}, {concurrency} at a time", f"{speed:,.0f} tokens/s"


def _beside_local(server: Server, chat: Chat, local: str) -> Iterator[Row]:
    if not server.findings.scores:
        raise UserError("--local: there is nothing to compare; the server does not score given ids")
    directory = hub.local_directory(local)
    decoder, params = load.load_pretrained(directory, "float32", "float32", make_mesh())
    ids = preflight.probe_ids(chat)
    hidden_1TD = decoder.apply({"params": params}, ids[None, :], np.ones((1, len(ids)), bool))
    logits_1TV = decoder.apply({"params": params}, hidden_1TD, method="unembed")
    apart, divergence = compare(np.asarray(logits_1TV[0, :-1], np.float64), server.probe)
    yield f"logprobs beside those of {local}", f"at most {apart:.1e} nats apart"
    yield "forward KL, server to local", f"{divergence:.1e} nats a token"


def compare(logits_nV: np.ndarray, probe: TeacherAnswer) -> tuple[float, float]:
    """(largest difference of a top-k logprob, mean KL(server || local)), in nats.

    `logits_nV` are the local model's where `probe` is the server's answer.
    """
    highest_n1 = logits_nV.max(axis=-1, keepdims=True)
    norm_n1 = np.log(np.exp(logits_nV - highest_n1).sum(axis=-1, keepdims=True)) + highest_n1
    ours_nK = np.take_along_axis(logits_nV - norm_n1, probe.top_ids, axis=-1)
    present_nK = probe.top_logprobs > -np.inf
    apart = np.abs(np.where(present_nK, ours_nK - probe.top_logprobs, 0.0)).max()
    topk = TopKLogprobs(probe.top_ids, probe.top_logprobs, probe.tail_logprob)
    return float(apart), float(topk_forward_kl(logits_nV.astype(np.float32), topk).mean())


if __name__ == "__main__":
    cli.run(main)
