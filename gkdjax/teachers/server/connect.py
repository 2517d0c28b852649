"""From the config to a teacher behind HTTP: tried first, or known from the store."""

import base64
import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib

import jax
from absl import logging

from gkdjax.config import Teacher
from gkdjax.data.chat_template import Chat
from gkdjax.parallel import multihost
from gkdjax.teachers.base import Capabilities
from gkdjax.teachers.server.dialects import openai, sglang, vllm
from gkdjax.teachers.server.dialects.base import Dialect
from gkdjax.teachers.server.preflight import Findings, Server, examine, probe_again
from gkdjax.teachers.server.scheduler import Pool
from gkdjax.teachers.server.store import codec
from gkdjax.teachers.server.store import multihost as store_multihost
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, fingerprint_of, same_teacher
from gkdjax.teachers.server.store.suspects import Suspects
from gkdjax.teachers.server.teacher import ServerTeacher
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.types import ContextLimit, SamplingParams
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import write_json

# In the run's directory:
_BEGUN_WITH = "teacher.json"
_ENDED_AT = "teacher_ended_at.json"

# teacher.backend -> the dialects that are tried, in this order.
DIALECTS = {
    "vllm": {"prompt_logprobs": vllm.PromptLogprobs, "echo": vllm.EchoLogprobs},
    "sglang": {"generate": sglang.Generate},
    "openai": {
        "completions_by_id": openai.CompletionsById,
        "completions": openai.Completions,
        "chat_by_id": openai.ChatById,
        "chat": openai.Chat,
    },
}


def declared(c: Teacher) -> Capabilities:
    """What a server can do at best, before it is asked."""
    limits = "teacher.offline=True: the store holds what was asked ahead of the run"
    return Capabilities(
        max_top_k=c.top_k,
        dense=False,
        samples=True,
        temperature=False,
        scores=True,
        on_policy=not c.offline,
        limits=limits if c.offline else "",
    )


def connect(
    c: Teacher, chat: Chat, vocab_size: int, workdir: pathlib.Path, shared: pathlib.Path, **how
) -> ServerTeacher:
    """Tries the server of a config, or, offline, finds it in the store.

    Of several processes the leader is the first: what the server says differs a little from time to
    time, and all have to know it by the same answer.

    Args:
      c: of a `config.parse`d config, with a backend of `DIALECTS`.
      chat: renders the teacher's view; its tokenizer is the server's, or it is refused.
      vocab_size: the server may name ids below it, see `train.models.ids_of_server`.
      workdir: of the run; its teacher.json says which weights it began with.
      shared: the run's directory, where the stores of all processes lie.
      how: `sampling`, as the run is going to draw, and `template_kwargs`, `data.template_kwargs`
        for a server that renders the prompt itself.

    Raises:
      UserError: the server cannot be used, is another one than the run began with, or the store
        does not know it.
      TeacherUnreachable: it does not answer.
    """
    path = shared / "answers.sqlite" if c.store == "" else c.store
    if path is None:
        return multihost.fail_together(lambda: _connect(c, chat, vocab_size, workdir, None, **how))

    def open_own() -> ServerTeacher:
        own = store_multihost.of_process(path, jax.process_index())
        return _connect(c, chat, vocab_size, workdir, own, **how)

    multihost.on_leader(lambda: store_multihost.gather(path))
    leaders = multihost.on_leader(open_own)
    multihost.on_leader(lambda: store_multihost.spread(path))
    return multihost.fail_together(lambda: leaders or open_own())


def _connect(
    c: Teacher,
    chat: Chat,
    vocab_size: int,
    workdir: pathlib.Path,
    path: pathlib.Path | None,
    *,
    sampling: SamplingParams,
    template_kwargs: dict,
) -> ServerTeacher:
    store = AnswerStore(path) if path is not None else None
    transport = server = None
    try:
        tokenizer = tokenizer_hash(chat)
        if c.offline:
            known = _remembered(c, store, tokenizer, workdir / _BEGUN_WITH)
        else:
            limits = Limits(c.timeout_s, c.deadline_s, c.max_retries)
            transport = Transport(c.api_base, c.api_key_env, limits, trust_env=c.trust_env)
            begun = _dialect_of_run(store, workdir / _BEGUN_WITH)
            server = try_server(c, transport, chat, vocab_size, sampling, only=begun)
            known = _recognised(c, server, store, tokenizer)
        _claim(workdir / _BEGUN_WITH, known)
    except BaseException:
        for opened in (transport, store):
            if opened is not None:
                opened.close()
        raise
    findings = Findings(**known.findings)
    dialect = _dialect(c.backend, findings, chat, vocab_size)
    probe = functools.partial(probe_again, transport, server, chat) if server else None
    ended = Suspects(store_multihost.of_process(workdir / _ENDED_AT, jax.process_index()))
    pool = Pool(
        *(dialect, transport, store, known, ended),
        probe=probe,
        concurrency=c.concurrency,
        max_unreadable=c.max_unreadable,
    )
    can = declared(c)
    if not findings.scores:
        can = dataclasses.replace(can, scores=False, on_policy=False, limits=findings.limits)
    return ServerTeacher(
        pool,
        chat,
        f"{findings.model} ({c.backend}, {known.fingerprint[:12]})",
        can,
        top_k=c.top_k,
        context=_context(findings, c.api_base),
        template_kwargs=template_kwargs,
    )


def _context(findings: Findings, api_base: str) -> ContextLimit:
    source = findings.context_source or "as its server said"  # when an older store was filled
    return ContextLimit(findings.context_length, f"{source}, {api_base}", findings.context_written)


def tokenizer_hash(chat: Chat) -> str:
    """SHA-256 in hex of which id each token has."""
    vocabulary = sorted(chat.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def try_server(
    c: Teacher,
    transport: Transport,
    chat: Chat,
    vocab_size: int,
    sampling: SamplingParams,
    only: str | None = None,
) -> Server:
    """The preflight as this config needs it, see `preflight.examine`; of `only` one dialect."""
    dialects = DIALECTS[c.backend]
    return examine(
        transport,
        c.api_model,
        {only: dialects[only]} if only in dialects else dialects,
        chat,
        vocab_size,
        c.top_k,
        sampling,
        must_score=c.backend != "openai",
    )


def _recognised(
    c: Teacher, server: Server, store: AnswerStore | None, tokenizer: str
) -> TeacherIdentity:
    """As the store knows it, or new to it."""
    model, probe = server.findings.model, server.probe
    known = None if store is None else store.recognise(model, tokenizer, probe)
    if known is None:
        fingerprint = fingerprint_of(model, tokenizer, probe)
        others = [] if store is None else store.others(model, tokenizer)
        others = [other for other in others if other.probe.top_ids.shape[1] == c.top_k]
        if others:
            logging.warning(
                "%s answers otherwise than when the store was filled: it has other weights now, and"
                " the answers of %d earlier ones are not used",
                *(model, len(others)),
            )
    else:
        fingerprint, probe = known.fingerprint, known.probe
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    findings = dataclasses.asdict(server.findings)
    known = TeacherIdentity(fingerprint, model, tokenizer, probe, findings, now)
    if store is not None:
        store.add_teacher(known)
    return known


def _remembered(
    c: Teacher, store: AnswerStore, tokenizer: str, begun_with: pathlib.Path
) -> TeacherIdentity:
    """The teacher that the run began with, or else the one of this name that was checked last."""
    every = store.teachers()
    fitting = [
        known
        for known in every
        if c.api_model in ("", known.model)
        and known.tokenizer == tokenizer
        and known.findings["dialect"] in DIALECTS[c.backend]
        and known.probe.top_ids.shape[1] == c.top_k
    ]
    if begun_with.exists():
        same = [known for known in fitting if _is_begun_with(begun_with, known)]
        fitting = same or fitting
    if len({known.model for known in fitting}) == 1:
        return max(fitting, key=lambda known: known.checked)
    names = sorted({known.model for known in every})
    raise UserError(
        f"config.teacher.offline: the store has the teachers {names}, of which"
        f" {len(fitting)} fit config.teacher.backend = {c.backend!r}, .top_k = {c.top_k},"
        f" .api_model = {c.api_model!r} and the tokenizer; name one in .api_model, or fill the"
        " store first with python -m gkdjax.tools.cache_teacher"
    )


def _dialect(backend: str, findings: Findings, chat: Chat, vocab_size: int) -> Dialect:
    return DIALECTS[backend][findings.dialect](findings.model, vocab_size, chat.tokenizer)


def _dialect_of_run(store: AnswerStore | None, begun_with: pathlib.Path) -> str | None:
    """By which a run has asked so far: another one would find other answers to the probe."""
    if store is None or not begun_with.exists():
        return None
    same = (known for known in store.teachers() if _is_begun_with(begun_with, known))
    return next((known.findings["dialect"] for known in same), None)


def _is_begun_with(path: pathlib.Path, known: TeacherIdentity) -> bool:
    begun_with = json.loads(path.read_text())
    probe = codec.decode(base64.b64decode(begun_with["probe"]))
    return begun_with["model"] == known.model and same_teacher(probe, known.probe)


def _claim(path: pathlib.Path, known: TeacherIdentity) -> None:
    """Writes whose answers a run learns from, or checks that they are the same weights'."""
    if path.exists():
        if _is_begun_with(path, known):
            return
        raise UserError(
            f"the run in {path.parent} began with other weights than {known.model} has now; serve"
            " those again, or give --workdir another directory"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = base64.b64encode(codec.encode(known.probe)).decode()
    write_json(path, {"model": known.model, "probe": probe})
